"""What can be taken out of a layer: one table of how it is counted, and hooks that put it in force.

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

To add a part: its name in ComponentPart, hooks, and its row in KINDS.

Hooks replace what a layer or a half of it writes. No weight is copied or changed, and everything is undone when they
are removed. They act on every row of the batch, or on the rows that a RowsOfBatch names for the next forward.

B batch, S sequence, R rows with an edit, H query heads, d size of a head.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shoal.components import Component, ComponentPart, LayerEdit, LayerEdits
from shoal.errors import UserError
from shoal.inference.decoder import answer_positions
from shoal.models.anatomy import decoder_layers, given_state, state_of, text_config, watched, with_state

from ..surgery.cut_model import skipped
from .sublayers import Sublayers, probe_ids, probing, silence, silent_output, sublayers, where

Half = Literal["attention", "mlp"]
AtPositions = Literal["skip_prompt", "skip_written"]
Hooks = Iterator[AbstractContextManager[object]]
"""What holds an edit of one layer in force until it is closed."""


@dataclass
class RowsOfBatch:
    """The rows for which an edit holds in the next forward. Hooks read it, and whoever runs the model sets it."""

    rows_R: Tensor
    """Their indices, int64, on the model's device."""
    num_rows: int
    """B"""


def layer_skipped(model: PreTrainedModel, layer: int, rows: RowsOfBatch | None) -> Hooks:
    """``layer`` passes its input on, in some rows of the batch; None = in all.

    Raises:
        UserError: an index that is no layer, or the only one.
    """
    if rows is None:
        yield skipped(model, [layer])
    else:
        yield from _replaced(decoder_layers(model)[layer], lambda given_BSD, _: given_BSD, rows)


def positions_skipped(part: AtPositions, model: PreTrainedModel, layer: int, rows: RowsOfBatch | None) -> Hooks:
    """``layer`` passes its input on before the answer positions (skip_prompt), or at these (skip_written).

    It runs on the states that come in at all positions: what other positions attend to inside it, and what a recurrent
    layer remembers, is what it was.

    Raises:
        UserError: in a forward of which nobody has said where its answer positions are.
    """

    def pass_on(given_BSD: Tensor, output: Any) -> Tensor:
        return passed_on([part], answer_positions(model, given_BSD.shape[1]), given_BSD, state_of(output))

    yield from _replaced(decoder_layers(model)[layer], pass_on, rows)


