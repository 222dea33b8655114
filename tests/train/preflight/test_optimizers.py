"""What an optimizer keeps of every weight, and that the recipe's is the one that is timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from jobs import job_of

from shoal.recipe.distill import Distill
from shoal.train.engine.arguments import DeepSpeed, deepspeed_config
from shoal.train.preflight.fit import disk_bytes
from shoal.train.preflight.optimizers import timed_optimizer


def moments(stage: int, name: str, options: str | None = None) -> float:
    """Bytes of a trained weight, over all ranks and without the copies that ZeRO steps."""
    found = job_of(deepspeed=f"deepspeed/zero{stage}.json", trainer={"optim": name, "optim_args": options})
    shards, trained = (4 if stage else 1), found.student.trained
    return (shards * found.memory.optimizer - 4 * trained * (stage > 0)) / trained


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected", "under_zero"),
    [
        ("adamw_torch", 8, 8),
        ("adamw_bnb_8bit", 2 + 8 / 256, 2 + 8 / 256),
        ("adafactor", 0, 4),  # rows and columns of matrices only, but ZeRO's pieces are flat
        ("adamw_torch_4bit", 1 + 8 / 128, 1 + 8 / 128),
        ("lion_32bit", 4, 4),
        ("ademamix_8bit", 3 + 12 / 256, 3 + 12 / 256),
        ("sgd", 0, 0),
    ],
)
def test_moments_are_those_of_the_optimizer_that_the_recipe_names(
    name: str, expected: float, under_zero: float
) -> None:
    assert moments(0, name) == pytest.approx(expected, rel=1e-3)
    assert moments(2, name) == pytest.approx(under_zero, rel=1e-3, abs=1e-3)
    found = job_of(trainer={"optim": name})
    weights = 4 * found.student.parameters
    assert disk_bytes(found)["checkpoints"] == 3 * (weights + found.memory.optimizer)


@pytest.mark.slow
def test_options_and_the_deepspeed_entry_decide_about_moments_and_an_unknown_optimizer_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert moments(0, "sgd", "momentum=0.9") == 4
    entry = {"optimizer": {"type": "Lion", "params": None}, "zero_optimization": {"stage": 0}}
    found = job_of(deepspeed=entry, trainer={"optim": "adamw_torch"})
    assert found.memory.optimizer == 4 * found.student.trained
    assert "distill.trainer.optim: adamw_torch has no effect, the DeepSpeed configuration names Lion" in caplog.text
    caplog.clear()
    paged = job_of(trainer={"optim": "paged_adamw_32bit"}).memory
    assert (paged.optimizer, paged.host) == (0, 2 * 8 * found.student.trained)  # of two ranks on a node
    assert not caplog.text
    assert moments(0, "grokadamw") == 8
    unknown = "optimizer grokadamw: what its state takes is not known; AdamW's 8 bytes a trained weight"
    assert caplog.text.count(unknown) == 1


def test_the_optimizer_that_is_timed_is_the_recipes(caplog: pytest.LogCaptureFixture) -> None:
    weights = [torch.nn.Parameter(torch.ones(4, 4))]

    def timed(name: str, entry: dict[str, Any] | None = None) -> str:
        settings = Distill(trainer={"optim": name}, deepspeed=entry and {"optimizer": entry})
        optimizer = timed_optimizer(weights, settings, DeepSpeed(deepspeed_config(settings)))
        weights[0].grad = torch.ones(4, 4)
        optimizer.step()
        return type(optimizer).__name__

    assert [timed(name) for name in ("adamw_torch", "adafactor", "sgd")] == ["AdamW", "Adafactor", "SGD"]
    assert timed("sgd", {"type": "Adagrad", "params": {"lr": 1e-3}}) == "Adagrad"
    assert not caplog.text
    assert (timed("paged_adamw_8bit"), timed("sgd", {"type": "MuAdam"})) == ("AdamW", "AdamW")
    assert "optimizer paged_adamw_8bit: AdamW is timed in its place" in caplog.text
    assert "optimizer muadam: AdamW is timed in its place (is DeepSpeed's own)" in caplog.text
