"""The one table of what can be taken out of a layer: how it is counted and put in force.

Sweeps and orders of removals are said in components (shoal.components). Here they become edits of single layers, and
KINDS says of each part what is done with it:

| part        | swept by        | in force                                              |
| ----------- | --------------- | ----------------------------------------------------- |
| `layer`     | layer           | passes its input on; for good it is cut (surgery/)    |
| `skip_prompt`, `skip_written` | layer | passes its input on at these positions        |
| `attention` | layer           | adds nothing                                          |
| `mlp`       | layer           | adds nothing                                          |
| `head`      | query head      | its context is zero                                   |
| `kv_group`  | key-value head  | as the query heads that read it                       |
| `donor`     | layer           | the donor's layer runs                                |

To add a part: its name in ComponentPart, hooks in masks.py, and its row in KINDS.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedModel

from shoal.components import Component, ComponentPart, LayerEdit, LayerEdits
from shoal.models.anatomy import decoder_layers

from .masks import (
    Hooks,
    RowsOfBatch,
    half_silenced,
    heads_masked,
    heads_of_groups,
    layer_skipped,
    positions_skipped,
    refuse_states_without_positions,
    with_halves,
    with_heads,
)


def _half(model: PreTrainedModel, layer: int) -> Sequence[None]:
    with_halves(model, layer)
    return (None,)


@dataclass(frozen=True)
class Kind:
    """What is done with one part."""

    in_layer: Callable[[PreTrainedModel, int], Sequence[int | None]] | None = None
    """(model, layer) -> an index for each component of the layer; (None,) where it is the only one.

    Raises UserError for a layer out of which it cannot be taken exactly. None = it is the layer itself."""
    told_by: str = ""
    """Setting of a configuration that says how many components a layer has; empty = there is one."""
    heads: Callable[[PreTrainedModel, int, Sequence[int]], list[int]] | None = None
    """(model, layer, indices) -> the query heads by which it is taken out; then the rest is as with `head`."""
    hooks: Callable[..., Hooks] | None = None
    """(model, layer, rows), and of heads which, -> what puts it in force, in all rows where ``rows`` is None.

    None where it takes more than the model: a donor."""
    stored: str = ""
    """How stored answers of sweeps name its edit, with its indices at {}."""

    @property
    def is_inside(self) -> bool:
        """Whether it lies within a layer, so that it must be known where the layer keeps it."""
        return self.in_layer is not None


KINDS: dict[ComponentPart, Kind] = {
    "layer": Kind(hooks=layer_skipped, stored="Removed()"),
    "skip_prompt": Kind(hooks=partial(positions_skipped, "skip_prompt"), stored="Skipped(at='prompt')"),
    "skip_written": Kind(hooks=partial(positions_skipped, "skip_written"), stored="Skipped(at='written')"),
    "attention": Kind(
        _half,
        hooks=partial(half_silenced, "attention"),
        stored="Silenced(half='attention')",
    ),
    "mlp": Kind(
        _half,
        hooks=partial(half_silenced, "mlp"),
        stored="Silenced(half='mlp')",
    ),
    "head": Kind(
        lambda model, layer: range(with_heads(model, layer).num_heads),
        told_by="num_attention_heads",
        hooks=heads_masked,
        stored="Masked(heads={})",
    ),
    "kv_group": Kind(
        lambda model, layer: range(with_heads(model, layer).num_kv_heads),
        told_by="num_key_value_heads",
        heads=heads_of_groups,
    ),
    "donor": Kind(stored="Swapped()"),
}


def components_of(operator: str, model: PreTrainedModel, *, order: Sequence[int] = ()) -> tuple[Component, ...]:
    """What a sweep with ``operator`` takes out of ``model``, one after the other; ``order`` is for cumulative ones.

    Raises:
        UserError: a model whose halves, heads or positions cannot be taken out one by one.
    """
    if operator == "cumulative":
        return tuple(Component(tuple(order[:count])) for count in range(1, len(order) + 1))
    if operator not in KINDS:
        raise ValueError(f"no operator {operator!r}")
    if LayerEdit(operator).at_positions:
        refuse_states_without_positions(model)
    in_layer = KINDS[operator].in_layer or (lambda *_: (None,))
    layers = range(len(decoder_layers(model)))
    return tuple(Component((layer,), operator, index) for layer in layers for index in in_layer(model, layer))


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


def hooks_of(model: PreTrainedModel, layer: int, edit: LayerEdit, rows: RowsOfBatch | None) -> Hooks:
    """What puts ``edit`` of ``layer`` in force, in all rows of a batch where ``rows`` is None; nothing for a donor."""
    if (hooks := KINDS[edit.part].hooks) is not None:
        yield from hooks(model, layer, rows, *([edit.indices] if edit.part == "head" else []))


@contextmanager
def in_force(model: PreTrainedModel, edits: Iterable[tuple[int, LayerEdit]]) -> Iterator[PreTrainedModel]:
    """``model`` with ``edits`` in force until the block ends, but for those that take a donor.

    Raises:
        UserError: an index that is no layer or no head, a part that cannot be taken out exactly.
    """
    with ExitStack() as stack:
        for layer, edit in edits:
            for hook in hooks_of(model, layer, edit, None):
                stack.enter_context(hook)
        yield model


def stored_name(edits: LayerEdits) -> str:
    """How stored answers of sweeps name ``edits``. They are found again by this text, so it stays as it always was."""
    named = [f"({layer}, {KINDS[edit.part].stored.format(edit.indices)})" for layer, edit in edits]
    return f"({', '.join(named)}{',' if len(named) == 1 else ''})"
