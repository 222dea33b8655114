"""What can be done to a model's layers, in words that measuring and pruning share.

A Component is what a sweep takes out and what an order of removals lists. The edits of a recipe's `prune.edits` are
said in components too, but for those that give layers other weights. A LayerEdit is what either comes to in one layer;
compress/edits/layer_edits.py has the table of what is done then.

Indices are 0-based and the teacher's. Edits act on the intact teacher in one order, whatever the order in the recipe:
swaps first, then merges, replacements and insertions, then masks and skips.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from shoal.components import Component
from shoal.recipe.section import Data, DataSource, Positive, RowLength, Section, Text

Index = Annotated[int, Field(ge=0)]
Indices = Annotated[tuple[Index, ...], Field(min_length=1)]
Neighbours = Annotated[tuple[Index, ...], Field(min_length=2, description="Neighbouring layers, increasing.")]


@dataclass(frozen=True)
class SkipAttention(Section):
    """The layers' attention writes nothing: its output projection becomes zero. Saves neither memory nor time."""

    kind: Literal["skip_attention"]
    layers: Indices
    """The teacher's layers, counted from 0."""


@dataclass(frozen=True)
class SkipMlp(Section):
    """The layers' MLP, or mixture of experts, writes nothing. Saves neither memory nor time."""

    kind: Literal["skip_mlp"]
    layers: Indices
    """The teacher's layers, counted from 0."""


@dataclass(frozen=True)
class HeadMask(Section):
    """Single query heads of one layer write nothing; other heads of the same key-value group are not touched."""

    kind: Literal["head_mask"]
    layer: Index
    """The teacher's layer, counted from 0."""
    heads: Indices
    """Query heads, counted from 0."""


@dataclass(frozen=True)
class KvGroupMask(Section):
    """All query heads that read the named key-value heads write nothing."""

    kind: Literal["kv_group_mask"]
    layer: Index
    """The teacher's layer, counted from 0."""
    groups: Indices
    """Key-value heads, counted from 0."""


@dataclass(frozen=True)
class Swap(Section):
    """Layers become base + weight * (donor - base)."""

    kind: Literal["swap"]
    layers: Indices
    """The teacher's layers, counted from 0."""
    donor: Text
    """Hub id, local path or demo:<name> of a model of the same shape."""
    donor_revision: str | None = None
    """Hub revision of the donor."""
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """0 = the model's own weights, 1 = the donor's; both exact."""
    parts: tuple[Literal["embeddings", "norm", "head"], ...] = ()
    """Parts of the model that are swapped besides layers."""


@dataclass(frozen=True)
class Merge(Section):
    """A run of layers becomes one, in the place of its first."""

    kind: Literal["merge"]
    layers: Neighbours
    method: Literal["laco", "weighted"] = "laco"
    """laco: the first plus the differences of all others to it (Yang et al. 2024, arXiv:2402.11187)."""
    weights: tuple[Annotated[float, Field(allow_inf_nan=False)], ...] | None = None
    """For `weighted`: one per layer, adding up to 1; None = equal."""


@dataclass(frozen=True)
class Replace(Section):
    """A run of layers becomes one trained layer, in the place of its first, whose target is the state after the run
    (LLM-Streamline, arXiv:2403.19135)."""

    kind: Literal["replace"]
    layers: Neighbours
    data: Data = field(default_factory=lambda: (DataSource("python_docs"),))
    num_tokens: Positive = 50_000
    """Tokens that the new layer is trained on."""
    sequence_length: RowLength = 512
    batch_size: Positive = 4
    """Rows per step."""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2e-4
    """Largest learning rate of AdamW."""
    init: Annotated[Literal["first", "mean", "lesa"], Field(exclude_if=lambda init: init == "first")] = "first"
    """What training starts from: the run's first layer, the mean of its layers, or what LESA (arXiv:2502.13794)
    predicts from the layers right below and right above the run."""


@dataclass(frozen=True)
class Insert(Section):
    """After each named layer comes a new one of its kind, which makes the model deeper."""

    kind: Literal["insert"]
    after: Indices
    """The teacher's layers, counted from 0."""
    init: Literal["zero", "copy", "mean", "lesa"] = "zero"
    """Weights of a new layer. zero: those of the layer below it, with attention and MLP writing nothing, so that the
    student is the teacher bit for bit until it is trained; copy: those of the layer below; mean: of the layers on both
    sides; lesa: what LESA (arXiv:2502.13794) predicts from the layers on both sides."""


Edit = Annotated[
    SkipAttention | SkipMlp | HeadMask | KvGroupMask | Swap | Merge | Replace | Insert, Field(discriminator="kind")
]
Edits = tuple[Edit, ...]


def components(edits: Sequence[Edit]) -> tuple[Component, ...]:
    """What skips and masks take out. All other edits give weights and take nothing out."""
    taken: list[Component] = []
    for edit in edits:
        match edit:
            case SkipAttention():
                taken += [Component((layer,), "attention") for layer in edit.layers]
            case SkipMlp():
                taken += [Component((layer,), "mlp") for layer in edit.layers]
            case HeadMask():
                taken += [Component((edit.layer,), "head", head) for head in edit.heads]
            case KvGroupMask():
                taken += [Component((edit.layer,), "kv_group", group) for group in edit.groups]
            case Swap() | Merge() | Replace() | Insert():
                pass
    return tuple(taken)


