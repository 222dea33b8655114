"""Hooks that silence attention, MLP or heads of single layers; zeroing.py does it for good in a student.

Hooks replace what the sublayer writes. No weight is copied or changed, and everything is undone when they are removed.
They act on every row of the batch, or on the rows that a RowsOfBatch names for the next forward.

B batch, S sequence, R rows with an edit, H query heads, d size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shoal.components import ComponentPart
from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.inference.answer_positions import answer_positions
from shoal.models.anatomy import decoder_body, decoder_layers, given_state, state_of, text_config, watched, with_state
from shoal.models.document_masks import documents_apart

from ..surgery.cut_model import skipped
from .sublayers import Sublayers, probe_ids, probing, silence, silent_output, sublayers, where

Half = Literal["attention", "mlp"]
AtPositions = Literal["skip_prompt", "skip_written"]
Replacement = Literal["zero", "mean", "resample"]
Hooks = Iterator[AbstractContextManager[object]]
"""What holds an edit of one layer in force until it is closed."""


@dataclass
class RowsOfBatch:
    """The rows for which an edit holds in the next forward. Hooks read it, and whoever runs the model sets it."""

    rows_R: Tensor
    """Their indices, int64, on the model's device."""
    num_rows: int
    """B"""


def layer_skipped(model: PreTrainedModel, layer: int, _: Sequence[int], rows: RowsOfBatch | None) -> Hooks:
    """``layer`` passes its input on, in some rows of the batch; None = in all.

    Raises:
        UserError: an index that is no layer, or the only one.
    """
    if rows is None:
        yield skipped(model, [layer])
        return
    inputs: list[Tensor] = []

    def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # indexing copies, as it must: some layers write into their input
        inputs[:] = [given_state(args, kwargs)[rows.rows_R]]

    def pass_on(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        return _with_rows(output, rows, inputs[0])

    module = decoder_layers(model)[layer]
    yield module.register_forward_pre_hook(remember, with_kwargs=True)
    yield module.register_forward_hook(pass_on)


def positions_skipped(
    part: AtPositions, model: PreTrainedModel, layer: int, _: Sequence[int], rows: RowsOfBatch | None
) -> Hooks:
    """``layer`` passes its input on before the answer positions (skip_prompt), or at these (skip_written).

    It runs on the states that come in at all positions: what other positions attend to inside it, and what a recurrent
    layer remembers, is what it was.

    Raises:
        UserError: in a forward of which nobody has said where its answer positions are.
    """
    inputs: list[Tensor] = []

    def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs[:] = [given_state(args, kwargs).clone()]  # some layers write into their input

    def pass_on(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        given_BSD = inputs[0]
        answer_BS = answer_positions(model, given_BSD.shape[1])
        passed_BSD = passed_on([part], answer_BS, given_BSD, state_of(output))
        return with_state(output, passed_BSD) if rows is None else _with_rows(output, rows, passed_BSD[rows.rows_R])

    module = decoder_layers(model)[layer]
    yield module.register_forward_pre_hook(remember, with_kwargs=True)
    yield module.register_forward_hook(pass_on)


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
    """Refuse a family whose layers do not hand on one state per row and position.

    Raises:
        UserError: naming it.
    """
    if model.device.type == "meta":  # streamed layer by layer, which takes families that hand on such a state alone
        return
    shapes: list[torch.Size] = []
    ids_1S = probe_ids(model)

    def note(_: int, args: Any, kwargs: Any) -> None:
        shapes.append(given_state(args, kwargs).shape)

    with probing(model), watched(decoder_layers(model), before=note):
        model(input_ids=ids_1S, use_cache=False)
    if strange := next((shape for shape in shapes if shape[:2] != ids_1S.shape), None):
        raise UserError(
            f"{text_config(model.config).model_type}: its layers hand on a state of shape {tuple(strange)} for "
            f"{ids_1S.shape[1]} tokens of one row, in which single positions cannot be skipped; leave skip_prompt and "
            "skip_written out of measure.sweep.operators"
        )


def state_multiplied(
    model: PreTrainedModel, layer: int, factor: float, rows: RowsOfBatch | None
) -> AbstractContextManager[object]:
    """The state that ``layer`` returns, or is made to return, times ``factor``, in some rows of the batch or in all."""

    def multiply(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if rows is None:
            return with_state(output, state_of(output) * factor)
        return _with_rows(output, rows, state_of(output)[rows.rows_R] * factor)

    return decoder_layers(model)[layer].register_forward_hook(multiply)


def half_silenced(half: Half, model: PreTrainedModel, layer: int, _: Sequence[int], rows: RowsOfBatch | None) -> Hooks:
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


def heads_masked(
    model: PreTrainedModel,
    layer: int,
    heads: Sequence[int],
    rows: RowsOfBatch | None,
    value_of: Callable[[Tensor, int], Tensor] | None = None,
) -> Hooks:
    """Zeros in the place of the contexts of single query ``heads``, or ``value_of`` all contexts and the head.

    A head's context is its slice of the output projection's input. Under grouped-query attention nothing else changes
    there; zeroing the value rows instead would silence all heads that share them.

    Raises:
        UserError: an index that is no layer or no head, or a layer whose heads cannot be masked alone.
    """
    halves = with_heads(model, layer)
    checked(heads, halves.num_heads, f"{where(model, layer)}: head")

    def mask(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        context = args[0].clone()
        intact_BSHd, context_BSHd = (states.unflatten(-1, (halves.num_heads, -1)) for states in (args[0], context))
        # one head at a time: two index lists side by side would be paired, not crossed
        for head in heads:
            value = 0 if value_of is None else value_of(intact_BSHd, head)
            context_BSHd[slice(None) if rows is None else rows.rows_R, ..., head, :] = value
        return (context, *args[1:])

    yield decoder_layers(model)[layer].get_submodule(halves.projection).register_forward_pre_hook(mask)


@contextmanager
def heads_replaced(
    model: PreTrainedModel,
    heads: Mapping[int, Sequence[int]],
    *,
    replacement: Replacement = "zero",
    means: Mapping[int, Tensor] | None = None,
    seed: int = 0,
    legacy_gqa: bool = False,
) -> Iterator[PreTrainedModel]:
    """``model`` with the contexts of single query heads (layer -> heads) replaced until the block ends.

    ``zero`` is heads_masked, ``mean`` puts the vectors of ``means`` (from head_means), ``resample`` the same head's
    context at the same position of another sequence of the batch: one permutation for all heads and layers, drawn from
    ``seed``, that leaves no sequence in its place. Positions must mean the same in all of them, so that padding is
    refused.

    ``legacy_gqa`` masks every head of the key-value groups that ``heads`` touch. The code published with arXiv
    2510.02091 does so; this is only for comparing with figures made by it.

    Raises:
        UserError: as heads_masked does, or ``mean`` without fitting means; at a forward, ``resample`` of a single
            sequence or of padded ones.
    """
    if replacement not in ("zero", "mean", "resample"):
        raise UserError(f"heads_replaced: replacement {replacement!r} is none; there is zero, mean and resample")
    if (replacement == "mean") != (means is not None):
        raise UserError(
            f"heads_replaced: replacement {replacement!r} and means do not fit; mean needs them, no other does"
        )

    def other_context(context_BSHd: Tensor, head: int) -> Tensor:
        return context_BSHd[_elsewhere(len(context_BSHd), seed).to(context_BSHd.device), ..., head, :]

    with ExitStack() as stack:
        if replacement == "resample":
            stack.enter_context(_padding_refused(model))
        for layer, chosen in heads.items():
            halves = with_heads(model, layer)
            value_of = other_context if replacement == "resample" else None
            if means is not None:
                value_of = partial(_mean_context, _mean_of(means, layer, halves, model))
            if legacy_gqa:
                checked(chosen, halves.num_heads, f"{where(model, layer)}: head")
                size = halves.num_heads // halves.num_kv_heads
                chosen = heads_of_groups(model, layer, sorted({head // size for head in chosen}))
            for hook in heads_masked(model, layer, chosen, None, value_of):
                stack.enter_context(hook)
        yield model


def head_means(
    model: PreTrainedModel, rows: PackedRows, layers: Sequence[int], *, batch_size: int
) -> dict[int, Tensor]:
    """Mean context of every query head over all tokens of ``rows``: layer -> (H, d), float64 on the CPU.

    Raises:
        UserError: no rows, an index that is no layer, a layer whose heads cannot be masked alone.
    """
    if len(rows) == 0:
        raise UserError("head_means: there is no token to average over; name a data source that holds text")
    sums: dict[int, Tensor] = {}

    def adding(layer: int) -> Any:
        def add(_: nn.Module, args: tuple[Any, ...]) -> None:
            total = args[0].flatten(0, -2).double().sum(0).cpu()
            sums[layer] = sums[layer] + total if layer in sums else total

        return add

    with ExitStack() as stack, probing(model):
        halves = {layer: with_heads(model, layer) for layer in layers}
        for layer, parts in halves.items():
            projection = decoder_layers(model)[layer].get_submodule(parts.projection)
            stack.enter_context(projection.register_forward_pre_hook(adding(layer)))
        for start in range(0, len(rows), batch_size):
            batch = slice(start, start + batch_size)
            ids_BS, positions_BS = (
                ids_NS[batch].to(model.device) for ids_NS in (rows.input_ids_NS, rows.position_ids_NS)
            )
            with documents_apart(decoder_body(model), positions_BS):
                decoder_body(model)(input_ids=ids_BS, position_ids=positions_BS, use_cache=False)
    num_tokens = rows.input_ids_NS.numel()
    return {layer: sums[layer].unflatten(0, (halves[layer].num_heads, -1)) / num_tokens for layer in layers}


def _with_rows(output: Any, rows: RowsOfBatch, values: Tensor) -> Any:
    """``output`` of a module with the states of some rows replaced by ``values``, whose first dimension is R."""
    if not len(rows.rows_R):
        return output
    changed = state_of(output).clone()
    changed.view(rows.num_rows, -1)[rows.rows_R] = values.reshape(len(rows.rows_R), -1)
    return with_state(output, changed)


def with_halves(model: PreTrainedModel, layer: int) -> Sublayers:
    """The halves of ``layer``.

    Raises:
        UserError: it is no layer, or a half of it cannot be silenced exactly.
    """
    checked([layer], len(decoder_layers(model)), "layer")
    halves = sublayers(model)[layer]
    if halves.refusal:
        raise UserError(halves.refusal)
    return halves


def with_heads(model: PreTrainedModel, layer: int) -> Sublayers:
    """The halves of ``layer``, the projection that reads its heads among them.

    Raises:
        UserError: it is no layer, or its heads cannot be masked alone.
    """
    checked([layer], len(decoder_layers(model)), "layer")
    halves = sublayers(model)[layer]
    if halves.head_refusal:
        raise UserError(halves.head_refusal)
    return halves


def checked(indices: Sequence[int], count: int, what: str) -> None:
    """Nothing, if all of ``indices`` are among ``count``; messages call one ``what``.

    Raises:
        UserError: one that is not.
    """
    for index in indices:
        if not 0 <= index < count:
            raise UserError(f"{what} {index}: is out of range; there are 0..{count - 1}")


def heads_of_groups(model: PreTrainedModel, layer: int, groups: Sequence[int]) -> list[int]:
    """The query heads that read the key-value heads ``groups`` of ``layer``.

    Raises:
        UserError: as with_heads does, and for a key-value head that is none.
    """
    halves = with_heads(model, layer)
    checked(groups, halves.num_kv_heads, f"{where(model, layer)}: key-value head")
    size = halves.num_heads // halves.num_kv_heads
    return [head for group in groups for head in range(group * size, (group + 1) * size)]


def _elsewhere(num_rows: int, seed: int) -> Tensor:
    """(B,) For every row another one: a random cycle through all of them."""
    if num_rows < 2:
        raise UserError(
            "heads_replaced: resample takes contexts from other sequences of the batch, and it has only one"
        )
    cycle = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))
    others = torch.empty_like(cycle)
    others[cycle] = cycle.roll(1)
    return others


@contextmanager
def _padding_refused(model: PreTrainedModel) -> Iterator[None]:
    def refuse(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask.all()):
            raise UserError("heads_replaced: resample needs sequences of one length, and some are padded")

    # callers may run the body alone, without the head
    with decoder_body(model).register_forward_pre_hook(refuse, with_kwargs=True):
        yield


def _mean_of(means: Mapping[int, Tensor], layer: int, halves: Sublayers, model: PreTrainedModel) -> Tensor:
    """(H, d) on the model's device."""
    mean = means.get(layer)
    if mean is None or mean.dim() != 2 or len(mean) != halves.num_heads:
        raise UserError(f"heads_replaced: means hold nothing for {where(model, layer)}; name the layer in head_means")
    return mean.to(model.device)


def _mean_context(mean_Hd: Tensor, context_BSHd: Tensor, head: int) -> Tensor:
    return mean_Hd[head].to(context_BSHd)
