"""The one table of what can be taken out of a layer: how it is counted, put in force and written for good.

Sweeps, orders of removals and the skips and masks of a plan are said in components (shoal.recipe.edits). Here they
become edits of single layers, and KINDS says of each part what is done with it:

| part        | in `prune.edits` | swept by        | in force                      | for good                      |
| ----------- | ---------------- | --------------- | ----------------------------- | ----------------------------- |
| `layer`     | `prune.drop`     | layer           | passes its input on           | is cut (surgery/)             |
| `attention` | `skip_attention` | layer           | adds nothing                  | output projection is zero     |
| `mlp`       | `skip_mlp`       | layer           | adds nothing                  | output projection is zero     |
| `head`      | `head_mask`      | query head      | its context is zero           | its columns there are zero    |
| `kv_group`  | `kv_group_mask`  | key-value head  | as the query heads that read it                              ||
| `donor`     | `swap`           | layer           | the donor's layer runs        | the donor's tensors           |

To add a part, touch four files: src/shoal/recipe/edits.py (its name in ComponentPart; its class in Edit, its components
and its words, if a plan may name it), masks.py (hooks that put it in force), zeroing.py (weights that do the same, and
what then is idle), and its row in KINDS. An edit that gives layers other weights, as `merge` and `replace` do, is no
part: it takes its class in src/shoal/recipe/edits.py, a module of its own, and its place in apply.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from shoal.models.anatomy import decoder_layers, layer_config
from shoal.recipe.edits import Component, ComponentPart, LayerEdit, LayerEdits

from ..surgery.cut_model import skipped
from .masks import (
    RowsOfBatch,
    attention_skipped,
    half_silenced_on_rows,
    heads_masked,
    heads_masked_on_rows,
    heads_of_groups,
    layer_skipped_on_rows,
    mlp_skipped,
    with_halves,
    with_heads,
)
from .zeroing import zero_attention, zero_heads, zero_mlp

LayerIndices = dict[int, tuple[int, ...]]
"""Layer -> which heads and the like of it; none of a part that is not one of several."""


def _one(model: PreTrainedModel, layer: int) -> Sequence[None]:
    return (None,)


def _half(model: PreTrainedModel, layer: int) -> Sequence[None]:
    with_halves(model, layer)
    return (None,)


def _heads(model: PreTrainedModel, layer: int) -> Sequence[int]:
    return range(with_heads(model, layer).num_heads)


def _kv_heads(model: PreTrainedModel, layer: int) -> Sequence[int]:
    return range(with_heads(model, layer).num_kv_heads)


@dataclass(frozen=True)
class Kind:
    """What is done with one part."""

    in_layer: Callable[[PreTrainedModel, int], Sequence[int | None]] = _one
    """(model, layer) -> an index for each component of the layer; (None,) where it is the only one.

    Raises UserError for a layer out of which it cannot be taken exactly."""
    told_by: str = ""
    """Setting of a configuration that says how many components a layer has; empty = there is one."""
    is_inside: bool = True
    """Whether it lies within a layer, so that it must be known where the layer keeps it."""
    heads: Callable[[PreTrainedModel, int, Sequence[int]], list[int]] | None = None
    """(model, layer, indices) -> the query heads by which it is taken out; then the rest is as with `head`."""
    in_force: Callable[[PreTrainedModel, LayerIndices], AbstractContextManager[object]] | None = None
    """None where it takes more than the model: a donor."""
    on_rows: Callable[[PreTrainedModel, int, Sequence[int], RowsOfBatch], Iterator[RemovableHandle]] | None = None
    """The same for some rows of a batch, by hooks of one layer; None = its texts are written apart from others'."""
    for_good: Callable[[PreTrainedModel, LayerIndices], list[str]] | None = None
    """Zeroes weights of a student; the names of the changed parameters."""
    stored: str = ""
    """How stored answers of sweeps name its edit, with its indices at {}."""


