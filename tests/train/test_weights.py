"""Student weights held in bfloat16, with the float32 copies that DeepSpeed steps, beside float32 under autocast.

Covers: shoal.train.engine.arguments.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import BATCH, LENGTH, STEPS, Trial, finished, recipe, run, unfinished

from shoal.recipe.distill import Distill
from shoal.train.engine.arguments import deepspeed_config

SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 2}
BFLOAT16: dict[str, Any] = {"precision": "bf16-true", "trainer": SAVED}


def trained(folder: Path, teacher: Path, cut: Path, *overrides: str, ranks: int = 1, **settings: Any) -> Trial:
    return finished(run(recipe(folder, teacher, cut, **{"precision": "auto", **settings}), *overrides, ranks=ranks))


@pytest.fixture(scope="module")
def autocast(tmp_path_factory: pytest.TempPathFactory, teacher: Path, cut: Path) -> Trial:
    """Float32 weights under autocast to bfloat16."""
    return trained(tmp_path_factory.mktemp("autocast"), teacher, cut, precision="bf16-mixed")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, teacher: Path, cut: Path) -> Trial:
    """Bfloat16 weights under ZeRO 1 on one rank, never interrupted."""
    return trained(tmp_path_factory.mktemp("whole"), teacher, cut, **BFLOAT16, deepspeed="zero1")


@pytest.mark.slow
@pytest.mark.sample(3)
@pytest.mark.parametrize(("stage", "ranks", "rows"), [(1, 1, 4), (2, 2, 1), (3, 2, 2)])
def test_bfloat16_weights_keep_near_autocast_at_every_stage_and_split(
    autocast: Trial, whole: Trial, teacher: Path, cut: Path, tmp_path: Path, stage: int, ranks: int, rows: int
) -> None:
    trial = whole
    if ranks > 1:
        sharded = {"deepspeed": f"zero{stage}", "trainer": {"per_device_train_batch_size": rows}}
        trial = trained(tmp_path, teacher, cut, precision="bf16-true", **sharded, ranks=ranks)
    assert trial.curve() == pytest.approx(autocast.curve(), abs=1e-2)
    assert trial.curve() != pytest.approx(autocast.curve(), abs=1e-6)
    inputs = trial.training.provenance.inputs
    assert inputs["distill.precision"] == "bf16-true"
    assert inputs["distill.deepspeed"]["bf16"]["enabled"]


@pytest.mark.slow
@pytest.mark.sample(3)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_training_in_bfloat16_weights_goes_on_bit_for_bit(
    whole: Trial, teacher: Path, cut: Path, tmp_path: Path, stage: int
) -> None:
    if stage > 1:
        whole = trained(tmp_path / "whole", teacher, cut, **BFLOAT16, deepspeed=f"zero{stage}")
    on = finished(run(unfinished(whole, tmp_path / "on", step=4)))
    assert "resuming from" in on.log
    assert on.curve() == whole.curve()
    for name, weight in whole.weights().items():
        assert torch.equal(weight, on.weights()[name]), name


@pytest.mark.slow
def test_small_steps_are_not_lost_in_the_rounding_of_weights(teacher: Path, cut: Path, tmp_path: Path) -> None:
    """Of a weight of 0.02 a step of 1e-6 is a sixtieth of what bfloat16 can tell: without copies nothing would move."""
    trainer = {"learning_rate": 4e-6, "warmup_steps": 0, "lr_scheduler_type": "constant"}
    trial = trained(
        tmp_path,
        teacher,
        cut,
        precision="bf16-true",
        deepspeed="zero1",
        num_tokens=4 * STEPS * BATCH * LENGTH,
        trainer=trainer,
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    moved = trial.weights()[name].bfloat16() != trial.weights("student")[name].bfloat16()
    assert 0.04 < moved.float().mean() < 0.9


@pytest.mark.parametrize("precision", ["auto", "bf16-true"])
def test_what_file_and_recipe_both_say_is_one_thing(precision: Any) -> None:
    config = {"zero_optimization": {"stage": 1}}
    said = deepspeed_config(Distill(precision=precision, deepspeed=config | {"bf16": {"enabled": True}}))
    assert said == deepspeed_config(Distill(precision="bf16-true", deepspeed=config))
