"""Fewer layers, narrower layers, or both: what a cut of the demo model loses at about equal bytes.

    python -m benchmarks.shapes.width OUT [--tokens 0] [--drop 6] [--channels 1152] [--both 2 1280] [--seeds 0 1 2]

Every arm is a run of its own: `shoal prune` makes it, and its loss is KL(teacher || student) in nats per token on
held-out documentation. With --tokens each is healed as the others are, by `shoal distill`, once per seed. Then, without
layers dropped and before any training, channels by what they write against as many drawn by each seed, and against
Minitron's score (arXiv:2407.14679), the root mean square over rows of the mean over positions of |x|, alone and times
the norm of the channel's column. What is there is not done again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.side_by_side import run_shoal, write_recipe
from shoal.artifacts.plan import PruningPlan
from shoal.artifacts.width import indices_of
from shoal.compress.apply import calibration_rows
from shoal.compress.width.narrowing import Narrowing, Units, narrowing
from shoal.data.sources import load_texts
from shoal.models.anatomy import decoder_layers
from shoal.models.checkpoint_files import checkpoint_bytes
from shoal.models.load import load_model, load_tokenizer, resolve_model
from shoal.recipe.prune import Width
from shoal.recipe.section import DataSource

MODEL = "demo:smollm2-135m"
LENGTH = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=0, help="of healing; 0 = none")
    parser.add_argument("--drop", type=int, default=6, help="layers that go in the arm depth")
    parser.add_argument("--channels", type=int, default=1152, help="channels that stay in the arm width")
    parser.add_argument("--both", type=int, nargs=2, default=[2, 1280], metavar=("LAYERS", "CHANNELS"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--calibration", type=int, default=65_536, help="tokens that channels are chosen on")
    parser.add_argument("--held-out", type=int, default=4096, help="tokens that losses are means over")
    arguments = parser.parse_args()
    teacher, rows = load_model(resolve_model(MODEL), dtype="float32"), held_out_rows(arguments.held_out)
    with torch.inference_mode():
        reference = [teacher(input_ids=row[None]).logits.log_softmax(-1) for row in rows]
    width = {"intermediate_size": arguments.channels, "num_tokens": arguments.calibration}
    arms = {
        "depth": {"num_drop": arguments.drop},
        "width": {"drop": [], "width": width},
        "both": {"num_drop": arguments.both[0], "width": {**width, "intermediate_size": arguments.both[1]}},
    }
    print(f"| arm | MB | before healing | after {arguments.tokens:,} tokens |\n| --- | --- | --- | --- |", flush=True)
    for name, prune in arms.items():
        losses = list(arm(name, prune, arguments, lambda model: divergence(model, rows, reference)))
        healed = [after for _, after in losses if after is not None]
        cells = ", ".join(f"{loss:.4f}" for loss in healed)
        size = checkpoint_bytes(run_dir(name, arguments.seeds[0], arguments) / "student") / 1e6
        print(
            f"| {name} | {size:.1f} | {losses[0][0]:.4f} | {f'{fmean(healed):.4f} ({cells})' if healed else ''} |",
            flush=True,
        )
    print("\n| channels | before healing |\n| --- | --- |", flush=True)
    own = run_dir("width", arguments.seeds[0], arguments)
    for name, loss in of_choices(own, teacher, arguments, lambda model: divergence(model, rows, reference)):
        print(f"| {name} | {loss:.4f} |", flush=True)


def run_dir(name: str, seed: int, arguments: argparse.Namespace) -> Path:
    sizes = f"{arguments.drop}-{arguments.channels}-{'-'.join(map(str, arguments.both))}"
    return arguments.out / sizes / f"{name}-{seed}"


def arm(
    name: str, prune: Mapping[str, Any], arguments: argparse.Namespace, loss: Callable[[Any], float]
) -> Iterator[tuple[float, float | None]]:
    """The losses of one arm before and after healing, by seed; of one seed where nothing is healed."""
    for seed in arguments.seeds if arguments.tokens else arguments.seeds[:1]:
        folder = run_dir(name, seed, arguments)
        # where all layers train 1e-3 is too much: it took the narrowed student from .29 to .41 nats (docs/guide.md)
        trainer = {"per_device_train_batch_size": 2, "learning_rate": 3e-4, "lr_scheduler_type": "linear"}
        file = write_recipe(
            {
                "model": MODEL,
                "run_dir": str(folder),
                "seed": seed,
                "measure": {"data": "python_docs", "num_tokens": 8192, "sequence_length": LENGTH},
                "prune": dict(prune),
                "distill": {
                    "data": ["python_docs", "docstrings"],
                    "losses": [{"kind": "forward_kl"}],
                    "trainable": "layers",
                    "num_tokens": max(arguments.tokens, LENGTH),
                    "sequence_length": LENGTH,
                    "watch": None,
                    "deepspeed": "deepspeed/zero0.json",  # one rank shares nothing out
                    "trainer": {**trainer, "warmup_steps": 5, "save_strategy": "no"},
                },
            }
        )
        run_shoal("prune", file)
        before = loss(load_model(folder / "student", dtype="float32"))
        if arguments.tokens:
            run_shoal("distill", file)
        yield before, loss(load_model(folder / "distilled", dtype="float32")) if arguments.tokens else None


def of_choices(
    folder: Path, teacher: Any, arguments: argparse.Namespace, loss: Callable[[Any], float]
) -> Iterator[tuple[str, float]]:
    """Each way to choose the channels of the arm `width` in ``folder``, and its loss."""
    plan = PruningPlan.read(folder / PruningPlan.FILE)
    assert plan.width is not None
    own = narrowing(folder, teacher.config, plan.width)
    whole, count = own.counts["mlp"]

    def masked(channels: Sequence[Sequence[int]]) -> float:
        units: dict[int, Units] = {layer: {"mlp": kept} for layer, kept in enumerate(channels)}
        with own.masked(teacher, units):
            return loss(teacher)

    yield "by what they write", masked([indices_of(mask) for mask in plan.width.channels])
    means = mean_sizes(teacher, own, arguments.calibration)
    norms = [torch.linalg.vector_norm(reader(teacher, own, layer).weight.detach(), dim=0) for layer in own.maps]
    for name, scores in (
        ("by Minitron's score", means),
        ("by that, times the norm of the column", [mean * norm for mean, norm in zip(means, norms, strict=True)]),
    ):
        yield name, masked([score.topk(count).indices.tolist() for score in scores])
    for seed in arguments.seeds:
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randperm(whole, generator=generator)[:count].tolist() for _ in own.maps]
        yield f"at random, seed {seed}", masked(drawn)


def reader(model: Any, own: Narrowing, layer: int) -> Any:
    """The map that reads a layer's channels."""
    return decoder_layers(model)[layer].get_submodule(own.maps[layer]["mlp"])