KINDS: dict[ComponentPart, Kind] = {
    "layer": Kind(is_inside=False, in_force=skipped, on_rows=layer_skipped_on_rows, stored="Removed()"),
    "attention": Kind(
        _half,
        in_force=attention_skipped,
        on_rows=partial(half_silenced_on_rows, "attention"),
        for_good=zero_attention,
        stored="Silenced(half='attention')",
    ),
    "mlp": Kind(
        _half,
        in_force=mlp_skipped,
        on_rows=partial(half_silenced_on_rows, "mlp"),
        for_good=zero_mlp,
        stored="Silenced(half='mlp')",
    ),
    "head": Kind(
        _heads,
        told_by="num_attention_heads",
        in_force=heads_masked,
        on_rows=heads_masked_on_rows,
        for_good=zero_heads,
        stored="Masked(heads={})",
    ),
    "kv_group": Kind(_kv_heads, told_by="num_key_value_heads", heads=heads_of_groups),
    "donor": Kind(is_inside=False, stored="Swapped()"),
}


def components_of(operator: str, model: PreTrainedModel, *, order: Sequence[int] = ()) -> tuple[Component, ...]:
    """What a sweep with ``operator`` takes out of ``model``, one after the other; ``order`` is for cumulative ones.

    Raises:
        UserError: a model whose halves or heads cannot be taken out one by one.
    """
    if operator == "cumulative":
        return tuple(Component(tuple(order[:count])) for count in range(1, len(order) + 1))
    if operator not in KINDS:
        raise ValueError(f"no operator {operator!r}")
    in_layer = KINDS[operator].in_layer
    layers = range(len(decoder_layers(model)))
    return tuple(Component((layer,), operator, index) for layer in layers for index in in_layer(model, layer))


def num_components(operator: str, config: Any) -> int:
    """About how many components a sweep has, by the configuration; what no layer has is refused with the model."""
    layers = range(config.num_hidden_layers)
    told_by = KINDS[operator].told_by if operator in KINDS else ""
    if not told_by:
        return len(layers)
    return sum(getattr(layer_config(config, layer), told_by, None) or 1 for layer in layers)


def layer_edits(components: Iterable[Component], model: PreTrainedModel | None) -> LayerEdits:
    """What taking ``components`` out of ``model`` does to each layer; of heads of one layer it is one edit.

    ``model`` may be None where no component is a key-value group.

    Raises:
        UserError: a key-value group that is none.
    """
    taken: dict[tuple[int, ComponentPart], set[int]] = defaultdict(set)
    for component in components:
        for layer in component.layers:
            part, indices = component.part, [] if component.index is None else [component.index]
            if (heads := KINDS[part].heads) is not None:
                assert model is not None
                part, indices = "head", heads(model, layer, indices)
            taken[layer, part].update(indices)
    return tuple((layer, LayerEdit(part, tuple(sorted(taken[layer, part])))) for layer, part in sorted(taken))


@contextmanager
def in_force(model: PreTrainedModel, edits: Iterable[tuple[int, LayerEdit]]) -> Iterator[PreTrainedModel]:
    """``model`` with ``edits`` in force until the block ends, but for those that take a donor.

    Raises:
        UserError: an index that is no layer or no head, a part that cannot be taken out exactly.
    """
    with ExitStack() as stack:
        for layer, edit in edits:
            if (put := KINDS[edit.part].in_force) is not None:
                stack.enter_context(put(model, {layer: edit.indices}))
        yield model


def zero_for_good(student: PreTrainedModel, edits: Iterable[tuple[int, LayerEdit]]) -> list[str]:
    """Let ``student`` do without what ``edits`` take out; returns the names of the parameters that became zero.

    Raises:
        UserError: as in_force does; weights that shoal does not know, that are quantised, or that other layers use too.
    """
    by_part: dict[ComponentPart, LayerIndices] = defaultdict(dict)
    for layer, edit in edits:
        by_part[edit.part][layer] = edit.indices
    zeroed: list[str] = []
    for part, layers in by_part.items():
        zero = KINDS[part].for_good
        assert zero is not None, f"{part} is not taken out by zeros"
        zeroed += zero(student, layers)
    return zeroed


def stored_name(edits: LayerEdits) -> str:
    """How stored answers of sweeps name ``edits``. They are found again by this text, so it stays as it always was."""
    named = [f"({layer}, {KINDS[edit.part].stored.format(edit.indices)})" for layer, edit in edits]
    return f"({', '.join(named)}{',' if len(named) == 1 else ''})"
