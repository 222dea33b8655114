"""Flash kernels for a CPU: their signatures, with attention by loops in float64 behind them.

T tokens of all documents, H query heads, G key-value heads, d size of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen
from transformers import PreTrainedModel, modeling_flash_attention_utils
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.modeling_utils import AttentionInterface

from shoal import machine
from shoal.models import attention
from shoal.models.packed_attention import VARLEN

Window = tuple[int, int]


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    s_aux: Tensor | None = None,
) -> Tensor:
    """(T, H, d) Attention of q (T, H, d), k and v (T, G, d) within each document; the last query sees the last key."""
    assert causal, "decoders see nothing that comes later"
    assert dropout_p == 0, "no dropout in these models"
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32, "as the kernels want them"
    assert (cu_seqlens_q[-1], cu_seqlens_k[-1]) == (len(q), len(k)), "borders are those of these tokens"
    assert (max_seqlen_q, max_seqlen_k) == (cu_seqlens_q.diff().max(), cu_seqlens_k.diff().max())
    scale, group = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale, q.shape[1] // k.shape[1]
    rows = []
    for document in range(len(cu_seqlens_q) - 1):
        queries, keys = (range(*borders[document : document + 2].tolist()) for borders in (cu_seqlens_q, cu_seqlens_k))
        for place, query in enumerate(queries, start=len(keys) - len(queries)):
            first = 0 if window_size[0] < 0 else max(0, place - window_size[0])
            seen = slice(keys.start + first, keys.start + place + 1)
            heads = []
            for head in range(q.shape[1]):
                scores = k[seen, head // group].double() @ q[query, head].double() * scale
                if softcap:
                    scores = softcap * (scores / softcap).tanh()
                sink = [] if s_aux is None else [s_aux[head].double()[None]]
                weights = torch.cat([scores, *sink]).softmax(0)[: len(scores)]
                heads.append((weights[:, None] * v[seen, head // group].double()).sum(0))
            rows.append(torch.stack(heads))
    return torch.stack(rows).to(q.dtype)


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
    """(B, S, H, d) The same for whole rows."""
    queries, keys = (torch.arange(len(each) + 1, dtype=torch.int32) * each.shape[1] for each in (q, k))
    tokens = [each.flatten(0, 1) for each in (q, k, v)]
    out = flash_attn_varlen_func(*tokens, queries, keys, q.shape[1], k.shape[1], **settings)  # pyright: ignore[reportCallIssue]
    return out.view(q.shape[0], q.shape[1], *out.shape[1:])


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: Window = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """(T, H, d) torch's own kernels, with its signature."""
    assert {return_aux, seqused_k, block_table, num_splits} == {None}, "nothing of this is asked for"
    assert cu_seq_k is not None
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert {query.dtype, key.dtype, value.dtype} == {query.dtype}, "one precision"
    assert query.shape[-1] == key.shape[-1] == value.shape[-1], "one size of heads"
    given = (query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
    causal = window_size[1] == 0  # nothing behind the query; (-1, -1) would see all
    return flash_attn_varlen_func(*given, softmax_scale=scale, causal=causal, window_size=window_size)


def in_halves(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The kernel, refusing what the real ones refuse: any precision but two, or several at once."""

    @wraps(kernel)  # transformers tells from its parameters what it knows
    def refusing(q: Tensor, k: Tensor, v: Tensor, *args: Any, **settings: Any) -> Tensor:
        assert {q.dtype, k.dtype, v.dtype} in ({torch.bfloat16}, {torch.float16}), "half precision, and one"
        return kernel(q, k, v, *args, **settings)

    return refusing


def install_torchs_own(monkeypatch: pytest.MonkeyPatch, *, halves_only: bool = False) -> list[Window]:
    """From now on torch's own kernels are the only flash attention, on a CPU too; the windows of all calls to come."""
    kernel, windows = in_halves(varlen_attn) if halves_only else varlen_attn, list[Window]()

    @wraps(kernel)
    def counted(*args: Any, **settings: Any) -> Tensor:
        windows.append(settings["window_size"])
        return kernel(*args, **settings)

    monkeypatch.setattr(varlen, "varlen_attn", counted)
    monkeypatch.setattr(attention, "_is_installed", lambda name: name == VARLEN)
    monkeypatch.setattr(machine, "card", lambda *_: machine.Card("a card", (9, 0)))
    return windows


def install(monkeypatch: pytest.MonkeyPatch, *, halves_only: bool = False) -> None:
    """From now on transformers finds these kernels under every name of flash attention, on a CPU too."""
    utils = modeling_flash_attention_utils

    def loaded(name: str, *_: Any, **__: Any) -> tuple[Any, ...]:
        AttentionInterface.register(name, flash_attention_forward)
        AttentionMaskInterface.register(name, flash_attention_mask)
        kernels: Any = flash_attn_func, flash_attn_varlen_func
        return (*(map(in_halves, kernels) if halves_only else kernels), None, utils._pad_input, utils._unpad_input)

    monkeypatch.setattr(utils, "_lazy_imports", loaded)
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_process_flash_kwargs_fn"):
        monkeypatch.setattr(utils, name, None)
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *_, **__: True)
    monkeypatch.setattr(attention, "_is_installed", lambda name: name not in ("flash_attention_3", VARLEN))
