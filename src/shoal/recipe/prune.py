"""Which layers go, and what is changed in those that stay: the recipe's section `prune`.

It is one of two types: layers that are named, or so many by a score. Each has the keys of its own alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

from shoal.errors import UserError
from shoal.formatting import listed
from shoal.recipe.section import Above0, Index, Layers, Positive, RowLength, Section, Shapes, Text, listed_as


@dataclass(frozen=True, kw_only=True)
class Width(Section):
    """Narrower layers: keep the MLP channels and key-value groups with the largest outputs."""

    kind: Literal["width"] = "width"
    intermediate_size: Annotated[int | float, Field(gt=0, allow_inf_nan=False)] | None = None
    """MLP channels to keep in every layer; below 1, their share. A share is rounded down to a multiple that kernels can
    use (128, or a smaller power of two). Default: all."""
    num_key_value_heads: Positive | None = None
    """Key-value heads to keep in every layer, with their query heads. Default: all."""

    def __post_init__(self) -> None:
        if self.intermediate_size is None and self.num_key_value_heads is None:
            raise ValueError("names no size to change; give intermediate_size or num_key_value_heads")
        if self.intermediate_size is not None and self.intermediate_size >= 1 and self.intermediate_size % 1:
            raise ValueError(
                f"intermediate_size: {self.intermediate_size} is not a whole number of channels; give a whole "
                "number, or a share below 1"
            )

    def refuse_more(self, config: Mapping[str, Any]) -> None:
        """Refuse more than a model with this text configuration has."""
        for key in ("num_key_value_heads", "intermediate_size"):
            count, most = getattr(self, key) or 0, config.get(key)
            if type(most) is int and count > most:
                raise UserError(f"prune.changes.width.{key}: {count} is more than the {most} of the model; lower it")


@dataclass(frozen=True, kw_only=True)
class Compensate(Section):
    """Correct the remaining weights for dropped layers, without training."""

    kind: Literal["compensate"] = "compensate"
    method: Literal["scale", "linear", "both"] = "both"
    """Kind of correction. `scale`: a factor per dropped block, in the output maps of all layers above (after
    Prune&Comp, arXiv:2507.18212); `linear`: a correction of the MLP output before the block (after ReplaceMe,
    arXiv:2505.02819); `both`: fitted jointly."""


Change = Annotated[Width | Compensate, Field(discriminator="kind")]


@dataclass(frozen=True, kw_only=True)
class Target(Section):
    """Goals for the student. Layers are dropped in the order of the metric until all goals are reached."""

    params: Annotated[Above0 | None, Shapes.PLAN] = None
    """Maximum number of parameters; tied ones count once."""
    memory_gb: Annotated[Above0 | None, Shapes.PLAN] = None
    """Maximum GiB of stored weights plus the cache of all sequences."""
    speedup: Annotated[Annotated[float, Field(gt=1, allow_inf_nan=False)] | None, Shapes.PLAN] = None
    """Minimum decoding speed relative to the teacher. Predicted from the bytes of weights and cache that a token
    reads."""
    batch_size: Annotated[Positive, Shapes.PLAN] = 1
    """Sequences served at the same time."""
    sequence_length: Annotated[RowLength | None, Shapes.PLAN] = None
    """Tokens of each sequence. Default: 2,048, or the model's positions if fewer."""

    def __post_init__(self) -> None:
        if not any((self.params, self.memory_gb, self.speedup)):
            raise ValueError("names no goal; give params, memory_gb or speedup")
        if not (self.memory_gb or self.speedup) and (self.batch_size, self.sequence_length) != (1, None):
            raise ValueError("batch_size and sequence_length need memory_gb or speedup; give one, or remove both")


@dataclass(frozen=True, kw_only=True)
class Cut(Section):
    """Changes of layers."""

    changes: Annotated[
        Annotated[tuple[Change, ...], listed_as("kind")], Shapes.PLAN, Field(exclude_if=lambda changes: not changes)
    ] = ()
    """Further changes of the remaining layers, in this order, fitted on measure.data. A bare word uses the defaults of
    a kind: `[compensate]`."""


