"""Tiny random models of every decoder-only family of transformers, with several layer kinds mixed where a family has them.

The rows of ARCHITECTURES are what test_architectures.py proves and what docs/architectures.md reports. A row is keyed
by its name: the model type, with a suffix where one family needs several rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SLIDING_WINDOW = 8
INITIALIZER_RANGE = 0.3
"""At which greedy text varies, so that equal texts mean something."""

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": INITIALIZER_RANGE,
    "sliding_window": SLIDING_WINDOW,
    "bos_token_id": 90,
    "eos_token_id": 91,
    "pad_token_id": 92,
    # mixture of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    # multi-head latent attention and sparse indexers
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 8,
    # linear attention and state spaces
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "state_size": 8,
}
"""Toy dimensions by their usual names; a configuration gets those that its class declares."""


@dataclass(frozen=True)
class Architecture:
    """One row: how a tiny model is made, and what is known about cutting it."""

    settings: dict[str, Any] = field(default_factory=dict)
    """On top of SHAPE; None leaves a field at its class's default."""
    model_type: str = ""
    """Key of CONFIG_MAPPING; empty = the row's name."""
    refuses: str = ""
    """Regular expression of the message with which some cuts are refused; empty = every cut is exact."""
    padding: str = ""
    """Why padded batches are not compared: the teacher itself gives other text for a padded row; empty = compared."""
    cache: str = ""
    """Why text with a KV cache is not compared with text without: the teacher itself differs; empty = compared."""


ARCHITECTURES: dict[str, Architecture] = {
    "gemma3_text": Architecture({"sliding_window_pattern": 3, "query_pre_attn_scalar": 8}),
    "llama": Architecture(),
    "qwen2": Architecture({"use_sliding_window": True, "max_window_layers": 3, "head_dim": None}),
    "qwen3": Architecture(),
}
"""Alphabetical."""

NOT_CUT: dict[str, str] = {
    "bert": "an encoder",
}
"""Model types of the causal-LM mapping that have no row, and why: alphabetical."""


def tiny_config(name: str, **overrides: Any) -> PreTrainedConfig:
    """The configuration of row ``name`` with toy dimensions; None in settings or overrides = unset."""
    row = ARCHITECTURES[name]
    family = CONFIG_MAPPING[row.model_type or name]
    known = family.default_config_fields().keys() | family.attribute_map.keys()
    settings = {key: value for key, value in SHAPE.items() if key in known} | row.settings | overrides
    return family(**{key: value for key, value in settings.items() if value is not None})


def tiny_model(name: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model of row ``name`` in eval mode and float32; ``overrides`` go into its configuration.

    Norms and biases are randomised too: at their usual 1 and 0 a forgotten copy of them would pass every test.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(name, **overrides), attn_implementation="sdpa")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()
