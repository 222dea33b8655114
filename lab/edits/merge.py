"""Merge neighbouring layers into one, in the place of the first (LaCo, Yang et al. 2024, arXiv:2402.11187)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from shoal.artifacts.plan import PlannedChange
from shoal.compress.edits.tensors import laco_factors, merged_layer, tensors_in_place, with_layers
from shoal.compress.surgery.cut_model import skipped
from shoal.formatting import layers_text
from shoal.launch.verbs.run import Run
from shoal.recipe.section import Section

from .student import Edited, loaded_teacher, write_student


@dataclass(frozen=True)
class Settings(Section):
    """Which layers become one, and how."""

    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=2)]
    """Neighbouring layers, increasing, counted from 0."""
    method: Literal["laco", "mean"] = "laco"
    """laco: the first plus the differences of all others to it, which grows where layers are far from each other, and
    is then often worse than dropping them; mean: the mean of all."""

    def __post_init__(self) -> None:
        if list(self.layers) != list(range(self.layers[0], self.layers[0] + len(self.layers))):
            raise ValueError(f"layers: must be neighbours in increasing order, as [4, 5, 6] (got {list(self.layers)})")

    @property
    def factors(self) -> tuple[float, ...]:
        """What each layer counts for."""
        count = len(self.layers)
        return laco_factors(count) if self.method == "laco" else (1 / count,) * count


def work(run: Run, settings: Settings) -> str:
    """student/ and plan.json: the run's model with the layers merged."""
    teacher, (first, *others) = loaded_teacher(run), settings.layers
    merged = {first: merged_layer(teacher, first, settings.factors)}

    @contextmanager
    def in_force() -> Iterator[None]:
        with tensors_in_place(teacher, merged), skipped(teacher, others):
            yield

    student = with_layers(teacher, others, merged, share=True)
    words = f"layers {layers_text(settings.layers)} merged into one ({settings.method})"
    change = PlannedChange("merge", words, (first,), runs=((first, others[-1]),))
    edited = Edited(student, change, in_force, drop=tuple(others))
    return write_student(run, "merge", settings, edited, teacher, {})