@torch.inference_mode()
def mean_sizes(model: Any, own: Narrowing, num_tokens: int) -> list[Tensor]:
    """Of every layer and channel the root mean square over rows of the mean over positions of |x|."""
    tokenizer = load_tokenizer(resolve_model(MODEL))
    rows = calibration_rows(
        Width(intermediate_size=0.5, num_tokens=num_tokens), tokenizer, seed=0, section="prune.width"
    )
    sums: dict[int, Tensor] = {}

    def adding(layer: int) -> Any:
        def add(_: Any, args: tuple[Tensor, ...]) -> None:
            sums[layer] = sums.get(layer, torch.zeros(())) + args[0].abs().mean(1).square().sum(0)

        return add

    hooks = [reader(model, own, layer).register_forward_pre_hook(adding(layer)) for layer in own.maps]
    for ids_BS in rows.input_ids_NS.long().split(4):
        model.model(input_ids=ids_BS)
    for hook in hooks:
        hook.remove()
    return [sums[layer].sqrt() for layer in own.maps]


def held_out_rows(num_tokens: int) -> Tensor:
    tokenizer: Any = load_tokenizer(resolve_model(MODEL))
    text = "\n\n".join(load_texts(DataSource("python_docs_heldout"), max_characters=8 * num_tokens))
    ids = torch.tensor(tokenizer(text)["input_ids"])
    return ids[: min(len(ids), num_tokens) // LENGTH * LENGTH].view(-1, LENGTH)


@torch.inference_mode()
def divergence(model: Any, rows: Tensor, reference: Sequence[Tensor]) -> float:
    """KL(teacher || model) in nats per token, by the teacher's log-probabilities of every row."""
    own = (model(input_ids=row[None]).logits.log_softmax(-1) for row in rows)
    return fmean(
        float((theirs.exp() * (theirs - ours)).sum(-1).mean()) for ours, theirs in zip(own, reference, strict=True)
    )


if __name__ == "__main__":
    main()
