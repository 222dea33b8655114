"""Attention of packed rows by torch's own flash kernels: `varlen`, an implementation of transformers' interface.

In place of a mask layers get the documents' borders. They stand where the mask stands, so that a family has to hand on
nothing else, and are there only while documents_apart knows them and a plain causal or sliding mask would be made for
whole rows: padding, caches and masks of other kinds go to SDPA, as does everything outside of it.
T tokens of all documents, B batch, S sequence, H query heads, G key-value heads, d size of a head, C documents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

VARLEN = "varlen"
"""Name of the implementation in configurations."""


class Documents(NamedTuple):
    """What a layer is given in place of a mask. A tuple: DeepSpeed and accelerate look for tensors inside of it."""

    borders: Tensor
    """(C + 1,) int32: where documents begin in the B x S tokens, and where the last one ends."""
    longest: int
    window: int | None
    """Keys that a query sees, itself included; None = all of its document up to itself."""


def varlen_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **settings: Any
) -> tuple[Tensor, None]:
    """(B, S, H, d) Attention of query (B, H, S, d), key and value (B, G, S, d), as transformers asks for it.

    Raises:
        ValueError: keys that are not the row's own, or scores that are changed in a way the kernels do not know.
    """
    if not isinstance(attention_mask, Documents):
        return sdpa_attention_forward(module, query, key, value, attention_mask, *args, **settings)
    if changed := [name for name in ("s_aux", "softcap", "position_bias") if settings.get(name) is not None]:
        raise ValueError(f"attention {VARLEN} does not support {changed[0]}; set attn_implementation to sdpa or eager")
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"attention {VARLEN}: {query.shape[2]} queries for {key.shape[2]} keys of packed rows")
    from torch.nn.attention.varlen import varlen_attn  # which older versions do not have

    borders, longest, window = attention_mask
    kind, width = query.device.type, value.shape[-1]
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    value = pad(value, [0, query.shape[-1] - width])
    query_THd, key_TGd, value_TGd = (each.transpose(1, 2).flatten(0, 1).to(dtype) for each in (query, key, value))
    out: Any = varlen_attn(
        *(query_THd, key_TGd, value_TGd),
        *(borders, borders),
        *(longest, longest),
        scale=settings.get("scaling"),
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.unflatten(0, (query.shape[0], -1))[..., :width], None


def replaces(make: Callable[..., Any], given: dict[str, Any]) -> bool:
    """Whether the mask that ``make`` would make of these arguments says no more than borders and a window."""
    config, others = given.get("config"), given.keys() - {"config", "inputs_embeds", "position_ids", "layer_idx"}
    return (
        getattr(config, "_attn_implementation", None) == VARLEN
        and make.__name__ in ("create_causal_mask", "create_sliding_window_causal_mask")
        and getattr(config, "is_causal", True)
        and all(given[name] is None for name in others)
    )


AttentionInterface.register(VARLEN, varlen_attention)
AttentionMaskInterface.register(VARLEN, sdpa_mask)
