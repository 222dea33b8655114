"""plan.json: which layers go, and what becomes of those that stay."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field

from shoal.artifacts.artifact import Artifact, Json, Tabular
from shoal.atomic_files import fingerprint

Mask = Annotated[str, Field(pattern="^[0-9a-f]+$")]


@dataclass(frozen=True)
class KeptWidth:
    """How wide every kept layer is, the same for all of them, and which of its parts stay."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    intermediate_size: int | None = None
    """Channels of each MLP; None = all stay."""
    num_key_value_heads: int | None = None
    """Key-value heads of each attention, with the query heads that read them; None = all stay."""
    channels: tuple[Mask, ...] = ()
    """Of each kept layer, in order, the channels that stay, see `mask_of`; empty = all, or not chosen yet."""
    groups: tuple[Mask, ...] = ()
    """Of each kept layer, in order, the key-value heads that stay, see `mask_of`; empty = all, or not chosen yet."""

    @property
    def parts(self) -> tuple[tuple[int, str], ...]:
        """How many stay of what, in words."""
        counts = ((self.intermediate_size, "MLP channel"), (self.num_key_value_heads, "key-value group"))
        return tuple((count, f"{part}{'' if count == 1 else 's'}") for count, part in counts if count is not None)

    def in_words(self) -> str:
        """`1,152 MLP channels and 2 key-value groups of every layer`."""
        return f"{' and '.join(f'{count:,} {part}' for count, part in self.parts)} of every layer"


def mask_of(indices: Iterable[int]) -> str:
    """``indices`` as a hexadecimal number in which bit i says whether i is among them."""
    return f"{sum(1 << index for index in indices):x}"


def indices_of(mask: str) -> tuple[int, ...]:
    """What mask_of was given, increasing."""
    return tuple(index for index, bit in enumerate(reversed(f"{int(mask, 16):b}")) if bit == "1")


COMPENSATION, WIDTH = "compensate", "width"
"""Kinds of changes that training knows by their numbers."""


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
class PlannedChange:
    """What a change does to layers that stay, as far as training, reports and cards need it. Numbers are the
    teacher's."""

    kind: str
    """Name of the change, such as `width`."""
    words: str
    """What it does, for a reader."""
    layers: tuple[int, ...] = ()
    """Kept layers that do something else, increasing."""
    rescaled: tuple[int, ...] = ()
    """Kept layers that do what they did to states of another size, with other weights."""
    runs: tuple[tuple[int, int], ...] = ()
    """(layer, last): a layer that stands for all from itself to ``last``."""


