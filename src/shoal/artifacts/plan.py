"""plan.json: which layers go, and what becomes of those that stay."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from html import escape
from typing import ClassVar

from shoal.artifacts.artifact import Artifact, Json
from shoal.artifacts.width import KeptWidth
from shoal.atomic_files import fingerprint
from shoal.recipe.edits import Edits, Insert, edited_layers, first_change, in_words, insertions
from shoal.recipe.section import as_dict


@dataclass(frozen=True)
class ClosedGap:
    """What makes up for one run of dropped layers without training, and what it does on text that it was not fitted to.

    Errors are means over tokens of ||y - x||^2 / ||y||^2, where x is the student's state behind the gap and y the
    teacher's; divergences KL(teacher || student) in nats per token, with the gaps below closed and those above open.
    """

    first: int
    last: int
    """The dropped layers are ``first`` to ``last``, of the teacher."""
    factor: float
    """The state behind the gap is so many times as large; in the student all layers above write so many times less."""
    is_corrected: bool
    """Whether the MLP below the gap writes something else."""
    error_before: float
    error_after: float
    divergence_before: float
    divergence_after: float

    @property
    def is_closed(self) -> bool:
        """Whether anything makes up for the layers."""
        return self.is_corrected or self.factor != 1

    def in_words(self) -> str:
        """What was done, for a reader."""
        how = [f"a factor of {self.factor:.3f}"] if self.factor != 1 else []
        how += ["a correction"] if self.is_corrected else []
        gone = f"layers {self.first} to {self.last}" if self.last > self.first else f"layer {self.first}"
        return f"{' and '.join(how)} for {gone}"


@dataclass(frozen=True)
class PruningPlan(Artifact):
    """plan.json: which of the teacher's layers go. Indices are 0-based and the teacher's."""

    FILE: ClassVar[str] = "plan.json"

    num_layers: int
    """Layers of the teacher."""
    drop: tuple[int, ...]
    """Dropped layers, strictly increasing."""
    reason: str
    """Reason for this choice of layers, for a reader."""
    edits: Edits = ()
    """Changes to layers that stay; ``drop`` holds the layers that merges and replacements took in."""
    gaps: tuple[ClosedGap, ...] = ()
    """How prune.compensate closed the gaps that ``drop`` leaves, increasing; empty = they are open."""
    width: KeptWidth | None = None
    """What stays within the layers that prune.width narrows; None = they are as wide as they were."""
    text: dict[str, Json] = field(default_factory=dict)
    """What prune.compensate was fitted to, or prune.width chosen on, as Training.data: documents and tokens by source,
    and what of evaluation items and forms stands in it."""
    student: str = ""
    """Fingerprint of this plan together with the student that was made by it; empty = not recorded."""

    def contradictions(self) -> Iterator[str]:
        drop, asked = list(self.drop), self.provenance.inputs.get("prune.drop")
        if drop != sorted(set(drop)):
            yield f"drop: is {drop}; layers are named once, increasing"
        if wrong := [layer for layer in drop if not 0 <= layer < self.num_layers]:
            yield f"drop: names layer {wrong[0]} of a model of {self.num_layers} layers"
        if len(drop) >= self.num_layers:
            yield "drop: leaves no layer"
        for index, gap in enumerate(self.gaps):
            if not set(range(gap.first, gap.last + 1)) <= set(drop):
                yield f"gaps.{index}: is of layers {gap.first} to {gap.last}, which are not all dropped"
            if not 0 < gap.factor < math.inf:
                yield f"gaps.{index}.factor: is {gap.factor}"
        if self.width is not None:
            yield from self.width.contradictions(len(self.keep))
        if asked and not (set(asked) <= set(drop) if self.edits else set(asked) == set(drop)):
            yield f"drop: is {drop}, and the recipe that made it asked for {asked}"

    def sealed(self, student: str) -> str:
        """Value of the field ``student`` for a student of this fingerprint."""
        closed = [[asdict(gap) for gap in self.gaps]] if self.gaps else []
        width = [] if self.width is None else [asdict(self.width)]
        edits = [as_dict(edit) for edit in self.edits]
        return fingerprint([self.num_layers, list(self.drop), edits, *closed, *width, student])

    def in_words(self) -> str:
        """The changes to the teacher in one line."""
        gone = f"dropping {len(self.drop)} of {self.num_layers} layers: {', '.join(map(str, self.drop))}"
        closed = [gap.in_words() for gap in self.gaps if gap.is_closed]
        width = [] if self.width is None else [f"keeping {self.width.in_words()}"]
        return "; ".join([*([gone] if self.drop else []), *map(in_words, self.edits), *closed, *width])

    def state_scale(self, layer: int) -> float:
        """How many times larger the teacher's state after ``layer`` is than the student's that stands for it."""
        return math.prod(gap.factor for gap in self.gaps if gap.last <= layer)

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.in_words())}</p><p>{escape(self.reason)}</p>"

    @property
    def changes_layers(self) -> bool:
        """Whether the student's layers are others than the teacher's."""
        return bool(self.drop or self.edits or self.width)

    @property
    def first_change(self) -> int:
        """The lowest layer at which the student is not the teacher any more; behind the last where it is in none."""
        if self.width is not None:
            return 0
        changed = [first_change(self.drop, self.edits)] if self.drop or self.edits else []
        return min([*changed, *self._corrected], default=self.num_layers)

    @property
    def edited_layers(self) -> set[int]:
        """The teacher's layers that stay and that edits change; new ones are beside them."""
        changing = [edit for edit in self.edits if not isinstance(edit, Insert)]
        return {layer for edit in changing for layer in edited_layers(edit)} - {*self.drop}

    @property
    def changed_layers(self) -> tuple[int, ...]:
        """The teacher's layers that stay with other weights, before any training, increasing."""
        changed = {layer for layer in self.keep if self.width is not None or self.state_scale(layer) != 1}
        return tuple(sorted((self.edited_layers | changed | {*self._corrected}) - {*self.drop}))

    @property
    def _corrected(self) -> tuple[int, ...]:
        return tuple(gap.first - 1 for gap in self.gaps if gap.is_corrected)

    @property
    def keep(self) -> tuple[int, ...]:
        """For every layer of the student the teacher's layer that it is, in order. A new layer has the number of the
        one below it, whose kind it has: of a number that is there twice the first is the teacher's layer."""
        dropped, followed = set(self.drop), set(insertions(self.edits))
        own = (layer for layer in range(self.num_layers) if layer not in dropped)
        return tuple(number for layer in own for number in (layer,) * (2 if layer in followed else 1))

    @property
    def new_layers(self) -> tuple[int, ...]:
        """The student's layers that edits insert, by their numbers in it."""
        return tuple(
            place for place, (lower, upper) in enumerate(itertools.pairwise(self.keep), start=1) if lower == upper
        )
