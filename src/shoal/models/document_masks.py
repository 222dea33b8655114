"""Documents that share a row stay apart, also in families that forget positions when they make masks.

transformers' mask functions see from position ids where a document begins, but some families do not pass them on
(gpt-oss, AFMoE, Bloom, MPT, OPT, XGLM): there every document would read those before it. Flash kernels take no masks:
they are told where documents begin in all rows, one behind the other. B batch, S sequence, C documents, N rows.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, masking_utils
from transformers.utils.generic import is_flash_attention_requested

from shoal.models.anatomy import decoder_body
from shoal.models.packed_attention import Documents, replaces
from shoal.runtime import device, queued

MASKS = ("create_causal_mask", "create_sliding_window_causal_mask", "create_chunked_causal_mask")
"""Functions of transformers that read from positions where documents begin."""


def document_starts(position_ids_BS: Tensor) -> Tensor:
    """Whether a token is the first of its document or row, (B, S)."""
    first_BS = torch.ones_like(position_ids_BS, dtype=torch.bool)
    first_BS[:, 1:] = position_ids_BS[:, 1:] != position_ids_BS[:, :-1] + 1
    return first_BS


def document_borders(position_ids_BS: Tensor | None, device: torch.device) -> dict[str, Any]:
    """Keyword arguments by which flash kernels know the documents: where they begin in the B x S tokens of all rows and
    where the last one ends, (C + 1,), and the length of the longest."""
    assert position_ids_BS is not None, "rows of one document each have no borders to know"
    starts_C = document_starts(position_ids_BS).flatten().nonzero()[:, 0]
    borders = torch.cat([starts_C, starts_C.new_tensor([position_ids_BS.numel()])]).int()
    longest, borders = int(borders.diff().max()), borders.to(device, non_blocking=True)
    return {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest}


_own_borders = document_borders
"""Itself, whatever is in its place while documents are known."""


@contextmanager
def documents_known(position_ids_BS: Tensor | None, device: torch.device) -> Iterator[None]:
    """While models run on rows with these positions, which are in host memory, masks and flash kernels take the
    documents from here; None = every row is one document.

    Left alone transformers compares positions on the device, and asks there whether a row holds more than one document:
    once per kind of mask and forward, with whatever was to be done before it still in the queue.
    """
    first_BS = None if position_ids_BS is None else document_starts(position_ids_BS)
    documents_BS = queued(first_BS.cumsum(1), device) if first_BS is not None and first_BS[:, 1:].any() else None
    # both functions are looked up in their modules at every call, so that replacing them there is enough
    asked = patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: documents_BS)
    borders = cache(partial(_own_borders, position_ids_BS, device))
    with asked, patch.object(sys.modules[__name__], "document_borders", lambda position_ids_BS, device: borders()):
        yield


@contextmanager
def documents_apart(decoder: nn.Module, position_ids_BS: Tensor | None) -> Iterator[None]:
    """While ``decoder`` (see anatomy.decoder_body) runs on these positions, its masks are made from them; flash kernels
    get the documents' borders from them."""
    module = sys.modules.get(type(decoder).__module__)
    theirs: dict[str, Callable[..., Any]] = {name: getattr(masking_utils, name) for name in MASKS}
    patched = {name: original for name, original in theirs.items() if getattr(module, name, None) is original}
    config: Any = getattr(decoder, "config", None)

    @cache
    def documents(rows: int, device: torch.device, window: int | None) -> Documents:
        assert position_ids_BS is not None
        # by its name in this module: who knows the borders on the host puts them there
        told = document_borders(position_ids_BS.expand(rows, -1), device)
        return Documents(told["cu_seq_lens_q"], told["max_length_q"], window)

    def with_positions(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if position_ids_BS is not None and not args and replaces(make, kwargs):
            tokens, is_sliding = kwargs["inputs_embeds"], "sliding" in make.__name__
            return documents(len(tokens), tokens.device, kwargs["config"].sliding_window if is_sliding else None)
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = position_ids_BS
        return make(*args, **kwargs)

    with ExitStack() as stack:
        for name, original in patched.items():
            setattr(module, name, partial(with_positions, original))
            stack.callback(setattr, module, name, original)
        if position_ids_BS is not None and config is not None and is_flash_attention_requested(config):
            stack.enter_context(_borders_handed(decoder, position_ids_BS))
        yield


def _borders_handed(decoder: nn.Module, position_ids_BS: Tensor) -> RemovableHandle:
    """Until this is removed the decoder is called with the documents' borders, where it reads whole rows and nothing is
    padded or cached.

    As arguments, because gradient checkpointing calls layers again with what they were called with. Families that do
    not pass them on are known (families.no_flash).
    """

    def hand(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if any(kwargs.get(name) is not None for name in ("attention_mask", "cache", "past_key_values")):
            return args, kwargs
        inputs = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args]
        tokens = next(each for each in inputs if each is not None)
        return args, {**kwargs, **document_borders(position_ids_BS.expand(len(tokens), -1), tokens.device)}

    return decoder.register_forward_pre_hook(hand, with_kwargs=True)


TOKENS = 64
"""Tokens of the first row that the model is tried on."""
LOOKED_AT = 64
"""Rows in which documents are looked for."""
BEYOND_ROUNDING = 0.05
"""Share of a state's norm: in bfloat16 experts may round otherwise when other tokens come to them."""

IN_TRAINING = "Teacher and student see the same rows; a shorter distill.sequence_length puts fewer documents into a row"
WHILE_MEASURED = (
    "This affects metrics of states and gradients, removal factors and diagnostics; a shorter "
    "measure.sequence_length puts fewer documents into a row"
)

log = logging.getLogger(__name__)


@torch.no_grad()
def warn_of_mixed_documents(
    model: PreTrainedModel,
    input_ids_NS: Tensor,
    position_ids_NS: Tensor,
    consequence: str,
    *,
    autocast_dtype: torch.dtype | None = None,
) -> None:
    """Log where rows hold several documents and this model, which can run, carries something from one to the next;
    ``consequence`` says what follows and what helps.

    ``autocast_dtype``: precision in which it runs; None = the weights' own.
    """
    if not (position_ids_NS[:LOOKED_AT, 1:] == 0).any():
        return
    # what accelerate offloads has no device until it runs
    where = device() if model.device.type == "meta" else model.device
    ids_1S = input_ids_NS[:1, :TOKENS].long().to(where)
    with nullcontext() if autocast_dtype is None else torch.autocast(where.type, autocast_dtype):
        if _documents_meet(model, ids_1S):
            log.warning(
                "%s: documents that share a row see each other: layers of this family carry a state from token to "
                "token and ignore document borders. %s",
                model.config.model_type,
                consequence,
            )


def _documents_meet(model: PreTrainedModel, ids_1S: Tensor) -> bool:
    """Whether the beginning of a row's second document changes with the first one, by more than rounding."""
    half = ids_1S.shape[1] // 2
    first, second = ids_1S[:, :half], ids_1S[:, half : 2 * half]
    positions_1S = torch.arange(half, device=first.device).repeat(1, 2)
    decoder: Any = decoder_body(model)
    after = []
    for before in (first, first.roll(1, 1)):  # the same second document after the same words in another order
        with documents_apart(decoder, positions_1S):
            ids_1S = torch.cat([before, second], 1)
            states_1SD = decoder(input_ids=ids_1S, position_ids=positions_1S, use_cache=False).last_hidden_state
        after.append(states_1SD[0, half : half + 4].float())
    after_one, after_other = after
    change = (after_one - after_other).norm(dim=-1) / after_one.norm(dim=-1)
    return bool(change.mean() > BEYOND_ROUNDING)