def _replaced(module: nn.Module, state: Callable[[Tensor, Any], Tensor], rows: RowsOfBatch | None) -> Hooks:
    """What ``state`` makes of the state that ``module`` gets and what it returns stands in the place of its state."""
    inputs: list[Tensor] = []

    def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs[:] = [given_state(args, kwargs).clone()]  # some layers write into their input

    def replace(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        made_BSD = state(inputs[0], output)
        return with_state(output, made_BSD) if rows is None else _with_rows(output, rows, made_BSD[rows.rows_R])

    yield module.register_forward_pre_hook(remember, with_kwargs=True)
    yield module.register_forward_hook(replace)


def passed_on(parts: Sequence[ComponentPart], answer_BS: Tensor, given_BSD: Tensor, made_BSD: Tensor) -> Tensor:
    """(B, S, D) ``given_BSD``, which a layer got, where ``parts`` pass that on, elsewhere ``made_BSD`` of its own."""
    skipped_BS = torch.zeros_like(answer_BS)
    if "skip_prompt" in parts:
        skipped_BS = ~answer_BS
    if "skip_written" in parts:
        skipped_BS = skipped_BS | answer_BS
    # a state may have more than one dimension behind the sequence, as with hyper-connections
    return torch.where(skipped_BS.view(*skipped_BS.shape, *[1] * (given_BSD.dim() - 2)), given_BSD, made_BSD)


def refuse_states_without_positions(model: PreTrainedModel) -> None:
    """Refuse a family whose layers do not hand on one state per row and position."""
    shapes: list[torch.Size] = []
    ids_1S = probe_ids(model)

    def note(_: int, args: Any, kwargs: Any) -> None:
        shapes.append(given_state(args, kwargs).shape)

    with probing(model), watched(decoder_layers(model), before=note):
        model(input_ids=ids_1S, use_cache=False)
    if strange := next((shape for shape in shapes if shape[:2] != ids_1S.shape), None):
        raise UserError(
            f"{text_config(model.config).model_type}: its layers pass on a state of shape {tuple(strange)} for "
            f"{ids_1S.shape[1]} tokens of one row, so single positions cannot be skipped; remove skip_prompt and "
            "skip_written from measure.sweep.operators"
        )


def half_silenced(half: Half, model: PreTrainedModel, layer: int, rows: RowsOfBatch | None) -> Hooks:
    """One half of ``layer`` (or what mixes tokens in the attention's place) adds nothing to the residual stream.

    It still runs, because a KV cache counts on every layer's slot.

    Raises:
        UserError: an index that is no layer, or a layer whose half cannot be taken out exactly.
    """

    def silence_rows(
        rows: RowsOfBatch, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        silent = silent_output(module, args, kwargs, output)
        # experts may return all tokens in one dimension (B * S, D): one row of this is all of a row's tokens
        return _with_rows(output, rows, silent.reshape(rows.num_rows, -1)[rows.rows_R])

    for name in getattr(with_halves(model, layer), half):
        module = decoder_layers(model)[layer].get_submodule(name)
        if rows is None:
            yield silence(module)
        else:
            yield module.register_forward_hook(partial(silence_rows, rows), with_kwargs=True)


def heads_masked(model: PreTrainedModel, layer: int, rows: RowsOfBatch | None, heads: Sequence[int]) -> Hooks:
    """Zeros in the place of the contexts of single query ``heads``.

    A head's context is its slice of the output projection's input. Under grouped-query attention nothing else changes
    there; zeroing the value rows instead would silence all heads that share them.

    Raises:
        UserError: an index that is no layer or no head, or a layer whose heads cannot be masked alone.
    """
    halves = with_heads(model, layer)
    checked(heads, halves.num_heads, f"{where(model, layer)}: head")

    def mask(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        context = args[0].clone()
        context_BSHd = context.unflatten(-1, (halves.num_heads, -1))
        # one head at a time: two index lists side by side would be paired, not crossed
        for head in heads:
            context_BSHd[slice(None) if rows is None else rows.rows_R, ..., head, :] = 0
        return (context, *args[1:])

    yield decoder_layers(model)[layer].get_submodule(halves.projection).register_forward_pre_hook(mask)


def _with_rows(output: Any, rows: RowsOfBatch, values: Tensor) -> Any:
    """``output`` of a module with the states of some rows replaced by ``values``, whose first dimension is R."""
    if not len(rows.rows_R):
        return output
    changed = state_of(output).clone()
    changed.view(rows.num_rows, -1)[rows.rows_R] = values.reshape(len(rows.rows_R), -1)
    return with_state(output, changed)


def with_halves(model: PreTrainedModel, layer: int, *, heads: bool = False) -> Sublayers:
    """The halves of ``layer``, with ``heads`` the projection that reads its heads among them."""
    checked([layer], len(decoder_layers(model)), "layer")
    halves = sublayers(model)[layer]
    if refusal := halves.head_refusal if heads else halves.refusal:
        raise UserError(refusal)
    return halves


with_heads = partial(with_halves, heads=True)


def checked(indices: Sequence[int], count: int, what: str) -> None:
    """Nothing, if all of ``indices`` are among ``count``; messages call one ``what``."""
    for index in indices:
        if not 0 <= index < count:
            raise UserError(f"{what} {index}: is out of range; the indices are 0 to {count - 1}")


def heads_of_groups(model: PreTrainedModel, layer: int, groups: Sequence[int]) -> list[int]:
    """The query heads that read the key-value heads ``groups`` of ``layer``.

    Raises:
        UserError: as with_heads does, and for a key-value head that is none.
    """
    halves = with_heads(model, layer)
    checked(groups, halves.num_kv_heads, f"{where(model, layer)}: key-value head")
    size = halves.num_heads // halves.num_kv_heads
    return [head for group in groups for head in range(group * size, (group + 1) * size)]


def _half(model: PreTrainedModel, layer: int) -> Sequence[None]:
    with_halves(model, layer)
    return (None,)


@dataclass(frozen=True)
class Kind:
    """What is done with one part."""

    in_layer: Callable[[PreTrainedModel, int], Sequence[int | None]] | None = None
    """(model, layer) -> an index for each component of the layer; (None,) where it is the only one.

    Raises UserError for a layer out of which it cannot be taken exactly. None = it is the layer itself."""
    heads: Callable[[PreTrainedModel, int, Sequence[int]], list[int]] | None = None
    """(model, layer, indices) -> the query heads by which it is taken out; then the rest is as with `head`."""
    hooks: Callable[..., Hooks] | None = None
    """(model, layer, rows), and of heads which, -> what puts it in force, in all rows where ``rows`` is None.

    None where it takes more than the model: a donor."""


KINDS: dict[ComponentPart, Kind] = {
    "layer": Kind(hooks=layer_skipped),
    "skip_prompt": Kind(hooks=partial(positions_skipped, "skip_prompt")),
    "skip_written": Kind(hooks=partial(positions_skipped, "skip_written")),
    "attention": Kind(_half, hooks=partial(half_silenced, "attention")),
    "mlp": Kind(_half, hooks=partial(half_silenced, "mlp")),
    "head": Kind(lambda model, layer: range(with_heads(model, layer).num_heads), hooks=heads_masked),
    "kv_group": Kind(lambda model, layer: range(with_heads(model, layer).num_kv_heads), heads=heads_of_groups),
    "donor": Kind(),
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


@contextmanager
def in_force(
    model: PreTrainedModel,
    edits: Iterable[tuple[int, LayerEdit]],
    rows: Mapping[tuple[int, LayerEdit], RowsOfBatch] | None = None,
) -> Iterator[PreTrainedModel]:
    """``model`` with ``edits`` in force until the block ends, but for those that take a donor; each in its ``rows`` of
    a batch, None = in all.

    Raises:
        UserError: an index that is no layer or no head, a part that cannot be taken out exactly.
    """
    with ExitStack() as stack:
        for layer, edit in edits:
            if (hooks := KINDS[edit.part].hooks) is not None:
                heads = [edit.indices] if edit.part == "head" else []
                for hook in hooks(model, layer, None if rows is None else rows[layer, edit], *heads):
                    stack.enter_context(hook)
        yield model
