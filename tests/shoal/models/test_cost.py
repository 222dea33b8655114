"""What a model costs, told without its weights: against real models, published sizes and torch's own counter."""

from __future__ import annotations

import resource
from typing import Any

import architectures
import pytest
import tiny
import torch
from cases import cases
from transformers import AutoConfig, Gemma3TextConfig, PreTrainedModel

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
@pytest.mark.parametrize(("kind", "settings", "billions", "token_bytes"), cases(__file__))
def test_published_sizes_in_little_memory(
    kind: str, settings: dict[str, Any], billions: list[str], token_bytes: int
) -> None:
    """``billions``: of parameters, in all and per token; publishers count the embedding among the latter."""
    config = AutoConfig.for_model(kind, **settings)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = cost(config, torch.bfloat16)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kilobytes
    with_embedding = found.active_parameters + config.vocab_size * config.hidden_size
    assert [f"{found.num_parameters / 1e9:.1f}", f"{with_embedding / 1e9:.1f}"] == billions
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
