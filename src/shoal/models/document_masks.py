"""Documents that share a row stay apart, also in families that forget positions when they make masks.

transformers' mask functions see from position ids where a document begins, but some families do not pass them on
(gpt-oss, AFMoE, Bloom, MPT, OPT, XGLM): there every document would read those before it. B batch, S sequence.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils

MASKS = ("create_causal_mask", "create_sliding_window_causal_mask", "create_chunked_causal_mask")
"""Functions of transformers that read from positions where documents begin."""


def padding_apart(position_ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Position ids in which every stretch of padding (0 in the mask) is a document of its own.

    An attention mask would not do: given one, transformers no longer looks for the borders between packed documents.
    """
    index_S = torch.arange(mask_BS.shape[1])
    last_real_BS = torch.where(mask_BS, index_S, -1).cummax(dim=1).values
    return torch.where(mask_BS, position_ids_BS, index_S - last_real_BS - 1)


@contextmanager
def documents_apart(decoder: nn.Module, position_ids_BS: Tensor | None) -> Iterator[None]:
    """While ``decoder`` (see anatomy.decoder_body) runs on these positions, its masks are made from them."""
    module = sys.modules.get(type(decoder).__module__)
    theirs: dict[str, Callable[..., Any]] = {name: getattr(masking_utils, name) for name in MASKS}
    patched = {name: original for name, original in theirs.items() if getattr(module, name, None) is original}

    def with_positions(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = position_ids_BS
        return make(*args, **kwargs)

    for name, original in patched.items():
        setattr(module, name, partial(with_positions, original))
    try:
        yield
    finally:
        for name, original in patched.items():
            setattr(module, name, original)
