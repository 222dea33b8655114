"""Operations of a token, and the time of a step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from jobs import LENGTH, dropping, spec_of
from tiny import NUM_LAYERS, VOCAB_SIZE

from shoal import machine
from shoal.recipe.distill import Distill
from shoal.train.preflight.memory import Job, Setting
from shoal.train.preflight.throughput import expected, flops_per_token, mfu_per_rate
from shoal.train.student.sizes import Kept, LayerSize, ModelSize
from shoal.train.student.spec import Ranks


def flops(job: Job, **changes: Any) -> float:
    return flops_per_token(replace(job, setting=replace(job.setting, **changes)))


def test_operations_per_token_follow_from_weights_and_length(tiny_job: Job) -> None:
    matrix = 4 * 32 * 32 - 2 * 32 * 16 + 3 * 32 * 48
    layer, head = 2 * matrix + 4 * 32 * LENGTH, 2 * 32 * VOCAB_SIZE
    expected = (3 * 4 + NUM_LAYERS) * layer + 4 * head
    for checkpointing, extra in ((False, 0), (True, 4 * layer)):
        assert flops(tiny_job, checkpointing=checkpointing) == expected + extra
    assert flops(tiny_job, teacher="recorded") == 3 * (4 * layer + head)


def eight_billion(*, ranks: int, attention: str, fused: bool, trained: int = 28, stage: int = 3, rows: int = 4) -> Job:
    """Qwen3-8B, 28 of 36 layers, ``trained`` of them from the top, and head; rows of 4,096 tokens, checkpointing."""
    settings = Distill(
        sequence_length=4096,
        precision="bf16-mixed",
        deepspeed=f"zero{stage}",
        trainer={"per_device_train_batch_size": rows, "use_liger_kernel": fused},
    )
    devices = Ranks(ranks, ranks, torch.device("cuda"))
    spec = spec_of(settings, dropping(2), student_layers=NUM_LAYERS - 1, ranks=devices, dtype="bfloat16")
    load = replace(spec.student.load, attention=attention)
    spec = replace(spec, student=replace(spec.student, load=load), shared_layers=28 - trained)
    matrices, head = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 12_288, 151_936 * 4096
    moving = LayerSize(matrices, matrices, matrices, matrices, kept=Kept(per_row=1))
    still = LayerSize(matrices, 0, matrices)

    def model(layers: tuple[LayerSize, ...], width: int) -> ModelSize:
        count, learnt = 2 * head + len(layers) * matrices, sum(layer.trained for layer in layers)
        whole = trained == 28 and width == 4
        return ModelSize(count, learnt + 2 * head * whole, layers, head, whole, 151_936, 4096, width, 4 * 4096)

    setting = Setting(rows, 4, True, stage, False, False, "live")
    return Job(spec, model((still,) * (28 - trained) + (moving,) * trained, 4), model((still,) * 36, 2), setting)


NAMES = {"h100": "NVIDIA H100 80GB HBM3", "slice": "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "other": "GPU of paper"}


@pytest.mark.parametrize(
    ("changes", "tokens_per_s"),
    [
        ({"ranks": 8, "attention": "sdpa", "fused": False}, 28_000),
        ({"ranks": 8, "attention": "flash", "fused": True}, 50_000),
        ({"ranks": 1, "attention": "sdpa", "fused": False, "trained": 10, "stage": 0, "rows": 1}, 7_200),
        ({"ranks": 1, "attention": "flash", "fused": True, "trained": 10, "stage": 0, "rows": 1}, 11_700),
    ],
)
def test_a_step_on_h100s_takes_what_products_attention_and_memory_take(
    changes: dict[str, Any], tokens_per_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table that was worked out by hand for 8 billion weights, within a tenth."""
    monkeypatch.setattr(machine, "device_name", lambda _: NAMES["h100"])
    given = eight_billion(**changes)
    found = expected(given)
    assert found is not None
    tokens = changes["ranks"] * given.setting.rows * given.setting.accumulation * 4096
    assert tokens / found[0] == pytest.approx(tokens_per_s, rel=0.09)
    assert "computed from H100's data sheet (989 TFLOP/s, 3.35 TB/s)" in found[1]


def test_between_nodes_the_network_may_take_longer_than_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "device_name", lambda _: NAMES["h100"])
    one = eight_billion(ranks=16, attention="flash", fused=True, rows=1)
    two = replace(one, spec=replace(one.spec, ranks=replace(one.spec.ranks, per_node=8)))
    near, far = (expected(each) for each in (one, two))
    assert near is not None
    assert far is not None
    sent = 2 * (2 * one.student.parameters + one.student.trained) + 2 * one.teacher.parameters  # a micro-batch
    assert near[0] < far[0] == pytest.approx(one.setting.accumulation * sent / (0.8 * 50e9), rel=0.01)


def test_mfu_counts_no_recomputation_and_needs_a_data_sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    given = eight_billion(ranks=8, attention="flash", fused=False)
    for name, is_known in ((NAMES["h100"], True), (NAMES["slice"], False), (NAMES["other"], False)):
        monkeypatch.setattr(machine, "device_name", lambda _, name=name: name)
        assert (mfu_per_rate(given) is not None, expected(given) is not None) == (is_known, is_known)
    monkeypatch.setattr(machine, "device_name", lambda _: NAMES["h100"])
    assert mfu_per_rate(given) == flops(given, checkpointing=False) / (8 * 989e12)
    assert flops(given, checkpointing=False) < flops_per_token(given)