@dataclass(frozen=True, kw_only=True)
class CutThese(Cut):
    """Drop layers by number."""

    drop: Annotated[Layers, AfterValidator(lambda layers: tuple(sorted(layers))), Shapes.PLAN]
    """Layers of the teacher to drop, counted from 0. May be empty if prune.changes is set. Default: chosen by
    prune.metric."""

    def __post_init__(self) -> None:
        if not (self.drop or self.changes):
            raise ValueError("drop is empty, so no layer would be dropped; name at least one layer")


NO_CORNERSTONE = (
    "prune.protect: cornerstone needs an ablation, and importance.json has none; name tasks in measure.sweep.tasks and "
    "measure again, or name the layers to protect"
)


@dataclass(frozen=True, kw_only=True)
class CutByScore(Cut):
    """Drop layers by a score. Default: one eighth of the layers, at least one."""

    num_drop: Annotated[Positive | None, Shapes.PLAN] = None
    """Number of layers to drop. Default: one eighth of the layers (at least 1), unless ratio or target is set."""
    ratio: Annotated[Annotated[float, Field(gt=0, lt=1)] | None, Shapes.PLAN] = None
    """Share of the layers to drop, rounded down."""
    target: Annotated[Target | None, Shapes.PLAN, Field(exclude_if=lambda target: target is None)] = None
    """Goals for the student: parameters, memory, speed-up. The fewest layers that reach all goals are dropped."""
    metric: Annotated[str | Annotated[dict[str, Above0], Field(min_length=1)] | None, Shapes.PLAN] = None
    """Score that chooses layers: a metric, greedy order, ablation task or `ability/protocol`.
    Default: block_influence, or angular if contiguous. A mapping of metrics to weights uses the weighted mean of each
    layer's ranks."""
    contiguous: Annotated[bool, Shapes.PLAN] = False
    """Drop one run of neighbouring layers instead of the least important ones anywhere."""
    protect: Annotated[tuple[Index | Literal["cornerstone"], ...], Shapes.PLAN] = (0, -1)
    """Layers to keep; negative numbers count from the end. `cornerstone`: layers without which an ablation task keeps
    less than 10 % of its score above chance."""
    spare: Annotated[tuple[Text, ...], Shapes.PLAN] = ()
    """Abilities, ablation tasks or `ability/protocol` that must not get significantly worse. Layers that would cause
    this are kept. Needs measure.sweep."""

    def __post_init__(self) -> None:
        if len(given := [key for key in ("num_drop", "ratio", "target") if getattr(self, key) is not None]) > 1:
            raise ValueError(f"{listed(given)} exclude each other; give one of them")
        if self.metric == "":
            raise ValueError("metric is empty; name one, or remove it")

    @property
    def chosen_by(self) -> set[str]:
        """Names of the columns that choose, as far as they are said."""
        return {self.metric} if isinstance(self.metric, str) else {*(self.metric or ())}

    @property
    def default_metric(self) -> str:
        """What chooses where no metric is said."""
        return "angular" if self.contiguous else "block_influence"


def _without_nulls(value: Any) -> Any:
    """Null takes back what a recipe says, so that an override may choose the other type."""
    return {key: own for key, own in value.items() if own is not None} if isinstance(value, dict) else value


def _type_of(value: Any) -> str:
    is_named = "drop" in value if isinstance(value, dict) else isinstance(value, CutThese)
    return "CutThese" if is_named else "CutByScore"


_Either = Annotated[CutThese, Tag("CutThese")] | Annotated[CutByScore, Tag("CutByScore")]
Prune = Annotated[Annotated[_Either, Discriminator(_type_of)], BeforeValidator(_without_nulls)]
"""The section, told apart by whether it has `drop`."""
