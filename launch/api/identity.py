"""What identifies a result of a model in memory."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from shoal.models.in_memory import name_of
from shoal.recipe.section import Section, Shapes, shaping


def measured_with(
    model: PreTrainedModel, section: Section, result: Shapes, place: str, *, seed: int, **content: Any
) -> dict[str, Any]:
    """What identifies ``result`` of ``model``: it, settings of ``section`` after ``place``, and ``content``."""
    dtype = str(model.dtype).removeprefix("torch.")
    return {"model": name_of(model), "dtype": dtype, "seed": seed, **content, **shaping(section, result, place)}
