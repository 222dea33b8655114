"""Steps that write one token per row over keys and values in room that does not grow, recorded as one CUDA graph.

A step of a small or shallow model on a GPU takes its time in starting kernels one by one. A recorded step starts them
all at once. What is recorded is a list of kernels over addresses: so keys, values, masks, ids and positions lie in
tensors that stay, hooks do what they did when it was recorded, and no number of it may come from the host. That this
holds is tried at every recording: a step that waits for the device is not recorded, and the second one runs as it is
too, and both have to agree. A recording costs about six steps, without the minute that a compiler takes.

What a family must have: plain keys and values, positions that can be given, and attention by SDPA, because flash
kernels take no mask of a fixed size. Others than those of which transformers says that they can be compiled whole are
not tried.

B batch, N rows that are asked for, S sequence, R room, D hidden, V vocabulary.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import create_masks_for_generate

from shoal.models.anatomy import text_config
from shoal.models.attention import MASKLESS, named

if TYPE_CHECKING:
    from shoal.inference.decoder import Decoder

log = logging.getLogger(__name__)

_unrecorded: WeakSet[PreTrainedModel] = WeakSet()
"""Models whose steps cannot be recorded."""
Step = Callable[[], Tensor]
WARM_UP = 2
"""Steps before one is recorded, in which libraries choose their kernels and take their memory."""
ROOM = 256
"""Most new tokens for which there is room at one time: what answers end before need not be held, nor looked at."""
AGREEMENT = 0.01
"""Largest difference of logits to those of the step as it is, as a share of the largest."""


def serves(model: PreTrainedModel) -> bool:
    """Whether rows of ``model``, whose cache can branch, can be written so."""
    config = text_config(model.config)
    attention = named(config._attn_implementation or "eager")
    # of a configuration that names kinds of layers, masks are made by kind, which families that know none do not take
    takes_masks = hasattr(type(config), "layer_types") or not hasattr(config, "layer_types")
    return (
        model.device.type == "cuda"
        and len({*getattr(model, "hf_device_map", {}).values()}) <= 1
        and model._can_compile_fullgraph
        and takes_masks
        and {*(getattr(config, "layer_types", None) or ())} <= {"full_attention", "sliding_attention"}
        and not getattr(config, "alibi", False)  # Falcon makes its positions of a mask of two dimensions
        and (attention == "sdpa" or (attention in MASKLESS and model._supports_sdpa))
    )


def can_be_recorded(model: PreTrainedModel) -> bool:
    """Whether no recording of ``model`` has failed so far."""
    return model not in _unrecorded


class FixedLayer(DynamicLayer):
    """Keys and values (B, heads, R, size) that keep their addresses; a token's go to a position told on the device."""

    is_compileable = True  # else transformers would leave out a mask that hides nothing

    def __init__(self, layer: Any, room: int, at_1: Tensor) -> None:
        """Goes on from ``layer``, as a copy of its keys and values."""
        super().__init__()
        self.is_initialized = True
        self._at_1 = at_1
        self.used = layer.get_seq_length()
        self.keys, self.values = (_with_room(states, self.used, room) for states in (layer.keys, layer.values))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values, those of one new token at its position; what is behind it the mask hides."""
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        return keys.index_copy_(2, self._at_1, key_states), values.index_copy_(2, self._at_1, value_states)

    def get_seq_length(self) -> int:
        return self.used

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Positions that a mask covers, and the first of them."""
        assert self.keys is not None
        return self.keys.shape[-2], 0


def _with_room(states: Tensor, used: int, room: int) -> Tensor:
    # zeros: a hidden position has weight 0, and 0 times what happens to lie in memory may be no number
    wide = states.new_zeros(*states.shape[:-2], room, states.shape[-1])
    wide[..., :used, :] = states[..., :used, :]
    return wide


