"""Operations of a token, and steps that are tried to time them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from jobs import LENGTH, dropping, spec_of
from tiny import NUM_LAYERS, VOCAB_SIZE

from shoal.recipe.distill import Distill
from shoal.train.preflight import throughput
from shoal.train.preflight.memory import Job, job
from shoal.train.preflight.throughput import flops_per_token


def flops(job: Job, **changes: Any) -> float:
    return flops_per_token(replace(job, setting=replace(job.setting, **changes)))


def test_operations_per_token_follow_from_weights_and_length(tiny_job: Job) -> None:
    matrix = 4 * 32 * 32 - 2 * 32 * 16 + 3 * 32 * 48
    layer, head = 2 * matrix + 4 * 32 * LENGTH, 2 * 32 * VOCAB_SIZE
    expected = (3 * 4 + NUM_LAYERS) * layer + 4 * head
    for checkpointing, extra in ((False, 0), (True, 4 * layer)):
        assert flops(tiny_job, checkpointing=checkpointing) == expected + extra
    assert flops(tiny_job, teacher="recorded") == 3 * (4 * layer + head)


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "num_tokens"), [(1e9, 32), (4.0, 24), (1e-9, 16)])
def test_a_slow_machine_tries_a_piece_of_a_micro_batch(
    monkeypatch: pytest.MonkeyPatch, rate: float, num_tokens: int
) -> None:
    monkeypatch.setattr(throughput, "flops_per_second", lambda *_: rate)
    monkeypatch.setattr(throughput, "flops_per_token", lambda _: 1)
    wired, wire = list[Any](), throughput.wire
    monkeypatch.setattr(throughput, "wire", lambda *given: wired.append(wire(*given)) or wired[-1])
    settings = Distill(sequence_length=32, trainer={"per_device_train_batch_size": 1})
    spec = spec_of(settings, dropping(2), student_layers=NUM_LAYERS - 1)
    found = throughput.probe(job(spec))
    assert found.num_tokens == num_tokens
    assert found.tokens_per_s > 0
    assert found.optimizer_s > 0
    assert "forward" not in vars(wired[0].objective.student), "models are themselves again"
