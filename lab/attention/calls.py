"""What attention is computed from, seen where families hand it to transformers' attention interface.

Where families compute queries, keys and values differs (fused, latent, normed, rotated); that they hand them to one
interface does not.

B batch, S sequence, T chosen queries, H query heads, G key-value heads, d size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers
from shoal.models.packed_attention import Documents


@dataclass(frozen=True)
class AttentionInputs:
    """What one layer's attention is computed from, after rotary embedding and all norms."""

    query_BHSd: Tensor
    key_BGSd: Tensor
    scale: float
    """Factor of the scores."""
    softcap: float | None = None
    """Scores are bent to lie within +/- this; None = they are not."""
    sinks_H: Tensor | None = None
    """Score of a key that every query sees beside the others and that has no value; None = there is none."""
    seen_B1SS: Tensor | None = None
    """Which keys a query sees, by the mask or the documents' borders that the layer was given (the first dimension may
    be 1); None = without either: all up to itself."""


@contextmanager
def attention_calls(
    model: PreTrainedModel, layers: Collection[int], take: Callable[[int, AttentionInputs], object], *, remedy: str
) -> Iterator[None]:
    """Every attention of ``layers`` is shown to ``take``, with the layer's index, before it is computed.

    Messages end with ``remedy``.

    Raises:
        UserError: when the model runs, a layer with more than one attention or with biases on its scores.
    """
    decoder, family = decoder_layers(model), model.config.model_type
    layer_of = {id(module): layer for layer in layers for module in decoder[layer].modules()}
    callers: dict[int, int] = {}
    get_interface = AttentionInterface.get_interface

    def show(
        interface: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs
    ) -> Any:
        layer = layer_of.get(id(module))
        if layer is not None:
            if callers.setdefault(layer, id(module)) != id(module):
                raise UserError(f"{family}: layer {layer} has more than one attention; {remedy}")
            mask = args[0] if args else kwargs.get("attention_mask")
            # one per head is no question of who sees whom: Doge adds what it has learnt of every key
            per_head = isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] != 1
            if kwargs.get("position_bias") is not None or per_head:
                raise UserError(f"{family}: attention of layer {layer} adds biases to its scores; {remedy}")
            take(layer, _inputs(query, key, mask, kwargs))
        return interface(module, query, key, value, *args, **kwargs)

    def recorded(interfaces: AttentionInterface, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        return partial(show, get_interface(interfaces, *args, **kwargs))

    AttentionInterface.get_interface = recorded  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        AttentionInterface.get_interface = get_interface


def attention_weights(inputs: AttentionInputs, places_BT: Tensor) -> Tensor:
    """(B, H, T, S) What the queries at ``places_BT`` give to every key, at least float32; a sink's part is left out.

    Only these rows are computed, so that the model may run with any kernel.
    """
    dtype = torch.promote_types(inputs.query_BHSd.dtype, torch.float32)
    num_heads, num_keys = inputs.query_BHSd.shape[1], inputs.key_BGSd.shape[2]
    rows_B1 = torch.arange(len(places_BT), device=places_BT.device)[:, None]
    query_BHTd = inputs.query_BHSd[rows_B1, :, places_BT].transpose(1, 2).to(dtype)
    key_BGSd = inputs.key_BGSd.to(dtype)
    # the query heads of a group stand side by side, beside its one key-value head
    query_BGHTd = query_BHTd.unflatten(1, (key_BGSd.shape[1], -1))
    score_BHTS = (query_BGHTd @ key_BGSd[:, :, None].transpose(-1, -2)).flatten(1, 2) * inputs.scale
    if inputs.softcap is not None:
        score_BHTS = inputs.softcap * torch.tanh(score_BHTS / inputs.softcap)
    if inputs.seen_B1SS is None:
        seen_BTS = torch.arange(num_keys, device=places_BT.device) <= places_BT[..., None]
    else:
        seen_B1SS = inputs.seen_B1SS.expand(len(places_BT), -1, -1, -1)[..., :num_keys]
        seen_BTS = seen_B1SS[rows_B1, 0, places_BT]
    score_BHTS = score_BHTS.masked_fill(~seen_BTS[:, None], -torch.inf)
    if inputs.sinks_H is None:
        return score_BHTS.softmax(-1)
    sink_BHT1 = inputs.sinks_H.to(dtype).view(1, num_heads, 1, 1).expand(*score_BHTS.shape[:3], 1)
    return torch.cat([score_BHTS, sink_BHT1], -1).softmax(-1)[..., :-1]


def _inputs(query: Tensor, key: Tensor, mask: Tensor | Documents | None, settings: dict[str, Any]) -> AttentionInputs:
    scale = settings.get("scaling")
    return AttentionInputs(
        query,
        key,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        softcap=settings.get("softcap"),
        sinks_H=settings.get("s_aux"),
        seen_B1SS=_seen(mask, settings, query, key.shape[-2]),
    )


def _seen(
    mask: Tensor | Documents | None, settings: dict[str, Any], query_BHSd: Tensor, num_keys: int
) -> Tensor | None:
    """(B, 1, S, keys) What queries see, in whatever form the layer's kernels are told."""
    rows, _, num_queries, _ = query_BHSd.shape
    if isinstance(mask, Tensor) and mask.dim() == 4:
        # eager attention adds its mask to the scores: 0 to what is seen
        return mask if mask.dtype == torch.bool else mask == 0
    borders, window = settings.get("cu_seq_lens_q"), settings.get("sliding_window") or num_keys
    if isinstance(mask, Documents):
        borders, window, mask = mask.borders, mask.window or num_keys, None
    if mask is None and borders is None and window >= num_keys:
        return None
    key_S = torch.arange(num_keys, device=query_BHSd.device)
    behind_SS = key_S[-num_queries:, None] - key_S  # the last queries end with the last keys
    seen_B1SS = ((behind_SS >= 0) & (behind_SS < window)).expand(rows, 1, -1, -1)
    if borders is not None:
        place_BS = torch.arange(rows * num_keys, device=key_S.device).view(rows, -1)
        document_BS = torch.searchsorted(borders[1:].contiguous(), place_BS, right=True, out_int32=True)
        seen_B1SS = seen_B1SS & (document_BS[:, None, :, None] == document_BS[:, None, None])
    return seen_B1SS if mask is None else seen_B1SS & mask.bool()[:, None, None]
