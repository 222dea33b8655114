"""Which layers go, and what is changed in those that stay: the recipe's section `prune`.

It is one of two types: layers that are named, or so many by a score. Each has the keys of its own alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from shoal.formatting import listed
from shoal.recipe.section import Above0, Index, Layers, Positive, RowLength, Section, Shapes, Text, listed_as


@dataclass(frozen=True, kw_only=True)
class Width(Section):
    """How wide the layers that stay are: as many MLP channels and key-value groups in each, those that write most."""

    kind: Literal["width"] = "width"
    intermediate_size: Annotated[int | float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Channels of every layer's MLP that stay; below 1 their share, rounded down to what kernels can use: a multiple of
    128, or of the power of two that the model's own number is a multiple of. None = all."""
    num_key_value_heads: Positive | None = None
    """Key-value heads of every layer that stay, each with the query heads that read it. None = all."""

    def __post_init__(self) -> None:
        if self.intermediate_size is None and self.num_key_value_heads is None:
            raise ValueError("names nothing to narrow; give intermediate_size or num_key_value_heads")
        if self.intermediate_size is not None and self.intermediate_size >= 1 and self.intermediate_size % 1:
            raise ValueError(
                f"intermediate_size: {self.intermediate_size} is no whole number of channels; give one, or a share "
                "below 1"
            )


@dataclass(frozen=True, kw_only=True)
class Compensate(Section):
    """What makes up for dropped layers without training, folded into the weights of layers that stay."""

    kind: Literal["compensate"] = "compensate"
    method: Literal["scale", "linear", "both"] = "both"
    """scale: a factor per gap, in the output maps of all layers above (after Prune&Comp, arXiv:2507.18212); linear: a
    correction of what the MLP below the gap writes (after ReplaceMe, arXiv:2505.02819); both: fitted jointly."""


Change = Annotated[Width | Compensate, Field(discriminator="kind")]


@dataclass(frozen=True, kw_only=True)
class Target(Section):
    """What the student must reach, all of it at once: as few layers go, in the order of the metric, as reach it."""

    params: Annotated[Above0 | None, Shapes.PLAN] = None
    """Parameters at most, tied ones counted once."""
    memory_gb: Annotated[Above0 | None, Shapes.PLAN] = None
    """GiB at most of the weights, as they are stored, and of the cache of all sequences."""
    speedup: Annotated[Annotated[float, Field(gt=1, allow_inf_nan=False)] | None, Shapes.PLAN] = None
    """Speed of writing as a multiple of the teacher's, at least. A prediction: the time is taken to be that of reading
    weights and cache from memory."""
    batch_size: Annotated[Positive, Shapes.PLAN] = 1
    """Sequences that are served at once."""
    sequence_length: Annotated[RowLength | None, Shapes.PLAN] = None
    """Tokens of each; None = 2,048, or the model's positions where those are fewer."""

    def __post_init__(self) -> None:
        if not any((self.params, self.memory_gb, self.speedup)):
            raise ValueError("names nothing to reach; give params, memory_gb or speedup")
        if not (self.memory_gb or self.speedup) and (self.batch_size, self.sequence_length) != (1, None):
            raise ValueError("batch_size and sequence_length are of memory_gb and speedup; give one, or leave both out")


@dataclass(frozen=True, kw_only=True)
class Cut(Section):
    """What becomes of layers."""

    changes: Annotated[
        Annotated[tuple[Change, ...], listed_as("kind")], Shapes.PLAN, Field(exclude_if=lambda changes: not changes)
    ] = ()
    """What else is done to layers that stay, in this order, decided on the text of `measure`; a bare word is a kind
    with its defaults: `[compensate]`."""


@dataclass(frozen=True, kw_only=True)
class CutThese(Cut):
    """The layers that go, by number."""

    drop: Annotated[Layers, Shapes.PLAN]
    """0-based layers of the teacher; none of them goes where it is empty, and layers are only changed."""

    def __post_init__(self) -> None:
        if not (self.drop or self.changes):
            raise ValueError("drop is empty, so nothing would be dropped; name at least one layer")


NO_CORNERSTONE = (
    "prune.protect: cornerstone needs swept tasks, importance.json holds none; name some in measure.sweep.tasks and "
    "measure again, or name the layers to protect"
)


@dataclass(frozen=True, kw_only=True)
class CutByScore(Cut):
    """So many layers by a score; where nothing says how many, an eighth of them, at least one."""

    num_drop: Annotated[Positive | None, Shapes.PLAN] = None
    """Layers to drop."""
    ratio: Annotated[Annotated[float, Field(gt=0, lt=1)] | None, Shapes.PLAN] = None
    """Share of the layers to drop, rounded down."""
    target: Annotated[Target | None, Shapes.PLAN, Field(exclude_if=lambda target: target is None)] = None
    """What the student must reach: parameters, memory, speed-up. As few layers go, in the order of the metric, as reach
    everything named."""
    metric: Annotated[str | Annotated[dict[str, Above0], Field(min_length=1)] | None, Shapes.PLAN] = None
    """Column of importance.json that chooses: a metric, a greedy order, a swept task, or `ability/protocol`; None =
    block_influence, or angular when contiguous. A mapping of several to their weights is a mix: the weighted mean of
    each layer's rank under them, since shares, nats and cosines have only ranks in common."""
    contiguous: Annotated[bool, Shapes.PLAN] = False
    """Drop one run of neighbouring layers instead of the least important ones wherever they are."""
    protect: Annotated[tuple[Index | Literal["cornerstone"], ...], Shapes.PLAN] = (0, -1)
    """Layers never dropped; negative counts from the end. `cornerstone` = those whose removal alone takes a swept task
    to chance (less than 0.1 of its score above chance is kept)."""
    spare: Annotated[tuple[Text, ...], Shapes.PLAN] = ()
    """Abilities, swept tasks, or `ability/protocol` on which nothing significant may be spent: layers that are critical
    there stay, and so does every layer with which the summed loss would become significant."""

    def __post_init__(self) -> None:
        if len(given := [key for key in ("num_drop", "ratio", "target") if getattr(self, key) is not None]) > 1:
            raise ValueError(f"{listed(given)} exclude each other; give one of them")

    @property
    def chosen_by(self) -> set[str]:
        """Names of the columns that choose, as far as they are said."""
        return {self.metric} if isinstance(self.metric, str) else {*(self.metric or ())}


def _without_nulls(value: Any) -> Any:
    """Null takes back what a recipe says, so that an override may choose the other type."""
    return {key: own for key, own in value.items() if own is not None} if isinstance(value, dict) else value


def _type_of(value: Any) -> str:
    is_named = "drop" in value if isinstance(value, dict) else isinstance(value, CutThese)
    return "CutThese" if is_named else "CutByScore"


_Either = Annotated[CutThese, Tag("CutThese")] | Annotated[CutByScore, Tag("CutByScore")]
Prune = Annotated[Annotated[_Either, Discriminator(_type_of)], BeforeValidator(_without_nulls)]
"""The section, told apart by whether it has `drop`."""
