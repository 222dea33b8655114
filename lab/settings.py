"""What each part of the lab may be told, known before anything is loaded that takes seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from shoal.recipe.section import Positive, Section, Text

Operator = Literal["head", "kv_group", "cumulative", "donor", "skip_prompt", "skip_written"]


@dataclass(frozen=True)
class DepthUse(Section):
    """What is measured with teacher, pruned and distilled model."""

    beside: Text | None = None
    """A model with as many layers as the teacher, local or on the Hub: its base, say, or one distilled into its
    shape."""


@dataclass(frozen=True)
class Diagnostics(Section):
    """The text is measure's."""


@dataclass(frozen=True)
class Heads(Section):
    """The prompts that heads are scored on."""

    tasks: Annotated[tuple[Literal["retrieval", "needle"], ...], Field(min_length=1)] = ("retrieval", "needle")
    """Bundled look-ups of 8, 16 and 32 pairs; needles in 20, 40 and 80 sentences."""
    num_each: Positive = 3
    """Prompts of every task, each of these lengths and five places of the needle: 15 times as many of a task."""


@dataclass(frozen=True)
class Patching(Section):
    """The prompts that are patched."""

    counterparts: Positive = 8
    """Look-ups of four pairs, each with three counterparts: another value, two keys exchanged, another key."""


@dataclass(frozen=True)
class Reading(Section):
    """The tasks are measure.sweep's."""


@dataclass(frozen=True)
class Sweeps(Section):
    """What is taken out of the intact model, one unit at a time, or put in."""

    operators: Annotated[tuple[Operator, ...], Field(min_length=1)]
    """Changes of the teacher, each tried alone. Of these: head, kv_group (every query head or key-value group),
    cumulative (ever more layers, by ``order``), donor (every layer as ``donor`` has it), skip_prompt and skip_written
    (a layer's output before the answer, or from there on)."""
    order: tuple[int, ...] | str = "block_influence"
    """Layers that cumulative removals go through, or the column of importance.json by which they go through all."""
    max_removed: Positive | None = None
    """Most layers that cumulative removals take out; None = all but one."""
    donor: Text | None = None
    """Model of the same shape: Hub id, local path or demo:<name>."""
    donor_revision: str | None = None
    """Hub revision of the donor."""

    def __post_init__(self) -> None:
        if ("donor" in self.operators) != (self.donor is not None):
            raise ValueError("the operator donor needs a donor, and a donor the operator; give both or none")