@dataclass(frozen=True, repr=False)
class Plan(Tabular, Artifact):
    """plan.json: the layers of the teacher to drop. Indices are 0-based and the teacher's.

    Example:
        >>> shoal.Plan.load("runs/mine").drop
    """

    FILE: ClassVar[str] = "plan.json"
    INTERNAL = ("gaps", "width", "text", "student")

    num_layers: Annotated[int, Field(ge=1, le=100_000)]
    """Layers of the teacher."""
    drop: tuple[int, ...]
    """Dropped layers, strictly increasing."""
    reason: str
    """Reason for this choice of layers, for a reader."""
    keep: tuple[int, ...] = ()
    """For every layer of the student the teacher's layer that it is, increasing; empty = all that ``drop`` leaves."""
    changes: tuple[PlannedChange, ...] = ()
    """What else is done to layers that stay, in order; of ``gaps`` and ``width`` it is told by themselves."""
    gaps: tuple[ClosedGap, ...] = ()
    """How compensation closed the gaps that ``drop`` leaves, increasing; empty = they are open."""
    width: KeptWidth | None = None
    """What stays within layers that are narrowed; None = they are as wide as they were."""
    text: dict[str, Json] = field(default_factory=dict)
    """What prune.changes were decided on, as Training.data: documents and tokens by source, and what of evaluation
    items and forms stands in it."""
    student: str = ""
    """Fingerprint of this plan together with the student that was made by it; empty = not recorded."""
    scores: tuple[float | None, ...] = ()
    """What chose, by layer: of a choice of runs the score of that which begins there. Empty = layers were named."""
    protected: tuple[int, ...] = ()
    """Layers that could not be chosen, increasing."""

    def __post_init__(self) -> None:
        own = tuple(layer for layer in range(self.num_layers) if layer not in {*self.drop})
        object.__setattr__(self, "keep", self.keep or own)
        others = (change for change in self.changes if change.kind not in (COMPENSATION, WIDTH))
        narrowed = () if self.width is None else (PlannedChange(WIDTH, f"keeping {self.width.in_words()}", self.keep),)
        told = (*others, *narrowed, *_compensation(self.gaps, self.keep))
        object.__setattr__(self, "changes", told)

    def contradictions(self) -> Iterator[str]:
        drop, asked = list(self.drop), self.provenance.inputs.get("prune.drop")
        if drop != sorted(set(drop)):
            yield f"drop: {drop} must list every layer once, in increasing order"
        if wrong := [layer for layer in drop if not 0 <= layer < self.num_layers]:
            yield f"drop: layer {wrong[0]} does not exist; the model has {self.num_layers} layers"
        if len(drop) >= self.num_layers:
            yield "drop: all layers are dropped; at least one must stay"
        if list(self.keep) != sorted({*range(self.num_layers)} - {*drop}):
            yield f"keep: {list(self.keep)} must list all layers that drop does not list, in increasing order"
        for index, gap in enumerate(self.gaps):
            if not set(range(gap.first, gap.last + 1)) <= set(drop):
                yield f"gaps.{index}: layers {gap.first} to {gap.last} are not all dropped"
            if not 0 < gap.factor < math.inf:
                yield f"gaps.{index}.factor: {gap.factor} is not a finite number above 0"
        if asked and set(asked) != set(drop):
            yield f"drop: {drop} differs from the recipe's prune.drop, {asked}"

    def body(self) -> dict[str, Json]:
        return super().body() | {"changed": list(self.changed)}

    def sealed(self, student: str) -> str:
        """Value of the field ``student`` for a student with the fingerprint ``student``."""
        changes = [asdict(change) for change in self.changes]
        details = [[asdict(gap) for gap in self.gaps], self.width and asdict(self.width)]
        return fingerprint([self.num_layers, list(self.drop), list(self.keep), changes, details, student])

    def in_words(self) -> str:
        """All changes of the teacher, in one line."""
        gone = f"dropping {len(self.drop)} of {self.num_layers} layers: {', '.join(map(str, self.drop))}"
        return "; ".join([*([gone] if self.drop else []), *(change.words for change in self.changes)])

    def state_scale(self, layer: int) -> float:
        """Factor from the student's hidden state after the teacher's ``layer`` to the teacher's own."""
        return math.prod(gap.factor for gap in self.gaps if gap.last <= layer)

    def title(self) -> str:
        """All changes and the reason, in one line."""
        return ": ".join(filter(None, (self.in_words(), self.reason)))

    def rows(self) -> list[dict[str, Any]]:
        """One row per layer of the teacher: its score, whether it is dropped, and the reason or change."""
        scores = self.scores or (None,) * self.num_layers
        return [
            {"layer": layer, "score": score, "dropped": layer in self.drop, "reason": self._reason(layer)}
            for layer, score in enumerate(scores)
        ]

    def _reason(self, layer: int) -> str:
        if layer in self.drop:
            return "named" if not self.scores else "least important"
        words = [change.words for change in self.changes if layer in (*change.layers, *change.rescaled)]
        return "; ".join([*(["protected"] if layer in self.protected else []), *words])

    @property
    def changes_layers(self) -> bool:
        """Whether the student lacks layers of the teacher, or has changed ones."""
        return self.keep != tuple(range(self.num_layers)) or any(change.layers for change in self.changes)

    @property
    def changed(self) -> tuple[int, ...]:
        """Kept layers of the teacher that compute something else, in increasing order."""
        return tuple(sorted({layer for change in self.changes for layer in change.layers}))

    @property
    def reweighted(self) -> tuple[int, ...]:
        """Kept layers of the teacher with other weights before training, in increasing order."""
        return tuple(sorted({*self.changed, *(layer for change in self.changes for layer in change.rescaled)}))

    @property
    def first_change(self) -> int:
        """The student's lowest layer that differs from the teacher's; its number of layers if none differs."""
        other = (place for place, layer in enumerate(self.keep) if layer != place or layer in self.changed)
        return next(other, len(self.keep))


def _compensation(gaps: Sequence[ClosedGap], keep: Sequence[int]) -> tuple[PlannedChange, ...]:
    """What closing ``gaps`` does to the layers ``keep`` that stay; none where all stay open."""
    closed = [gap for gap in gaps if gap.is_closed]
    if not closed:
        return ()
    scaled = (layer for layer in keep if math.prod(gap.factor for gap in gaps if gap.last <= layer) != 1)
    corrected = (gap.first - 1 for gap in gaps if gap.is_corrected)
    words = "; ".join(gap.in_words() for gap in closed)
    return (PlannedChange(COMPENSATION, words, tuple(corrected), tuple(scaled)),)
