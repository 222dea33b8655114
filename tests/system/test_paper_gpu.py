"""What computes on a GPU mixes no devices there and gives what a CPU gives: shown on a GPU of paper.

Out of its reach:
- fixed rows and CUDA graphs, which want a stream: tests/shoal/inference/test_fixed_rows.py replays recorded operations;
- flash, varlen, Liger and 4-bit weights, whose kernels refuse host memory;
- torch.compile, which writes code for the device that tensors have;
- DeepSpeed and NCCL, which ask torch.cuda; ranks run on gloo in their own tests.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from image_models import image_model, image_rows
from paper_gpu import GPU, MixedDevices, PaperGpu, paper_gpu
from tiny import VOCAB_SIZE, tiny_model

from shoal.artifacts.artifact import Provenance
from shoal.compress.changes.calibration import Source
from shoal.compress.changes.fit import compensate
from shoal.compress.changes.narrowing import sizes_of
from shoal.compress.changes.width import measure_width
from shoal.compress.edits.layer_edits import KINDS as EDITS
from shoal.compress.edits.layer_edits import components_of
from shoal.compress.measure import measure_importance
from shoal.compress.metrics.hidden_metrics import HIDDEN_METRICS
from shoal.compress.metrics.metric import Calibration
from shoal.compress.metrics.registry import METRICS
from shoal.compress.surgery.cut_model import cut_model
from shoal.compress.surgery.narrow_config import kept_width
from shoal.compress.variants.variant_generation import Limits, generate_variants
from shoal.compress.variants.variants import INTACT, Edited, score_variants, variant_of, without
from shoal.data.image_rows import ImageReader, RowsWithImages, training_images
from shoal.data.packing import IMAGES, PackedRows
from shoal.data.streams import Layout as Packing
from shoal.data.streams import pack
from shoal.inference.decoder import Decoder
from shoal.inference.generation import sample, write_after
from shoal.inference.scoring import score
from shoal.lab.sweeps import WithDonor
from shoal.models.document_masks import documents_known
from shoal.recipe.distill import Distill, TrainingSource
from shoal.recipe.losses import LOGIT_TERMS, CrossEntropy, ForwardKL, HiddenStates
from shoal.recipe.messages import checked
from shoal.recipe.prune import Compensate, Width
from shoal.recipe.section import ImageQuestion
from shoal.train.distillation_trainer import _spec
from shoal.train.objective.host_batch import on_host, stacked
from shoal.train.objective.objective import Objective, to_logits
from shoal.train.record import _record_shard
from shoal.train.teacher.recording import Layout
from shoal.train.teacher.signals import LiveTeacher
from shoal.train.teacher.wiring import make_trainable, wire
from shoal.train.trainer import INPUTS

__all__ = ["paper_gpu"]
KINDS = [term().kind for term in (*LOGIT_TERMS, HiddenStates)]


def rows() -> PackedRows:
    """Eight rows of two documents each."""
    ids_NS = torch.randint(0, 250, (8, 64), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    positions_NS = torch.arange(64, dtype=torch.int32).repeat(8, 1)
    positions_NS[:, 40:] -= 40
    return PackedRows(ids_NS, positions_NS)


def test_what_a_gpu_refuses_is_refused_and_what_is_waited_for_is_counted(paper_gpu: PaperGpu) -> None:
    there, here = torch.ones(2, 2, device="cuda"), torch.ones(2, 2)
    assert (there.device, (there + 1).device, here.device) == (GPU, GPU, torch.device("cpu"))
    with pytest.raises(MixedDevices, match="aten::mul"):
        _ = there * here
    with pytest.raises(TypeError, match="copy it to host memory"):
        there.numpy()
    assert not paper_gpu.waits
    assert (there * 2.0 + here.to("cuda", non_blocking=True)).sum().item() == 12
    assert there.cpu().numpy().sum() == 4
    assert sorted(what for what, _ in paper_gpu.waits) == ["aten::_local_scalar_dense", "copy to host memory"]


WAITS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(HIDDEN_METRICS, (8, 2)),
    "magnitude": (5, 0),
    "taylor": (8, 1),
    **dict.fromkeys(("single_drop_perplexity", "present_absent"), (26, 1)),
    "local_shapley": (29, 4),
    "sleb": (27, 2),
    "blockpruner": (85, 4),
    "task_greedy": (4, 0),
}
"""How often the host may wait for a metric: once, what is proven of the model included, and in every batch: for its
losses or sums, however many layers and variants there are. Greedy orders and walks do so for each of their steps."""
TOGETHER = "all of hidden states"


@pytest.mark.slow
@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.prove] * (name == "local_shapley")) for name in (*METRICS, TOGETHER)]
)
def test_a_metric_is_that_of_a_cpu_and_waits_no_more_than_it_may(name: str, paper_gpu: PaperGpu) -> None:
    names = list(HIDDEN_METRICS) if name == TOGETHER else [name]
    once, each_batch = (20, 5) if name == TOGETHER else WAITS[name]
    measured, waits = [], []
    for place, batch_size in (("cpu", 4), ("cuda", 4), ("cuda", 2)):
        model = tiny_model("qwen3", dtype=torch.bfloat16)
        model.to(torch.device(place))  # pyright: ignore[reportArgumentType]
        paper_gpu.waits.clear()
        found = measure_importance(model, rows(), metrics=names, batch_size=batch_size, num_drop=2)
        measured.append(replace(found, provenance=Provenance({})).body() | {"provenance": {}})
        waits.append(paper_gpu.waited)
    assert measured[1] == measured[0]
    assert waits[0] == 0 < waits[1] <= once + 2 * each_batch, f"{paper_gpu.waits}"
    assert waits[2] - waits[1] <= 2 * each_batch, f"{paper_gpu.waits}"


PROMPTS = [(5, 9, 7, 11), (5, 9, 8), (30,)]
PAIRS = [(PROMPTS[0], (4, 8)), (PROMPTS[0], (12,)), (PROMPTS[1], (40, 41, 42))]


def sampled(model: Any) -> Any:
    uniforms = torch.rand(3, 6, generator=torch.Generator().manual_seed(0))
    return sample(model, PROMPTS, uniforms, temperature=1.0, end_ids=(2,), pad_id=0)


def recorded(model: Any) -> Any:
    layout = Layout(64, 8, VOCAB_SIZE, 32, states=(1,), prefix=2)
    return _record_shard(model, rows(), range(8), temperature=1.0, layout=layout, tell=lambda done: None)


def compensated(model: Any) -> Any:
    found = compensate(Source(model), (2,), Compensate(method="both"), Calibration(rows(), 4))
    return [gap.error_after for gap in found.gaps], {n: t.cpu() for of in found.layers.values() for n, t in of.items()}


def narrowed(model: Any) -> Any:
    own = sizes_of(Path("tiny"), model.config, kept_width(model.config, Width(intermediate_size=32)))
    return measure_width(Source(model), own, (2,), Calibration(rows(), 4))


def edited(part: str) -> Callable[[Any], Any]:
    def scores(model: Any) -> Any:
        variants = [INTACT, *(variant_of(component, model) for component in components_of(part, model)[:3])]
        donor: Any = tiny_model("qwen3", seed=1)
        edited = WithDonor(model, donor.to(model.device)) if part == "donor" else Edited(model)
        return score_variants(edited, Decoder(model), PAIRS, variants, batch_size=2)

    return scores


def varied(model: Any) -> Any:
    prompts, limits = [[*range(40, 52), *prompt] for prompt in PROMPTS], Limits(5, lambda text: False)
    variants = [without([1]), without([2, 3]), variant_of(components_of("mlp", model)[1], model)]
    return generate_variants(Edited(model), Decoder(model), prompts, variants, limits, batch_size=3)


WHOLE = ("layer", "skip_prompt", "skip_written", "donor")
"""Parts that take no proof of where a layer's halves and heads are."""
STAGES: dict[str, tuple[Callable[[Any], Any], int]] = {
    "likelihoods": (lambda model: score(Decoder(model), PAIRS, batch_size=2), 3 + 2 * 1),
    "greedy texts": (
        lambda m: write_after(Decoder(m), PROMPTS, max_new_tokens=6, is_finished=lambda t: False),
        4 + 6 * 2,
    ),
    "variants' texts": (varied, 79 + 3 + 4 * 2),
    "on-policy samples": (sampled, 3 + 6 * 3),
    "recording": (recorded, 1 * (3 + 2)),
    "compensation": (compensated, 147),
    "width": (narrowed, 56),
    **{f"edit: {part}": (edited(part), (23 if part in WHOLE else 77) + 2 * 1) for part in EDITS},
}
"""What a stage computes, and how often the host may wait: for its checks of a model once, then once for every batch of
likelihoods, whatever the number of variants, and for each one's first tokens; twice for a token that is written (the
token, and whether the mask hides something), three times in transformers' own loop; in a batch that is recorded for
each kind of number and each state; three times in transformers' forward of an image."""


