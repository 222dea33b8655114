"""What identifies a training and its checkpoints. The Trainer is not loaded, which takes a second: reports ask too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal.data.image_rows import images_fingerprint
from shoal.data.sources import sources_fingerprint
from shoal.recipe.distill import Distill
from shoal.recipe.trainer_arguments import BATCH_SPLIT, training_settings

from .dataset import sources_apart
from .engine.arguments import deepspeed_config, rows_per_step


def distill_inputs(
    settings: Distill, *, teacher: str, trained: Mapping[str, Any], general: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that shapes distilled/: the stage's identity.

    ``teacher`` is the teacher's fingerprint, ``trained`` what tells the model that is trained from it, ``general`` the
    recipe's settings outside its sections.
    """
    section = training_settings(settings)
    # what the file says now, not what it is called; how ZeRO shards the work does not change its result
    section["distill.deepspeed"] = {k: v for k, v in deepspeed_config(settings).items() if k != "zero_optimization"}
    if settings.has_images:
        section["distill.data (images)"] = images_fingerprint(settings.data)
    return {"model": teacher, **trained, "data": sources_fingerprint(settings.data), **general, **section}


def checkpoint_inputs(settings: Distill, inputs: dict[str, Any]) -> dict[str, Any]:
    """The identity of a run's checkpoints: its real batch, and not how ranks and micro-batches share it."""
    split = {f"distill.trainer.{key}" for key in BATCH_SPLIT}
    identity = {k: v for k, v in inputs.items() if k not in split} | {"distill.batch_size": rows_per_step(settings)}
    if (apart := sources_apart(settings)) is not None:  # before there was this, the same recipe had other rows
        identity["distill.data (rows that ask the teacher)"] = apart
    return identity
