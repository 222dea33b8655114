"""What scoring and generation need of a model: hidden states, logits where wanted, and a cache whose rows branch.

An answer position is one whose next token is scored or written: from the last token of the prompt on. Neither ids nor
masks show where a prompt ends, so scoring and writing say it forward by forward, to edits that hold at some positions.

B batch, S sequence, D hidden, V vocabulary, N positions.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from shoal.errors import UserError
from shoal.models.anatomy import decoder_body, refuse_both_directions, text_config
from shoal.models.document_masks import documents_known
from shoal.models.families import family
from shoal.models.load import logits_from_hidden, not_finite_in
from shoal.runtime import queued

_told: WeakKeyDictionary[PreTrainedModel, Tensor | int] = WeakKeyDictionary()


@contextmanager
def answers_at(model: PreTrainedModel, positions: Tensor | int | None) -> Iterator[None]:
    """Say of the forwards of ``model`` inside the block which positions predict an answer: (B or 1, S), bool.

    A number is the length of prompts that end together, after which text is written: forwards as long as that hold the
    prompts, with or without a text behind them, and shorter ones text alone. None says nothing.
    """
    before = _told.pop(model, None)
    if positions is not None:
        _told[model] = positions
    try:
        yield
    finally:
        _told.pop(model, None)
        if before is not None:
            _told[model] = before


def answer_positions(model: PreTrainedModel, num_positions: int) -> Tensor:
    """(B or 1, S) True at the positions of the running forward that predict an answer.

    Raises:
        UserError: nobody has said so, or of a forward of another length.
    """
    told = _told.get(model)
    if isinstance(told, int):
        columns_S = torch.arange(num_positions, device=model.device)
        return (columns_S >= (told - 1 if num_positions >= told else 0)).unsqueeze(0)
    if told is None or told.shape[1] != num_positions:
        raise UserError(
            f"skip_prompt and skip_written: the ends of the prompts of these {num_positions} positions are unknown; "
            "score and write with shoal's Decoder, or run the model inside answers_at()"
        )
    return told


LOGIT_ELEMENTS = 2**25
"""Largest number of fp32 logits held at one time (128 MiB, and their log-softmax as much again)."""
ENOUGH_TOKENS = {"cpu": 128}
"""Tokens from which on a forward gains nothing by more of them, by device type; 4096 elsewhere."""


class Decoder:
    """A causal language model, taken apart at its final hidden states.

    Raises:
        UserError: for an architecture whose head shoal would apply in another way than the model itself, or whose
            tokens see those behind them.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        refuse_both_directions(model.config)
        self.model = model
        self.device = model.device
        self._body: Any = decoder_body(model)
        self._head: Any = model.get_output_embeddings()
        self._to_logits = logits_from_hidden(model)
        parameters = inspect.signature(self._body.forward).parameters
        self._takes_positions = "position_ids" in parameters
        # transformers renames this argument from one minor version to the next
        self._cache_name = next((name for name in ("cache", "past_key_values") if name in parameters), None)
        self.can_branch = (
            self._cache_name is not None
            and not family(text_config(model.config).model_type).no_branch
            and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in self.new_cache().layers)
        )
        """True where rows of the cache are keys and values that can be copied; recurrent models get full forwards."""
        self._check_head()

    def new_cache(self) -> DynamicCache:
        """An empty cache of the model's own kind: sliding layers forget what left their window."""
        return DynamicCache(config=self.model.config)

    @torch.no_grad()
    def hidden(
        self,
        input_ids_BS: Tensor,
        *,
        mask: Tensor | None = None,
        position_ids_BS: Tensor | None = None,
        cache: DynamicCache | None = None,
        answer_BS: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states (B, S, D) of rows that are one document each; ``cache`` is extended, ``mask`` covers what
        it holds and the new tokens.

        ``answer_BS`` is True where an answer is predicted; only edits that hold there ask for it.
        """
        arguments = self.arguments(input_ids_BS, mask=mask, position_ids_BS=position_ids_BS, cache=cache)
        with answers_at(self.model, answer_BS), documents_known(None, self.device):
            return self._body(**arguments).last_hidden_state

    def arguments(
        self,
        input_ids_BS: Tensor,
        *,
        mask: Tensor | None = None,
        position_ids_BS: Tensor | None = None,
        cache: DynamicCache | None = None,
    ) -> dict[str, Any]:
        """Keyword arguments with which `hidden` calls the model's body; without a mask, where nothing is padded,
        attention takes its faster, purely causal path."""
        arguments: dict[str, Any] = {"input_ids": input_ids_BS, "use_cache": cache is not None}
        if cache is not None:
            assert self._cache_name is not None, "a model that takes no cache was given one"
            arguments[self._cache_name] = cache
        if mask is not None:
            arguments["attention_mask"] = mask
        if position_ids_BS is not None and self._takes_positions:
            arguments["position_ids"] = position_ids_BS
        return arguments

    @torch.no_grad()
    def logits(self, hidden_ND: Tensor) -> Tensor:
        """fp32 logits (N, V), scaled and capped as the model does it."""
        return self._to_logits(hidden_ND, self._head).float()

    def positions_at_once(self) -> int:
        """Positions whose logits fit into LOGIT_ELEMENTS; at least 1."""
        return max(1, LOGIT_ELEMENTS // text_config(self.model.config).vocab_size)

    @property
    def enough_tokens(self) -> int:
        """Tokens from which on a batch rather ends than takes in more padding."""
        return ENOUGH_TOKENS.get(self.device.type, 4096)

    @cached_property
    def cache_bytes(self) -> int:
        """Bytes of one token's keys and values, by trying; families differ too much to work it out."""
        cache = self.new_cache()
        # one token through all layers: what the cache holds then is what each token adds
        self.hidden(torch.zeros(1, 1, dtype=torch.long, device=self.device), cache=cache)
        slots: Any = cache.layers
        return sum(slot.keys.nbytes + slot.values.nbytes for slot in slots if slot.keys is not None)

    def left_padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, mask and position ids (B, S) of rows that end together, as a cache that goes on needs them.

        A sliding window counts cache slots, so no padding may lie between a row's tokens.
        """
        longest = max(map(len, rows))
        ids = queued(torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows]), self.device)
        mask = queued(torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]), self.device)
        return ids, mask, (mask.cumsum(dim=1) - 1).clamp(min=0)  # padding gets position 0, which nobody attends to

    def right_padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Token ids (B, S); what follows a row cannot be seen by it, so neither mask nor positions are needed."""
        longest = max(map(len, rows))
        return queued(torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows]), self.device)

    def mask_behind(self, pads: Sequence[int], width: int) -> Tensor | None:
        """Mask (B, width) of rows that begin behind so many columns of padding; None = none is padded. The host knows,
        so that no GPU is asked."""
        if not any(pads):
            return None
        return (torch.arange(width, device=self.device) >= queued(torch.tensor(pads), self.device)[:, None]).long()

    def _check_head(self) -> None:
        """Compare our way to the logits with the model's own, once, on a few tokens."""
        ids = torch.arange(8, device=self.device).unsqueeze(0) % text_config(self.model.config).vocab_size
        with torch.no_grad():
            expected = self.model(input_ids=ids, use_cache=False).logits.float()
        computed = self.logits(self.hidden(ids))
        if not expected.isfinite().all():
            name = type(self.model).__name__
            raise UserError(f"{name}: the logits are not finite {not_finite_in(self.model.dtype)}")
        if not torch.allclose(computed, expected, rtol=0.01, atol=0.01 * float(expected.abs().max())):
            raise UserError(
                f"{type(self.model).__name__}: shoal does not know how this architecture computes logits from hidden "
                "states, so it cannot evaluate it yet; give another model"
            )


def plain_cache(num_layers: int) -> DynamicCache:
    """A cache that keeps every token of every layer; one of the model's own kind forgets what left a window."""
    cache = DynamicCache()
    cache.layers.extend(DynamicLayer() for _ in range(num_layers))
    return cache


def branched(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """A new cache with the given ``rows`` of ``cache``, each as often as it is named; ``cache`` stays as it is."""
    # shallow copies: selecting rows puts new tensors into them, those of `cache` are only read
    branch = copy.copy(cache)
    branch.layers = [copy.copy(layer) for layer in cache.layers]
    branch.batch_select_indices(rows)
    return branch