def edited_layers(edit: Edit) -> tuple[int, ...]:
    """The layers of the teacher that ``edit`` changes or removes, or after which it inserts new ones."""
    if isinstance(edit, Insert):
        return edit.after
    return (edit.layer,) if isinstance(edit, HeadMask | KvGroupMask) else edit.layers


def removed_layers(edits: Sequence[Edit]) -> tuple[int, ...]:
    """The layers that merges and replacements take into their first one, increasing."""
    return tuple(sorted(layer for edit in edits if isinstance(edit, Merge | Replace) for layer in edit.layers[1:]))


def insertions(edits: Sequence[Edit]) -> tuple[int, ...]:
    """The layers after which a new one comes, increasing."""
    return tuple(sorted(layer for edit in edits if isinstance(edit, Insert) for layer in edit.after))


def first_change(drop: Sequence[int], edits: Sequence[Edit]) -> int:
    """The lowest layer at which the student is not the teacher any more; 0 where its embeddings are others."""
    if any(isinstance(edit, Swap) and "embeddings" in edit.parts for edit in edits):
        return 0
    changed = (layer + isinstance(edit, Insert) for edit in edits for layer in edited_layers(edit))
    return min([*drop, *changed])


def contradictions(edits: Sequence[Edit], drop: Sequence[int]) -> Iterator[str]:
    """`index: what is wrong`, for everything that needs no model to see."""
    owners: dict[int, list[int]] = {}
    swapped: dict[str, int] = {}
    for index, edit in enumerate(edits):
        named, key = edited_layers(edit), "after" if isinstance(edit, Insert) else "layers"
        yield from (f"{index}.{problem}" for problem in _own_problems(edit))
        if dropped := sorted(set(named) & set(drop)):
            yield f"{index}.{key}: names layer {dropped[0]}, which prune.drop removes; take it out of one of them"
        clashes = (
            (layer, other)
            for layer in sorted(set(named))
            for other in owners.get(layer, ())
            if removed_layers([edit, edits[other]]) or type(edit) is type(edits[other])
        )
        for layer, other in itertools.islice(clashes, 1):
            yield f"{index}.{key}: names layer {layer}, as {edits[other].kind} at {other} does; name it once"
        for layer in set(named):
            owners.setdefault(layer, []).append(index)
        for part in edit.parts if isinstance(edit, Swap) else ():
            if swapped.setdefault(part, index) != index:
                yield f"{index}.parts: names {part}, as swap at {swapped[part]} does; name it once"


def _own_problems(edit: Edit) -> Iterator[str]:
    match edit:
        case HeadMask():
            key, indices = "heads", edit.heads
        case KvGroupMask():
            key, indices = "groups", edit.groups
        case Insert():
            key, indices = "after", edit.after
        case _:
            key, indices = "layers", edit.layers
    if twice := sorted({value for value in indices if list(indices).count(value) > 1}):
        yield f"{key}: names {twice[0]} twice; name everything once"
    elif isinstance(edit, Merge | Replace) and list(indices) != list(range(indices[0], indices[0] + len(indices))):
        yield f"layers: must be neighbours in increasing order, as [4, 5, 6] (got {list(indices)})"
    if not isinstance(edit, Merge):
        return
    if edit.method == "laco" and edit.weights is not None:
        yield "weights: have no effect on laco; leave them out, or set method: weighted"
    elif edit.weights is not None and len(edit.weights) != len(edit.layers):
        yield f"weights: {len(edit.weights)} for {len(edit.layers)} layers; give one per layer"
    elif edit.weights is not None and abs(sum(edit.weights) - 1) > 1e-6:
        yield f"weights: add up to {sum(edit.weights):g}; let them add up to 1"


def in_words(edit: Edit) -> str:
    """What ``edit`` does, for a reader."""
    layers = f"layer{'s' if len(edited_layers(edit)) > 1 else ''} {', '.join(map(str, edited_layers(edit)))}"
    match edit:
        case SkipAttention():
            return f"attention of {layers} zeroed"
        case SkipMlp():
            return f"MLP of {layers} zeroed"
        case HeadMask():
            return f"heads {', '.join(map(str, edit.heads))} of {layers} zeroed"
        case KvGroupMask():
            return f"key-value groups {', '.join(map(str, edit.groups))} of {layers} zeroed"
        case Swap():
            parts = "".join(f" and {part}" for part in edit.parts)
            local = edit.donor.startswith((".", "/", "~"))  # a card is read by strangers: no paths of one disk
            donor = edit.donor.rstrip("/").rpartition("/")[2] if local else edit.donor
            return f"{layers}{parts} swapped with {donor} at weight {edit.weight:g}"
        case Merge():
            return f"{layers} merged into one ({edit.method})"
        case Replace():
            start = "" if edit.init == "first" else f" (started from {edit.init})"
            return f"{layers} replaced by one trained layer{start}"
        case Insert():
            return f"{len(edit.after)} new after {layers} ({edit.init})"
