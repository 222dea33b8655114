"""Families whose halves and heads are masked, and what their models answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from architectures import SLIDING_WINDOW, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from shoal.components import Component, ComponentPart
from shoal.compress.edits.layer_edits import in_force, layer_edits
from shoal.compress.edits.sublayers import Sublayers, sublayers

FAMILIES = (
    *("llama", "qwen3", "gemma2", "gemma3_text", "olmo2", "glm4", "cohere2", "phi"),
    *("gpt2", "gpt_neo", "gpt_neox", "opt", "bloom", "mpt", "starcoder2", "falcon", "gpt_bigcode"),
    *("mixtral", "gpt_oss", "deepseek_v2", "deepseek_v3", "granitemoehybrid", "llama4_text"),
    *("lfm2", "qwen3_next", "jamba", "falcon_h1", "gemma3n_text", "minimax"),
)
"""Grouped and multi-query attention, query norms, post-norms, Conv1D, parallel halves, biases, residuals inside,
experts, latent attention, convolutions, linear attention and state spaces beside attention."""


def tiny(name: str, **settings: Any) -> PreTrainedModel:
    """The model of row ``name``, Llama's with two query heads per key-value head."""
    return tiny_model(name, **({"num_key_value_heads": 2, **settings} if name == "llama" else settings))


def ids(rows: int = 2, length: int = 2 * SLIDING_WINDOW, *, seed: int = 0) -> Tensor:
    return torch.randint(5, 90, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: PreTrainedModel, input_ids: Tensor | None = None) -> Tensor:
    return model(input_ids=ids() if input_ids is None else input_ids, use_cache=False).logits


def text(model: PreTrainedModel, *, use_cache: bool, padded: bool = True) -> list[list[int]]:
    """Greedy text past the sliding window; the second row is padded on the left."""
    input_ids = ids(2, SLIDING_WINDOW - 1, seed=3)
    mask = torch.ones_like(input_ids)
    mask[1, : 3 if padded else 0] = 0
    generate: Any = model.generate
    return generate(
        input_ids=input_ids,
        attention_mask=mask,
        use_cache=use_cache,
        do_sample=False,
        max_new_tokens=5,
        eos_token_id=-1,
        no_repeat_ngram_size=1,
    ).tolist()


def with_heads(model: PreTrainedModel) -> tuple[int, Sublayers]:
    """The last layer whose heads may be masked."""
    return next(
        (layer, found) for layer, found in reversed(list(enumerate(sublayers(model)))) if not found.head_refusal
    )


def _taken_out(model: PreTrainedModel, part: ComponentPart, layers: Iterable[Any]) -> AbstractContextManager[Any]:
    return in_force(model, layer_edits([Component((layer,), part, *index) for layer, *index in layers], model))


def attention_skipped(model: PreTrainedModel, layers: Sequence[int]) -> AbstractContextManager[Any]:
    return _taken_out(model, "attention", ((layer,) for layer in layers))


def mlp_skipped(model: PreTrainedModel, layers: Sequence[int]) -> AbstractContextManager[Any]:
    return _taken_out(model, "mlp", ((layer,) for layer in layers))


def heads_masked(model: PreTrainedModel, heads: Mapping[int, Sequence[int]]) -> AbstractContextManager[Any]:
    return _taken_out(model, "head", ((layer, head) for layer in heads for head in heads[layer]))


def kv_groups_masked(model: PreTrainedModel, groups: Mapping[int, Sequence[int]]) -> AbstractContextManager[Any]:
    return _taken_out(model, "kv_group", ((layer, group) for layer in groups for group in groups[layer]))
