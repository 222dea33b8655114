"""What identifies a training and its checkpoints. The Trainer is not loaded, which takes a second: reports ask too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal.data.image_rows import images_fingerprint
from shoal.data.sources import sources_fingerprint
from shoal.recipe.distill import Distill
from shoal.recipe.section import Shapes, shaping
from shoal.recipe.trainer_arguments import BATCH_SPLIT, NEUTRAL

from .dataset import sources_apart
from .engine.arguments import deepspeed_config, rows_per_step


def distill_inputs(
    settings: Distill, *, teacher: str, trained: Mapping[str, Any], general: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that shapes distilled/: the stage's identity.

    ``teacher`` is the teacher's fingerprint, ``trained`` what tells the model that is trained from it, ``general`` the
    recipe's settings outside its sections.
    """
    section = shaping(settings, Shapes.TRAINING, "distill.")
    if settings.watch is None or settings.watch.metric_for_best_model is None:
        del section["distill.watch"]  # it only looks on
    # what the file says now, not what it is called; how ZeRO shards the work does not change its result
    section["distill.deepspeed"] = {k: v for k, v in deepspeed_config(settings).items() if k != "zero_optimization"}
    neutral = {*NEUTRAL, *(BATCH_SPLIT if settings.batch_size is not None else ())}
    if settings.has_images:
        section["distill.data (images)"] = images_fingerprint(settings.data)
    trainer = {f"distill.trainer.{key}": value for key, value in settings.trainer.items() if key not in neutral}
    return {"model": teacher, **trained, "data": sources_fingerprint(settings.data), **general, **section, **trainer}


def checkpoint_inputs(settings: Distill, inputs: dict[str, Any]) -> dict[str, Any]:
    """The identity of a run's checkpoints: its real batch, and not how ranks and micro-batches share it."""
    split = {f"distill.trainer.{key}" for key in BATCH_SPLIT}
    identity = {k: v for k, v in inputs.items() if k not in split} | {"distill.batch_size": rows_per_step(settings)}
    if (apart := sources_apart(settings)) is not None:  # before there was this, the same recipe had other rows
        identity["distill.data (rows that ask the teacher)"] = apart
    return identity
