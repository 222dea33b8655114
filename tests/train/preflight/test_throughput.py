"""Operations of a token, and steps that are tried to time them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from jobs import LENGTH, dropping, job_of, spec_of
from tiny import NUM_LAYERS, VOCAB_SIZE

from shoal.recipe.distill import Distill, OnPolicy, Teacher, TrainingSource
from shoal.recipe.losses import CrossEntropy, ForwardKL
from shoal.train.dry_run import _about
from shoal.train.preflight import throughput
from shoal.train.preflight.run_size import Job, job
from shoal.train.preflight.throughput import flops_per_token
from shoal.train.teacher import signals


def test_operations_per_token_follow_from_weights_and_length(tiny_job: Job) -> None:
    matrix = 4 * 32 * 32 - 2 * 32 * 16 + 3 * 32 * 48
    layer, head = 2 * matrix + 4 * 32 * LENGTH, 2 * 32 * VOCAB_SIZE
    expected = (3 * 4 + NUM_LAYERS) * layer + 4 * head
    for checkpointing, extra in ((False, 0), (True, 4 * layer)):
        setting = replace(tiny_job.setting, checkpointing=checkpointing)
        assert flops_per_token(tiny_job.student, tiny_job.teacher, setting, shared=False) == expected + extra
    recorded = replace(tiny_job.setting, teacher="recorded")
    found = flops_per_token(tiny_job.student, tiny_job.teacher, recorded, shared=False)
    assert found == 3 * (4 * layer + head)


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["all", "from_first_cut"])
def test_a_teacher_that_is_asked_of_a_part_of_the_rows_costs_that_part(trainable: Any) -> None:
    sources = (TrainingSource("docstrings", weight=3, losses=("forward_kl",)), TrainingSource("instructions", weight=5))
    only_text = replace(sources[1], losses=("cross_entropy",))
    found = [
        job_of(trainable=trainable, data=data, losses=(ForwardKL(), CrossEntropy()))
        for data in (sources, (sources[0], only_text))
    ]
    assert [each.setting.asked for each in found] == [1, 3 / 8]
    told = [[note for note in _about(each) if "the teacher reads 38% of the rows" in note] for each in found]
    assert list(map(len, told)) == [0, 1]
    sampled = job_of(data=(sources[0], only_text), losses=(ForwardKL(), CrossEntropy()), on_policy=OnPolicy(share=0.5))
    assert sampled.setting.asked == (1 + 3 / 8) / 2
    offloaded = job_of(
        data=(sources[0], only_text), losses=(ForwardKL(), CrossEntropy()), teacher=Teacher(offload=True)
    )
    assert offloaded.setting.asked == 1
    layer, head = 2 * (4 * 32 * 32 - 2 * 32 * 16 + 3 * 32 * 48) + 4 * 32 * LENGTH, 2 * 32 * VOCAB_SIZE
    above = NUM_LAYERS - (2 if trainable == "from_first_cut" else 0)
    assert found[0].flops_per_token - found[1].flops_per_token == 5 / 8 * (above * layer + head)


@pytest.mark.slow
def test_the_probe_has_the_teacher_read_as_many_rows_as_training_has(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [TrainingSource("docstrings", losses=("forward_kl",)), TrainingSource("x", losses=("cross_entropy",))]
    settings = Distill(
        data=tuple(sources),
        losses=(ForwardKL(), CrossEntropy()),
        sequence_length=16,
        trainer={"per_device_train_batch_size": 4},
    )
    spec, seen = spec_of(settings, dropping(2), student_layers=NUM_LAYERS - 1), list[tuple[int, ...]]()
    read = signals.LiveTeacher._hidden
    monkeypatch.setattr(
        signals.LiveTeacher,
        "_hidden",
        lambda teacher, batch, rows: seen.append(tuple(rows)) or read(teacher, batch, rows),
    )
    throughput.probe(spec, job(spec).setting, flops=1)
    assert (0, 1) in seen


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "num_tokens"), [(1e9, 32), (4.0, 24), (1e-9, 16)])
def test_a_slow_machine_tries_a_piece_of_a_micro_batch(
    monkeypatch: pytest.MonkeyPatch, rate: float, num_tokens: int
) -> None:
    monkeypatch.setattr(throughput, "flops_per_second", lambda *_: rate)
    wired, wire = list[Any](), throughput.wire
    monkeypatch.setattr(throughput, "wire", lambda *given: wired.append(wire(*given)) or wired[-1])
    settings = Distill(sequence_length=32, trainer={"per_device_train_batch_size": 1})
    spec = spec_of(settings, dropping(2), student_layers=NUM_LAYERS - 1)
    found = throughput.probe(spec, job(spec).setting, flops=1)
    assert found.num_tokens == num_tokens
    assert found.tokens_per_s > 0
    assert found.optimizer_s > 0
    assert "forward" not in vars(wired[0].objective.student), "models are themselves again"
