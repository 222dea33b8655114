"""A training step that is not sound ends the training, and its batch can be looked at."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import as_rank
from safetensors.torch import load_file

from shoal.train.curves import REMEMBERED_STEPS, LossGuard, judged_norm, refuse_step
from shoal.train.trainer import DistillTrainer


def problems(guard: LossGuard, losses: list[float]) -> list[str | None]:
    return [guard.problem({"loss": loss}) for loss in losses]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_named_whichever_term_it_is(value):
    assert LossGuard(None).problem({"loss": 1.0, "reverse_kl": value}) == f"reverse_kl is {value}"


@pytest.mark.parametrize(
    ("float16", "overflow", "norm"), [(True, True, None), (True, False, math.inf), (False, True, math.inf)]
)
def test_a_step_that_float16_skips_to_find_its_scale_has_no_norm_to_judge(float16, overflow, norm):
    trainer: Any = SimpleNamespace(is_deepspeed_enabled=True)
    engine: Any = SimpleNamespace(
        fp16_enabled=lambda: float16,
        optimizer=SimpleNamespace(overflow=overflow),
        get_global_grad_norm=lambda: math.inf,
        torch_autocast_z0_gradscaler=torch.amp.GradScaler("cpu"),
    )
    DistillTrainer._get_grad_norm(trainer, engine)
    assert trainer._gradient_norm == norm
    assert trainer._scaler is engine.torch_autocast_z0_gradscaler


@pytest.mark.parametrize(
    ("norm", "scale", "judged"),
    [
        (2.0, None, 2.0),
        (math.inf, None, math.nan),
        (-1.0, None, math.nan),
        (2.0, 2.0**16, 2.0),
        (math.inf, 2.0**15, None),
        (math.nan, 1.0, None),
        (math.inf, 0.5, math.nan),
    ],
)
def test_a_norm_that_is_no_number_ends_the_training_unless_a_scale_is_being_found(norm, scale, judged):
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    assert judged_norm(norm, scaler) == (judged if judged is None else pytest.approx(judged, nan_ok=True))


def test_a_spike_is_measured_against_the_median_of_the_steps_before():
    guard = LossGuard(3.0)
    problems(guard, [1.0] * 20)
    assert guard.problem({"loss": 2.9}) is None
    told = guard.problem({"loss": 3.1})
    assert told is not None
    assert "3.1, more than distill.stop_on_spike (3) times 1, the median of the 21 steps before" in told


def test_the_first_steps_and_a_guard_that_is_off_say_nothing():
    few = REMEMBERED_STEPS // 2
    assert problems(LossGuard(2.0), [1.0] * (few - 1) + [1.9]) == [None] * few
    assert problems(LossGuard(None), [1.0] * 50 + [1e9]) == [None] * 51


def test_the_batch_of_a_refused_step_is_kept_by_rank(tmp_path, monkeypatch):
    batches = [{"input_ids": torch.arange(10).view(2, 5) + number, "row": 3} for number in range(2)]
    for name, value in as_rank(1, 2).items():
        monkeypatch.setenv(name, value)
    told = str(refuse_step("loss is nan", 7, batches, tmp_path))
    assert "step 7: loss is nan" in told
    assert str(tmp_path / "step-7") in told
    kept = load_file(tmp_path / "step-7" / "rank-1.safetensors")
    assert sorted(kept) == ["0.input_ids", "1.input_ids"]
    assert torch.equal(kept["1.input_ids"], batches[1]["input_ids"])


def test_a_training_that_diverges_from_its_first_step_on_is_told_by_the_loss_before_it():
    guard = LossGuard(10.0)
    assert problems(guard, [0.23, 3.1, 9.9]) == [None] * 3, "a batch of another source"
    told = guard.problem({"loss": 40.0})
    assert told == "the loss is 40, more than distill.stop_on_spike (10) times 1, and was 0.23 before training"
    guard = LossGuard(10.0)
    assert problems(guard, [2.0, 19.0]) == [None] * 2
    assert "times 2, and was 2 before training" in str(guard.problem({"loss": 21.0}))
