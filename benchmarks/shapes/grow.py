"""How new layers should start: the loss of the demo model with more layers, before and after training them.

    python -m benchmarks.shapes.grow OUT [--tokens 50000] [--seeds 0 1 2] [--inits zero copy ...] [--after 14 16 ...]

Every start is a run of its own: `shoal prune` inserts a layer after each of those named, `shoal distill` trains the new
ones alone on plain text (LESA, arXiv:2502.13794, trains them first), and the loss is that of held-out documentation, in
nats per token. `--tokens 0` trains nothing: the loss before training, of one seed. Before training the seed matters to
`lesa` alone, whose network starts from it. What is there is not done again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.side_by_side import run_shoal, write_recipe
from shoal.data.sources import load_texts
from shoal.models.load import load_model, load_tokenizer
from shoal.recipe.section import DataSource

MODEL = "demo:smollm2-135m"
AFTER = tuple(range(14, 29, 2))
INITS = ("zero", "copy", "mean", "lesa")
LENGTH = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--inits", nargs="+", choices=INITS, default=list(INITS))
    parser.add_argument("--held-out", type=int, default=16_384, help="tokens that the loss is the mean over")
    parser.add_argument("--after", type=int, nargs="+", default=list(AFTER))
    arguments = parser.parse_args()
    seeds = arguments.seeds if arguments.tokens else arguments.seeds[:1]
    print(f"| start | before training | after {arguments.tokens:,} tokens |\n| --- | --- | --- |", flush=True)
    for init in arguments.inits:
        losses = [measured(init, seed, arguments) for seed in seeds]
        print(f"| {init} | {' | '.join(map(cell, zip(*losses, strict=True)))} |", flush=True)


def cell(losses: tuple[float | None, ...]) -> str:
    """The mean over the seeds, and each of them."""
    known = [loss for loss in losses if loss is not None]
    return f"{fmean(known):.4f} ({', '.join(f'{loss:.4f}' for loss in known)})" if known else ""


def measured(init: str, seed: int, arguments: argparse.Namespace) -> tuple[float, float | None]:
    """The loss of one start under one seed, before and after training."""
    run_dir = arguments.out / f"after-{'-'.join(map(str, arguments.after))}" / f"{init}-{seed}"
    file = recipe(init, seed, arguments, run_dir)
    run_shoal("prune", file)
    before = held_out_loss(run_dir / "student", arguments.held_out)
    if not arguments.tokens:
        return before, None
    run_shoal("distill", file)
    return before, held_out_loss(run_dir / "distilled", arguments.held_out)


def recipe(init: str, seed: int, arguments: argparse.Namespace, run_dir: Path) -> Path:
    trainer = {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "lr_scheduler_type": "linear"}
    return write_recipe(
        {
            "model": MODEL,
            "run_dir": str(run_dir),
            "seed": seed,
            "prune": {"edits": [{"kind": "insert", "after": arguments.after, "init": init}], "proof": "files"},
            "distill": {
                "data": ["python_docs", "docstrings"],
                "losses": [{"kind": "cross_entropy"}],
                "trainable": "replacement",
                "num_tokens": max(arguments.tokens, LENGTH),
                "sequence_length": LENGTH,
                "watch": None,
                "deepspeed": "deepspeed/zero0.json",  # one rank shares nothing out
                "trainer": {**trainer, "warmup_steps": 5, "save_strategy": "no"},
            },
        }
    )


@torch.inference_mode()
def held_out_loss(folder: Path, num_tokens: int) -> float:
    """Nats per token of `python_docs_heldout`, in rows of 512."""
    tokenizer: Any = load_tokenizer(folder)
    model = load_model(folder, dtype="float32")
    text = "\n\n".join(load_texts(DataSource("python_docs_heldout"), max_characters=8 * num_tokens))
    ids = torch.tensor(tokenizer(text)["input_ids"])
    rows = ids[: min(len(ids), num_tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    return fmean(model(input_ids=row[None], labels=row[None]).loss.item() for row in rows)


if __name__ == "__main__":
    main()
