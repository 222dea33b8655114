"""Silence attention, MLP or heads of single layers while a block runs; zeroing.py does it for good in a student.

Hooks replace what the sublayer writes. No weight is copied or changed, and everything is undone when the block ends.

B batch, S sequence, R rows with an edit, H query heads, d size of a head.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.models.anatomy import decoder_body, decoder_layers, given_state, state_of, with_state
from shoal.models.document_masks import documents_apart

from .sublayers import Sublayers, probing, silence, silent_output, sublayers, where

Half = Literal["attention", "mlp"]
Replacement = Literal["zero", "mean", "resample"]


@contextmanager
def attention_skipped(model: PreTrainedModel, layers: Collection[int]) -> Iterator[PreTrainedModel]:
    """``model`` with the attention (or what mixes tokens in its place) of ``layers`` adding nothing to the residual
    stream, until the block ends. It still runs, because a KV cache counts on every layer's slot.

    Raises:
        UserError: an index that is no layer, or a layer whose half cannot be taken out exactly.
    """
    with _silenced(model, layers, "attention"):
        yield model


@contextmanager
def mlp_skipped(model: PreTrainedModel, layers: Collection[int]) -> Iterator[PreTrainedModel]:
    """``model`` with the MLP or mixture of experts of ``layers`` adding nothing, until the block ends.

    Raises:
        UserError: as attention_skipped does.
    """
    with _silenced(model, layers, "mlp"):
        yield model


@contextmanager
def heads_masked(
    model: PreTrainedModel,
    heads: Mapping[int, Sequence[int]],
    *,
    replacement: Replacement = "zero",
    means: Mapping[int, Tensor] | None = None,
    seed: int = 0,
    legacy_gqa: bool = False,
) -> Iterator[PreTrainedModel]:
    """``model`` with the contexts of single query heads (layer -> heads) replaced until the block ends.

    A head's context is its slice of the output projection's input. Under grouped-query attention nothing else changes
    there; zeroing the value rows instead would silence all heads that share them.

    ``zero`` puts zeros there, ``mean`` the vectors of ``means`` (from head_means), ``resample`` the same head's context
    at the same position of another sequence of the batch: one permutation for all heads and layers, drawn from
    ``seed``, that leaves no sequence in its place. Positions must mean the same in all of them, so that padding is
    refused.

    ``legacy_gqa`` masks every head of the key-value groups that ``heads`` touch. The code published with arXiv
    2510.02091 does so; this is only for comparing with figures made by it.

    Raises:
        UserError: an index that is no layer or no head, a layer whose heads cannot be masked alone, ``mean`` without
            fitting means; at a forward, ``resample`` of a single sequence or of padded ones.
    """
    if replacement not in ("zero", "mean", "resample"):
        raise UserError(f"heads_masked: replacement {replacement!r} is none; there is zero, mean and resample")
    if (replacement == "mean") != (means is not None):
        raise UserError(
            f"heads_masked: replacement {replacement!r} and means do not fit; mean needs them, no other does"
        )
    with ExitStack() as stack:
        if replacement == "resample":
            stack.enter_context(_padding_refused(model))
        for layer, named in heads.items():
            halves = with_heads(model, layer)
            chosen = checked(named, halves.num_heads, f"{where(model, layer)}: head")
            if legacy_gqa:
                chosen = _of_groups(halves, sorted({head // halves.heads_per_group for head in chosen}))
            mean_Hd = None if means is None else _mean_of(means, layer, halves, model)
            projection = decoder_layers(model)[layer].get_submodule(halves.projection)
            stack.enter_context(_masked(projection, halves.num_heads, chosen, replacement, mean_Hd, seed))
        yield model


@contextmanager
def kv_groups_masked(
    model: PreTrainedModel,
    groups: Mapping[int, Sequence[int]],
    *,
    replacement: Replacement = "zero",
    means: Mapping[int, Tensor] | None = None,
    seed: int = 0,
) -> Iterator[PreTrainedModel]:
    """``model`` with all query heads that read the named key-value heads (layer -> key-value heads) masked, as
    heads_masked does it.

    Raises:
        UserError: as heads_masked does.
    """
    heads = {layer: heads_of_groups(model, layer, named) for layer, named in groups.items()}
    with heads_masked(model, heads, replacement=replacement, means=means, seed=seed):
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


@contextmanager
def _silenced(model: PreTrainedModel, layers: Collection[int], half: Half) -> Iterator[None]:
    with ExitStack() as stack:
        for layer in layers:
            for name in getattr(with_halves(model, layer), half):
                stack.enter_context(silence(decoder_layers(model)[layer].get_submodule(name)))
        yield


@dataclass
class RowsOfBatch:
    """The rows for which an edit holds in the next forward. Hooks read it, and whoever runs the model sets it."""

    rows_R: Tensor
    """Their indices, int64, on the model's device."""
    num_rows: int
    """B"""