@pytest.mark.slow
@pytest.mark.sample(4)
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_gives_what_it_gives_on_a_cpu_and_waits_no_more_than_it_may(
    name: str, paper_gpu: PaperGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.compress.changes.fit.TOKENS_PER_FEATURE", 1)
    compute, most_waits = STAGES[name]
    found = []
    for place in ("cpu", "cuda"):
        model: Any = tiny_model("qwen3").eval()
        model.to(torch.device(place))
        paper_gpu.waits.clear()
        found.append(compute(model))
    torch.testing.assert_close(found[1], found[0])
    assert 0 < paper_gpu.waited <= most_waits, f"{paper_gpu.waits}"


TRAININGS: dict[str, dict[str, Any]] = {
    "forward_kl": {"losses": "forward_kl"},
    "checkpointing": {"losses": "forward_kl"},
    "all terms": {"losses": [{"kind": kind} for kind in KINDS]},
    "shared prefix": {"losses": "forward_kl", "trainable": "from_first_cut"},
    "near gaps": {"losses": "forward_kl", "trainable": "near_gaps"},
    "cross_entropy": {"losses": "cross_entropy"},
    "lora": {"losses": "forward_kl", "lora": {"r": 4}},
}
REPEATED = "all terms"
"""The training that runs as with `trainer.full_determinism`, in which a GPU refuses cumulative sums."""


@pytest.mark.slow
@pytest.mark.sample(3)
@pytest.mark.parametrize("name", TRAININGS)
def test_a_micro_batch_of_training_waits_for_nothing_and_can_be_repeated(
    name: str, paper_gpu: PaperGpu, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.train.teacher.wiring.CHUNK", 32)
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    torch.use_deterministic_algorithms(name == REPEATED)
    with pytest.raises(RuntimeError, match="deterministic") if name == REPEATED else nullcontext():
        torch.ones(2, 2, device="cuda").cumsum(1)
    teacher = tiny_model("qwen3", dtype=torch.bfloat16)
    student = cut_model(teacher, (2, 4)).float()
    settings = {"sequence_length": 64, "precision": "bf16-mixed", **TRAININGS[name]}
    section = replace(checked(Distill, settings, source="test"), deepspeed=None, watch=None)
    spec = _spec(student, teacher, section, (2, 4))
    make_trainable(student, spec, seed=0)
    for model in (teacher.requires_grad_(False), student.train()):
        model.to(GPU)  # pyright: ignore[reportArgumentType]
    if name == "checkpointing":
        student.gradient_checkpointing_enable({"use_reentrant": False})
    wiring = wire(spec, student, teacher if spec.runs_teacher else None)
    wiring.objective.install()
    packed = rows()
    for step in range(2):
        host = stacked([packed[row] for row in (2 * step, 2 * step + 1)])
        batch = {
            key: value.to(GPU, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for key, value in host.items()
        }
        paper_gpu.waits.clear()
        with ExitStack() as stack:
            stack.enter_context(documents_known(on_host(batch).position_ids_BS, GPU))
            signals = wiring.teacher(batch)
            if wiring.prefix is not None:
                stack.enter_context(wiring.prefix.replaying(torch.float32))
            stack.enter_context(torch.autocast("cuda", torch.bfloat16))
            loss, _ = student(
                **{plane: batch[plane] for plane in INPUTS}, signals=signals, on_host=on_host(batch), images=None
            )
        loss.backward()
        assert not paper_gpu.waits
    gradients = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    assert gradients
    assert all(map(paper_gpu.holds, gradients))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "most_waits"), [("llava", 2 * 4), ("qwen2_5_vl", 2 * 35)])
def test_a_micro_batch_of_images_gives_what_it_gives_on_a_cpu(
    name: str, most_waits: int, paper_gpu: PaperGpu, tmp_path: Path
) -> None:
    """All waits are transformers' own: it counts the tokens of images, and takes their grids apart on the host."""
    processor, teacher = image_model(name)
    columns = ImageQuestion(prompt="prompt", completion="answer", image="image")
    source = TrainingSource(str(image_rows(tmp_path / "rows")), column=columns)
    reader = ImageReader(processor, teacher.config, training_images([source]))
    (tmp_path / "packed").mkdir()
    size: Any = {"sequence_length": 96, "num_tokens": 2 * 96, "seed": 0}
    packing = Packing(tmp_path / "packed", encode_image=reader.tokens, rows_per_step=2)
    whole = pack([(source, reader.rows[source])], processor.tokenizer, **size, layout=packing)
    images = RowsWithImages.of(whole, reader)
    found: list[Any] = []
    for place in ("cpu", "cuda"):
        device, student = torch.device(place), cut_model(teacher, (2, 3))
        for model in (teacher, student.train()):
            model.to(device)  # pyright: ignore[reportArgumentType]
        objective = Objective(student, to_logits(teacher), terms=(ForwardKL(), CrossEntropy(weight=0.5)), chunk=32)
        objective.install()
        host = stacked([images[row] for row in range(2)])
        batch = send_to_device(host, device, non_blocking=True)
        paper_gpu.waits.clear()
        signals = LiveTeacher(teacher, reads_logits=True, states=None, prefix=None)(batch)
        planes = {plane: batch[plane] for plane in INPUTS}
        loss, _ = student(**planes, signals=signals, on_host=on_host(batch), images=batch[IMAGES])
        loss.backward()
        found.append({name: own.grad.cpu() for name, own in student.named_parameters() if own.grad is not None})
    torch.testing.assert_close(found[1], found[0])
    assert 0 < paper_gpu.waited <= most_waits, f"{paper_gpu.waits}"
