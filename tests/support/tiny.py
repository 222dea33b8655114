"""Tiny random models of real architectures with a real tokenizer, made in code: no network, equal bits every time."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

NUM_LAYERS = 6
SLIDING_WINDOW = 8
VOCAB_SIZE = 272
"""256 bytes and three special tokens, rounded up as real models do: the last rows belong to no token."""
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"tie_word_embeddings": False}),
    "llama_tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": SLIDING_WINDOW, "max_window_layers": 3, "head_dim": None},
    ),
    "qwen3": (Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma3": (
        Gemma3TextConfig,
        {"sliding_window": SLIDING_WINDOW, "sliding_window_pattern": 3, "query_pre_attn_scalar": 8},
    ),
}
KINDS = tuple(FAMILIES)


def tiny_config(kind: str, **overrides: Any) -> PreTrainedConfig:
    """A configuration of the family ``kind`` (one of KINDS) with toy dimensions; None in SHAPE or overrides = unset."""
    family, settings = FAMILIES[kind]
    settings = {**SHAPE, **settings, **overrides}
    return family(**{key: value for key, value in settings.items() if value is not None})


def tiny_model(kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A random model of family ``kind`` in eval mode; ``overrides`` go into its configuration.

    Norms and biases are randomised too: at their usual 1 and 0 a forgotten copy of them would pass every test.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = tiny_config(kind, **overrides)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tiny_tokenizer(*, pad_token: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: ids 0-255 are bytes, 256 <s>, 257 </s>, 258 <pad>; no text is unknown to it."""
    return _byte_tokenizer(merges=(), pad_token=pad_token)


def starting_tokenizer() -> PreTrainedTokenizerFast:
    """The same, and <s> comes before every text, as Gemma's and Llama's tokenizers put it."""
    tokenizer = tiny_tokenizer()
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", SHAPE["bos_token_id"])])
    tokenizer.backend_tokenizer.post_processor = begin
    return tokenizer


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """The same with a few tokens of several bytes, so that other text becomes other tokens; ids of bytes stay."""
    return _byte_tokenizer(merges=(("t", "h"), ("th", "e"), ("Ġ", "t"), ("Ġ", "the"), ("i", "n")), pad_token=True)


def _byte_tokenizer(*, merges: Sequence[tuple[str, str]], pad_token: bool) -> PreTrainedTokenizerFast:
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(first + second for first, second in merges)]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    names = {name: token for name, token in SPECIAL_TOKENS.items() if pad_token or name != "pad_token"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **names)
    wrapped.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return wrapped


def tiny_checkpoint(
    path: Path,
    kind: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    pad_token: bool = True,
    **overrides: Any,
) -> Path:
    """The folder ``path``/``kind`` with a tiny model and its tokenizer, saved as a plain checkpoint."""
    folder = path / kind
    tiny_model(kind, seed=seed, dtype=dtype, **overrides).save_pretrained(folder)
    tiny_tokenizer(pad_token=pad_token).save_pretrained(folder)
    return folder


def set_json(file: Path, **changes: Any) -> None:
    """Change some keys of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def tokens_fed(monkeypatch: pytest.MonkeyPatch, count: Callable[[torch.Tensor], int] = torch.numel) -> list[int]:
    """From now on, how many tokens (padding included) each forward of a `Decoder` is given; rows by ``count=len``."""
    from shoal.inference.decoder import Decoder

    fed: list[int] = []
    original = Decoder.hidden

    def counting(self: Any, input_ids_BS: torch.Tensor, **settings: Any) -> torch.Tensor:
        fed.append(count(input_ids_BS))
        return original(self, input_ids_BS, **settings)

    monkeypatch.setattr(Decoder, "hidden", counting)
    return fed


def tiny_moe(**overrides: Any) -> PreTrainedModel:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    settings: dict[str, Any] = SHAPE | experts | overrides
    return AutoModelForCausalLM.from_config(Qwen3MoeConfig(**settings)).eval()