def layer_skipped_on_rows(
    model: PreTrainedModel, layer: int, _: Sequence[int], rows: RowsOfBatch
) -> Iterator[RemovableHandle]:
    """Hooks that let ``layer`` pass its input on in some rows of the batch."""
    inputs: list[Tensor] = []

    def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # indexing copies, as it must: some layers write into their input
        inputs[:] = [given_state(args, kwargs)[rows.rows_R]]

    def pass_on(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        return _with_rows(output, rows, inputs[0])

    module = decoder_layers(model)[layer]
    yield module.register_forward_pre_hook(remember, with_kwargs=True)
    yield module.register_forward_hook(pass_on)


def half_silenced_on_rows(
    half: Half, model: PreTrainedModel, layer: int, _: Sequence[int], rows: RowsOfBatch
) -> Iterator[RemovableHandle]:
    """Hooks that let one half of ``layer`` add nothing in some rows of the batch."""

    def silencing(module: nn.Module) -> Any:
        def silence_rows(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            silent = silent_output(module, args, kwargs, output)
            # experts may return all tokens in one dimension (B * S, D): one row of this is all of a row's tokens
            return _with_rows(output, rows, silent.reshape(rows.num_rows, -1)[rows.rows_R])

        return silence_rows

    for name in getattr(with_halves(model, layer), half):
        module = decoder_layers(model)[layer].get_submodule(name)
        yield module.register_forward_hook(silencing(module), with_kwargs=True)


def heads_masked_on_rows(
    model: PreTrainedModel, layer: int, heads: Sequence[int], rows: RowsOfBatch
) -> Iterator[RemovableHandle]:
    """Hooks that put zeros in the place of the contexts of ``heads`` in some rows of the batch."""
    halves = with_heads(model, layer)

    def mask(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        context = args[0].clone()
        context_BSHd = context.unflatten(-1, (halves.num_heads, -1))
        # one head at a time: two index lists side by side would be paired, not crossed
        for head in heads:
            context_BSHd[rows.rows_R, ..., head, :] = 0
        return (context, *args[1:])

    yield decoder_layers(model)[layer].get_submodule(halves.projection).register_forward_pre_hook(mask)


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


def checked(indices: Sequence[int], count: int, what: str) -> list[int]:
    """``indices`` if all of them are among ``count``; messages call one ``what``.

    Raises:
        UserError: one that is not.
    """
    for index in indices:
        if not 0 <= index < count:
            raise UserError(f"{what} {index}: is out of range; there are 0..{count - 1}")
    return list(indices)


def heads_of_groups(model: PreTrainedModel, layer: int, groups: Sequence[int]) -> list[int]:
    """The query heads that read the key-value heads ``groups`` of ``layer``.

    Raises:
        UserError: as with_heads does, and for a key-value head that is none.
    """
    halves = with_heads(model, layer)
    return _of_groups(halves, checked(groups, halves.num_kv_heads, f"{where(model, layer)}: key-value head"))


def _of_groups(halves: Sublayers, groups: Sequence[int]) -> list[int]:
    size = halves.heads_per_group
    return [head for group in groups for head in range(group * size, (group + 1) * size)]


def _masked(
    projection: nn.Module,
    num_heads: int,
    heads: list[int],
    replacement: Replacement,
    mean_Hd: Tensor | None,
    seed: int,
) -> RemovableHandle:
    def mask(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        context = args[0].clone()
        context_BSHd = context.unflatten(-1, (num_heads, -1))
        if replacement == "resample":
            others = _elsewhere(len(context), seed).to(context.device)
            value: Any = args[0].unflatten(-1, (num_heads, -1))[others][..., heads, :]
        else:
            value = 0 if mean_Hd is None else mean_Hd[heads].to(context)
        context_BSHd[..., heads, :] = value
        return (context, *args[1:])

    return projection.register_forward_pre_hook(mask)


def _elsewhere(num_rows: int, seed: int) -> Tensor:
    """(B,) For every row another one: a random cycle through all of them."""
    if num_rows < 2:
        raise UserError("heads_masked: resample takes contexts from other sequences of the batch, and it has only one")
    cycle = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))
    others = torch.empty_like(cycle)
    others[cycle] = cycle.roll(1)
    return others


@contextmanager
def _padding_refused(model: PreTrainedModel) -> Iterator[None]:
    def refuse(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask.all()):
            raise UserError("heads_masked: resample needs sequences of one length, and some are padded")

    # callers may run the body alone, without the head
    with decoder_body(model).register_forward_pre_hook(refuse, with_kwargs=True):
        yield


def _mean_of(means: Mapping[int, Tensor], layer: int, halves: Sublayers, model: PreTrainedModel) -> Tensor:
    """(H, d) on the model's device."""
    mean = means.get(layer)
    if mean is None or mean.dim() != 2 or len(mean) != halves.num_heads:
        raise UserError(f"heads_masked: means hold nothing for {where(model, layer)}; name the layer in head_means")
    return mean.to(model.device)
