"""What computes on a GPU mixes no devices there and gives what a CPU gives: shown on a GPU of paper.

Not shown so is `adaptive_kl`, which asks the device how many words a head holds.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from paper_gpu import GPU, MixedDevices, PaperGpu, paper_gpu
from tiny import tiny_model

from shoal.artifacts.artifact import Provenance
from shoal.compress.measure import measure_importance
from shoal.compress.metrics.registry import METRICS
from shoal.compress.surgery.cut_model import cut_model
from shoal.data.packing import PackedRows
from shoal.recipe.distill import Distill
from shoal.recipe.losses import LOGIT_TERMS, HiddenStates
from shoal.recipe.messages import checked
from shoal.train.distillation_trainer import _spec
from shoal.train.objective.host_batch import documents_known, on_host, stacked
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