class FixedRows:
    """Rows that write a token each per step. Rows that are done stay among them, and write what nobody reads."""

    def __init__(
        self, decoder: Decoder, cache: DynamicCache, mask_BS: Tensor, position_B: Tensor, num_new: int
    ) -> None:
        """Goes on from ``cache``, whose layers it replaces, with room for ``num_new`` tokens or ROOM; of the first of
        them are the last column of ``mask_BS`` and ``position_B``."""
        num_new = min(num_new, ROOM)
        self._decoder = decoder
        self._config = text_config(decoder.model.config)
        self.num_rows, used = len(mask_BS), mask_BS.shape[1] - 1
        self.rows_N = torch.arange(self.num_rows, device=mask_BS.device)
        """Those that are still asked for."""
        self._cache = cache
        self._at_1 = torch.tensor([used - 1], device=mask_BS.device)  # a step begins by going on
        layers: Any = cache.layers
        for number, layer in enumerate(layers):  # one after the other: no two layers are there twice
            if layer.is_initialized:
                layers[number] = FixedLayer(layer, used + num_new, self._at_1)
        self._mask_BR = torch.cat([mask_BS[:, :-1], mask_BS.new_zeros(self.num_rows, num_new)], dim=1)
        self._position_B1 = (position_B - 1).unsqueeze(1)
        self._ids_B1 = torch.zeros_like(self._position_B1)
        self._answer_11 = torch.ones(1, 1, dtype=torch.bool, device=mask_BS.device)
        self._masks: dict[str | None, Tensor] = {}
        """By kind of layer; None = of all layers."""
        self._recorded: Step | None = None
        self._steps, self._room = 0, num_new

    @property
    def is_full(self) -> bool:
        """Whether there is no room for another token."""
        return self._steps == self._room

    def keep(self, rows: Tensor) -> None:
        """Ask no longer for others than ``rows`` of those that are asked for."""
        self.rows_N = self.rows_N[rows]

    def logits(self, ids_N: Tensor) -> Tensor:
        """fp32 logits (N, V) after ``ids_N``, the next tokens of the rows that are asked for; the next call overwrites
        them."""
        self._ids_B1[self.rows_N, 0] = ids_N
        self._at_1 += 1
        # rows that are done would come to positions that the model does not have
        position_N1 = self._position_B1[self.rows_N] + 1
        self._position_B1.zero_()
        self._position_B1[self.rows_N] = position_N1
        with _by_sdpa(self._config):
            self._mask()
            found_BV = self._run()
        for layer in self._cache.layers:
            if isinstance(layer, FixedLayer):
                layer.used += 1
        self._steps += 1
        return found_BV if len(self.rows_N) == self.num_rows else found_BV[self.rows_N]

    def _mask(self) -> None:
        """What the new tokens see, as transformers makes it for this family, into the tensors of the first step.

        Not a part of the recording: transformers may count on the host there.
        """
        self._mask_BR.index_fill_(1, self._at_1, 1)
        embeddings: Any = self._decoder.model.get_input_embeddings()
        like_B1D = embeddings.weight.new_empty(*self._ids_B1.shape, 1)
        masks: Any = create_masks_for_generate(self._config, like_B1D, self._mask_BR, self._cache, self._position_B1)
        for kind, mask in masks.items() if isinstance(masks, dict) else ((None, masks),):
            if kind in self._masks:
                self._masks[kind].copy_(mask)
            else:
                self._masks[kind] = mask

    def _forward(self) -> Tensor:
        hidden_B1D = self._decoder.hidden(
            self._ids_B1,
            mask=self._masks.get(None, self._masks),
            position_ids_BS=self._position_B1,
            cache=self._cache,
            answer_BS=self._answer_11,
        )
        return self._decoder.logits(hidden_B1D[:, -1])

    def _run(self) -> Tensor:
        if self._recorded is None:
            if not can_be_recorded(self._decoder.model):
                return self._forward()
            try:
                self._recorded = recorded(self._forward, self._ids_B1.device)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                return self._give_up(str(error).strip().partition("\n")[0])
        found_BV = self._recorded()
        if self._steps == 1:  # the first whose inputs are not those of the recording
            expected_BV = self._forward()
            largest = float(expected_BV.abs().nan_to_num(0.0, 0.0).max())
            if not torch.allclose(found_BV, expected_BV, AGREEMENT, AGREEMENT * largest, equal_nan=True):
                return self._give_up("a recorded step gives other logits than the step itself")
        return found_BV

    def _give_up(self, reason: str) -> Tensor:
        log.warning("steps of %s are not recorded and take longer: %s", self._config.model_type, reason)
        _unrecorded.add(self._decoder.model)
        self._recorded = None
        return self._forward()


def recorded(step: Step, device: torch.device) -> Step:
    """``step`` as one CUDA graph over the tensors that it has used; what it returns is overwritten by the next call.

    Raises:
        RuntimeError: it does what cannot be recorded, such as waiting for the device.
    """
    with torch.cuda.device(device):
        current, beside = torch.cuda.current_stream(), torch.cuda.Stream()
        beside.wait_stream(current)
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP):  # each writes the same into the same places
                step()
            with _waiting_refused():
                step()
        current.wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads, as those that watch over collectives, may talk to the device meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                result = step()
        finally:
            torch.cuda.set_stream(current)  # a recording that fails stays on its own

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


@contextmanager
def _waiting_refused() -> Iterator[None]:
    """Inside, what waits for the device fails. In a recording it would too, but that leaves torch's memory in doubt."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says at every use that this is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def _by_sdpa(config: PreTrainedConfig) -> Iterator[None]:
    """Inside, attention takes dense masks, whatever kernels read the prompts."""
    before = config._attn_implementation
    config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = before
