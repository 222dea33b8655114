"""What a model costs, told without its weights: against real models, published sizes and torch's own counter."""

from __future__ import annotations

import resource
from typing import Any

import architectures
import pytest
import tiny
import torch
from transformers import DeepseekV3Config, Gemma3TextConfig, LlamaConfig, PreTrainedModel, Qwen3MoeConfig

from shoal.compress.surgery.cut_model import cut_model
from shoal.compress.surgery.narrow_config import student_config
from shoal.models.cost import Cost, model_cost
from shoal.models.load import without_data

FAMILIES = (
    "deepseek_v3",  # latent attention, mixture of experts behind a dense layer
    "deepseek_v32",  # an indexer's keys beside the latent
    "falcon_h1",  # attention and a state space in one layer
    "gemma3_text",  # sliding and full attention
    "gpt2",  # learned positions, tied head
    "gpt_oss",
    "jamba",
    "lfm2",  # convolutions
    "llama",
    "mamba2",
    "mixtral",
    "nemotron_h",  # layers without any cache
    "qwen3",
    "qwen3_next",  # linear attention
)
HEADS_OF_128: dict[str, Any] = {"head_dim": 128}
LENGTHS = (3, 21)
"""Below and beyond the tiny models' window."""


def cost(config: Any, dtype: torch.dtype = torch.float32) -> Cost:
    return model_cost(without_data(config, dtype=dtype))


def real_cache_bytes(model: PreTrainedModel, num_tokens: int) -> int:
    """Of every tensor with more than one sequence's worth of numbers in the cache after a forward."""
    with torch.no_grad():
        output: Any = model(input_ids=torch.randint(1, 90, (1, num_tokens)), use_cache=True)
    cache = getattr(output, "past_key_values", None) or output.cache_params
    found: list[Any] = [value for slot in cache.layers for value in vars(slot).values()]
    flat = [tensor for value in found for tensor in (value.values() if isinstance(value, dict) else [value])]
    return sum(
        tensor.numel() * tensor.element_size() for tensor in flat if torch.is_tensor(tensor) and tensor.dim() > 2
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_and_cache_are_those_of_the_real_model(name: str) -> None:
    model = architectures.tiny_model(name)
    found = cost(model.config)
    assert found.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert [found.cache_bytes(length) for length in LENGTHS] == [real_cache_bytes(model, length) for length in LENGTHS]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3_text", "llama", "mixtral", "qwen3_next"])
def test_the_student_without_data_has_the_size_of_the_really_cut_model(name: str) -> None:
    model = architectures.tiny_model(name)
    student = cut_model(model, (1,))
    found = cost(student_config(model.config, (0, 2, 3, 4, 5)))
    assert found.num_layers == 5
    assert found.num_parameters == sum(parameter.numel() for parameter in student.parameters())
    assert found.cache_bytes(21) == real_cache_bytes(student, 21) < cost(model.config).cache_bytes(21)


@pytest.mark.parametrize("tied", [False, True])
def test_active_parameters_of_a_dense_model_are_all_but_embedding_rows(tied: bool) -> None:
    found = cost(tiny.tiny_config("llama", tie_word_embeddings=tied))
    table = tiny.VOCAB_SIZE * tiny.SHAPE["hidden_size"]
    assert found.active_parameters == found.num_parameters - (0 if tied else table)


@pytest.mark.slow
def test_what_layers_share_is_stored_once_and_read_by_each() -> None:
    whole = cost(tiny.tiny_config("llama"))
    model: Any = without_data(tiny.tiny_config("llama"), dtype=torch.float32)
    model.model.layers[3].mlp = model.model.layers[2].mlp
    shared = model_cost(model)
    assert shared.num_parameters == whole.num_parameters - 3 * 32 * 48
    assert shared.active_parameters == whole.active_parameters


@pytest.mark.prove
@pytest.mark.parametrize(
    ("config", "billions", "token_bytes"),
    [
        # Llama 3.1 70B: 8 key-value heads of 128 in 80 layers
        (
            LlamaConfig(
                vocab_size=128256,
                hidden_size=8192,
                intermediate_size=28672,
                num_hidden_layers=80,
                num_attention_heads=64,
                num_key_value_heads=8,
                tie_word_embeddings=False,
            ),
            ("70.6", "70.6"),
            2 * 80 * 8 * 128 * 2,
        ),
        # DeepSeek-V3: a latent of 512 and 64 rotary channels in 61 layers
        (DeepseekV3Config(), ("671.0", "37.6"), 61 * (512 + 64) * 2),
        (
            Qwen3MoeConfig(
                vocab_size=151936,
                hidden_size=2048,
                num_hidden_layers=48,
                num_attention_heads=32,
                num_key_value_heads=4,
                moe_intermediate_size=768,
                num_experts=128,
                num_experts_per_tok=8,
                tie_word_embeddings=False,
                **HEADS_OF_128,
            ),
            ("30.5", "3.4"),
            2 * 48 * 4 * 128 * 2,
        ),
    ],
    ids=["llama-70b", "deepseek-v3", "qwen3-30b-a3b"],
)
def test_published_sizes_in_little_memory(config: Any, billions: tuple[str, str], token_bytes: int) -> None:
    """``billions``: of parameters, in all and per token; publishers count the embedding among the latter."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = cost(config, torch.bfloat16)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kilobytes
    with_embedding = found.active_parameters + config.vocab_size * config.hidden_size
    assert (f"{found.num_parameters / 1e9:.1f}", f"{with_embedding / 1e9:.1f}") == billions
    assert found.cache_bytes(1) == token_bytes
    assert found.cache_bytes(1000) == 1000 * token_bytes


@pytest.mark.slow
def test_sliding_layers_stop_growing_at_their_window() -> None:
    config = Gemma3TextConfig(
        num_hidden_layers=12,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=512,
        vocab_size=64,
        intermediate_size=64,
    )
    found = cost(config, torch.bfloat16)
    layer = 2 * 2 * 16 * 2
    assert found.cache_bytes(100) == 100 * 12 * layer
    assert found.cache_bytes(10_000) == 10_000 * 2 * layer + 511 * 10 * layer  # one layer in six sees everything
