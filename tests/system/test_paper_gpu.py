"""What computes on a GPU mixes no devices there and gives what a CPU gives: shown on a GPU of paper.

Out of its reach:
- `adaptive_kl`, which asks the device how many words a head holds;
- fixed rows and CUDA graphs, which want a stream: tests/shoal/inference/test_fixed_rows.py replays recorded operations;
- flash, varlen, Liger and 4-bit weights, whose kernels refuse host memory;
- torch.compile, which writes code for the device that tensors have;
- DeepSpeed and NCCL, which ask torch.cuda; ranks run on gloo in their own tests;
- donors of a sweep, whose layers come from files, and images.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
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
from shoal.compress.metrics.metric import Calibration
from shoal.compress.metrics.registry import METRICS
from shoal.compress.surgery.cut_model import cut_model
from shoal.compress.surgery.narrow_config import kept_width
from shoal.compress.variants.variants import INTACT, Edited, score_variants, variant_of
from shoal.data.packing import PackedRows
from shoal.inference.decoder import Decoder
from shoal.inference.generation import sample, write_after
from shoal.inference.scoring import score
from shoal.recipe.distill import Distill
from shoal.recipe.losses import LOGIT_TERMS, HiddenStates
from shoal.recipe.messages import checked
from shoal.recipe.prune import Compensate, Width
from shoal.train.distillation_trainer import _spec
from shoal.train.objective.host_batch import documents_known, on_host, stacked
from shoal.train.record import _record_shard
from shoal.train.teacher.recording import Layout
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


@pytest.mark.slow
@pytest.mark.sample(3)
@pytest.mark.usefixtures("paper_gpu")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.prove] * (name == "local_shapley")) for name in METRICS]
)
def test_a_metric_is_that_of_a_cpu(name: str) -> None:
    measured = []
    for place in ("cuda", "cpu"):
        model = tiny_model("qwen3", dtype=torch.bfloat16)
        model.to(torch.device(place))  # pyright: ignore[reportArgumentType]
        measured.append(measure_importance(model, rows(), metrics=[name], batch_size=4, num_drop=2))
    here, there = (replace(found, provenance=Provenance({})) for found in measured)
    assert here.body() | {"provenance": {}} == there.body() | {"provenance": {}}


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
        return score_variants(Edited(model), Decoder(model), PAIRS, variants, batch_size=2)

    return scores


STAGES: dict[str, tuple[Callable[[Any], Any], int]] = {
    "likelihoods": (lambda model: score(Decoder(model), PAIRS, batch_size=2), 72),
    "greedy texts": (lambda m: write_after(Decoder(m), PROMPTS, max_new_tokens=6, is_finished=lambda t: False), 34),
    "on-policy samples": (sampled, 35),
    "recording": (recorded, 7),
    "compensation": (compensated, 157),
    "width": (narrowed, 58),
    **{f"edit: {part}": (edited(part), 178) for part in EDITS if part != "donor"},
}
"""What a stage computes, and how often the host may wait: its checks of a model once, and every batch."""


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
    assert 0 < paper_gpu.waits.total() <= most_waits, paper_gpu.waits


TRAININGS: dict[str, dict[str, Any]] = {
    "forward_kl": {"losses": "forward_kl"},
    "checkpointing": {"losses": "forward_kl"},
    "all terms": {"losses": [{"kind": kind} for kind in KINDS if kind != "adaptive_kl"]},
    "shared prefix": {"losses": "forward_kl", "trainable": "from_first_cut"},
    "near gaps": {"losses": "forward_kl", "trainable": "near_gaps"},
    "cross_entropy": {"losses": "cross_entropy"},
    "lora": {"losses": "forward_kl", "lora": {"r": 4}},
}


@pytest.mark.slow
@pytest.mark.sample(3)
@pytest.mark.parametrize("name", TRAININGS)
def test_a_micro_batch_of_training_waits_for_nothing(
    name: str, paper_gpu: PaperGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.train.teacher.wiring.CHUNK", 32)
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
            stack.enter_context(documents_known(on_host(batch), GPU))
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
