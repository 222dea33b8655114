"""What llama.cpp takes a cut model for: every rule accepts an aligned cut and refuses one that shifts the layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from shoal.compress.gguf.export import find_converter
from shoal.compress.gguf.patterns import misreading
from shoal.compress.surgery.config_cut import cut_config
from shoal.errors import UserError

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 8,
    "tie_word_embeddings": True,
}


def config_of(model_type: str, num_layers: int, **settings: Any) -> PreTrainedConfig:
    family = CONFIG_MAPPING[model_type]
    known = family.default_config_fields().keys() | family.attribute_map.keys()
    shape = {key: value for key, value in SHAPE.items() if key in known}
    return family(**{**shape, "num_hidden_layers": num_layers, **settings})


def without(num_layers: int, *drop: int) -> list[int]:
    return [layer for layer in range(num_layers) if layer not in drop]


Case = tuple[str, int, dict[str, Any], Sequence[int], Sequence[int], str]
"""(model type, layers, settings, an accepted drop, a refused drop, what the refusal says)."""

CASES: list[Case] = [
    ("afmoe", 8, {}, [0, 1, 2, 3], [0], r"layer 2 of this student for a sliding-window layer, but it is a full-att"),
    ("cohere2", 8, {"rotary_pct": 1.0}, [4, 5, 6, 7], [1], r"layer 2 .* one layer in 4, the last of its group"),
    (
        "exaone_moe",
        8,
        {"first_k_dense_replace": 1, "scoring_func": "sigmoid"},
        [4, 5, 6, 7],
        [5],
        r"layer 6 of this student",
    ),
    ("gemma2", 6, {"query_pre_attn_scalar": 16}, [0, 1], [0], r"layer 0 .* one layer in 2"),
    ("gemma3_text", 12, {"query_pre_attn_scalar": 16}, range(6), [7], r"layer 10 .* one layer in 6"),
    ("gpt_oss", 6, {}, [2, 3], [3], r"layer 3 of this student for a full-attention layer, but it is a sliding"),
    (
        "laguna",
        8,
        {"layer_types": 2 * ["full_attention", *3 * ["sliding_attention"]]},
        [4, 5, 6, 7],
        [0],
        r"layer 0 .* one layer in 4, the first of its group",
    ),
    ("olmo3", 8, {}, [0, 1, 2, 3], [6], r"layer 6 of this student"),
    ("smollm3", 8, {"sliding_window": None}, [4, 5, 6, 7], [2], r"layer 2 .* rotary .* every fourth layer"),
    ("llama4_text", 8, {"attention_chunk_size": 8192}, [0, 1, 2, 3], [0], r"layer 2 of this student"),
    ("qwen3_next", 8, {}, [0, 1, 2, 3], [0], r"layer 2 of this student for a linear-attention layer"),
    ("qwen3_5_text", 8, {}, [0, 1, 2, 3], [0], r"layer 2 of this student for a linear-attention layer"),
    (
        "deepseek_v3",
        28,
        {"scoring_func": "sigmoid"},
        [3, 4, 5],
        [5],
        r"a model of 27 layers for one without q_lora_rank",
    ),
    ("deepseek_v2", 30, {"q_lora_rank": None}, [3, 4, 5], [5], r"only if it has 26 or 27 layers; this student has 29"),
    ("gemma2", 46, {"query_pre_attn_scalar": 4, "num_attention_heads": 16}, [], [0, 1], r"44 layers .*sqrt\(16\).*sqr"),
    ("gemma3_text", 62, {"query_pre_attn_scalar": 4, "num_attention_heads": 16}, [], range(6), r"uncut 27B"),
]


@pytest.mark.parametrize(
    ("model_type", "num_layers", "settings", "accepted", "refused", "says"),
    CASES,
    ids=[f"{case[0]}-{case[1]}" for case in CASES],
)
def test_an_aligned_cut_is_accepted_and_a_misaligned_one_refused(
    model_type: str, num_layers: int, settings: dict[str, Any], accepted: Any, refused: Any, says: str
) -> None:
    config = config_of(model_type, num_layers, **settings)
    assert misreading(cut_config(config, without(num_layers, *accepted))) is None
    reason = misreading(cut_config(config, without(num_layers, *refused)))
    assert reason is not None
    assert reason.startswith(f"{MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]}: ")
    assert re.search(says, reason), reason


def test_exaone4_with_a_window_is_read_right_only_at_its_full_depth() -> None:
    config = config_of("exaone4", 64)
    assert misreading(config) is None
    reason = misreading(cut_config(config, without(64, 0, 1, 2, 3)))
    assert reason is not None
    assert "sliding window only for 64 layers; with 60" in reason
    plain = config_of("exaone4", 8, sliding_window=None, layer_types=8 * ["full_attention"])
    assert misreading(cut_config(plain, without(8, 3))) is None


def test_experts_are_counted_from_where_llama_cpp_counts_them() -> None:
    config = config_of("llama4_text", 8, attention_chunk_size=8192, interleave_moe_layer_step=2)
    assert misreading(config) is None
    config.moe_layers = [1, 2]
    assert "layer 2 of this student for a dense layer" in (misreading(config) or "")


def test_afmoe_rotates_by_number_even_without_a_window() -> None:
    config = config_of("afmoe", 8, sliding_window=None)
    assert misreading(config) is None
    assert "layer 2 of this student" in (misreading(cut_config(config, without(8, 0))) or "")


def test_gemma3n_is_read_by_fixed_layer_numbers() -> None:
    settings = {"layer_types": 7 * (4 * ["sliding_attention"] + ["full_attention"])}
    config = config_of("gemma3n_text", 35, num_kv_shared_layers=15, **settings)
    assert misreading(config) is None
    config.num_kv_shared_layers = 14
    assert "this student has 21" in (misreading(config) or "")


def test_the_text_part_decides_in_a_multimodal_model() -> None:
    text = config_of("gemma3_text", 12, query_pre_attn_scalar=16).to_dict()
    config = CONFIG_MAPPING["gemma3"].from_dict({"text_config": text})
    config.architectures = ["Gemma3ForConditionalGeneration"]
    assert misreading(config) is None
    assert "layer 4 of this student" in (misreading(cut_config(config, without(12, 0))) or "")


def test_a_family_without_a_pattern_is_cut_anywhere() -> None:
    assert misreading(config_of("llama", 5)) is None


# --- against the sources of llama.cpp, where they are installed -----------------------------------------------------


@pytest.fixture(scope="module")
def sources() -> Path:
    try:
        return find_converter().parent
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("afmoe", "swa_period = 4"),
        ("cohere2", "swa_period = 4"),
        ("exaone-moe", "swa_period = 4"),
        ("exaone4", "if (hparams.n_layer() == 64)"),
        ("gemma2", "swa_period = 2"),
        ("gemma2", "case 46: type = LLM_TYPE_27B"),
        ("gemma3", "swa_period = 6"),
        ("gemma3", "case 62: type = LLM_TYPE_27B"),
        ("gemma3n", "swa_period = 5"),
        ("gemma3n", "n_layer_kv_from_start = 20"),
        ("laguna", "set_swa_pattern(swa_period, /*dense_first=*/true)"),
        ("llama4", "n_swa                   = 8192"),
        ("llama4", "swa_period = 4"),
        ("olmo2", "swa_period = 4"),
        ("openai-moe", "swa_period = 2"),
        ("qwen3next", "full_attn_interval = 4"),
        ("qwen35", "full_attn_interval = 4"),
        ("smollm3", "n_no_rope_layer_step = 4"),
        ("deepseek2", "n_layer() == 27 || hparams.n_layer() == 26 || (hparams.n_layer() == 48 && n_vocab == 128256)"),
    ],
)
def test_the_sources_still_assume_what_the_rules_say(sources: Path, file: str, says: str) -> None:
    code = sources / "src" / "models" / f"{file}.cpp"
    if not code.is_file():
        pytest.skip(f"{code} is not there")
    assert says in code.read_text(encoding="utf-8")
