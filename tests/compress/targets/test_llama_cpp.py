"""What llama.cpp takes a cut model for: every rule accepts an aligned cut and refuses one that shifts the layers."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from shoal.compress.surgery.config_cut import cut_config
from shoal.compress.targets import llama_cpp
from shoal.compress.targets.gguf import find_converter
from shoal.compress.targets.llama_cpp import CONVERTED, RULES, llama_cpp_caveat, llama_cpp_refusal
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


AFMOE = {"mup_enabled": True, "route_norm": True}

Case = tuple[str, int, dict[str, Any], Sequence[int], Sequence[int], str]
"""(model type, layers, settings, an accepted drop, a refused drop, what the refusal says)."""

CASES: list[Case] = [
    ("afmoe", 8, AFMOE, [0, 1, 2, 3], [0], r"layer 2 of this student for a sliding-window layer, but it is a full-att"),
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
        "qwen3_moe",
        4,
        {"mlp_only_layers": [1], "norm_topk_prob": True},
        [1],
        [2],
        r"layer 1 .* it is a dense layer; it expects experts",
    ),
    ("qwen2_moe", 4, {"mlp_only_layers": [0]}, [0], [2], r"layer 0 .* it is a dense layer; it expects experts"),
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
    assert llama_cpp_refusal(cut_config(config, without(num_layers, *accepted))) is None
    reason = llama_cpp_refusal(cut_config(config, without(num_layers, *refused)))
    assert reason is not None
    assert reason.startswith(f"{MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]}: ")
    assert re.search(says, reason), reason


def test_exaone4_with_a_window_is_read_right_only_at_its_full_depth() -> None:
    config = config_of("exaone4", 64)
    assert llama_cpp_refusal(config) is None
    reason = llama_cpp_refusal(cut_config(config, without(64, 0, 1, 2, 3)))
    assert reason is not None
    assert "sliding window only for 64 layers; with 60" in reason
    plain = config_of("exaone4", 8, sliding_window=None, layer_types=8 * ["full_attention"])
    assert llama_cpp_refusal(cut_config(plain, without(8, 3))) is None


def test_experts_are_counted_from_where_llama_cpp_counts_them() -> None:
    settings = {"attention_chunk_size": 8192, "interleave_moe_layer_step": 2}
    config = config_of("llama4_text", 8, **settings)
    assert llama_cpp_refusal(config) is None
    config.moe_layers = [1, 2]
    assert "layer 2 of this student for a dense layer" in (llama_cpp_refusal(config) or "")
    config = config_of("llama4_text", 8, attention_chunk_size=4096)
    assert "chunks of 8192 tokens, config.attention_chunk_size is 4096" in (llama_cpp_refusal(config) or "")
    dense_first = config_of("glm4_moe_lite", 8, mlp_layer_types=["dense"] + 7 * ["sparse"])
    assert "layer 0 of this student for a layer of experts" in (llama_cpp_refusal(dense_first) or "")
    ernie = config_of("ernie4_5_moe", 8, moe_layer_end_index=5)
    assert "config.moe_layer_end_index is 5" in (llama_cpp_refusal(ernie) or "")
    ernie.moe_layer_end_index = -1
    assert llama_cpp_refusal(ernie) is None


def test_experts_scored_by_a_sigmoid_must_be_named_in_the_file() -> None:
    assert 'add "scoring_func": "sigmoid" to config.json' in (llama_cpp_refusal(config_of("deepseek_v3", 6)) or "")
    assert llama_cpp_refusal(config_of("deepseek_v3", 6, scoring_func="sigmoid")) is None
    flash = config_of("glm4_moe_lite", 47, vocab_size=154_880, first_k_dense_replace=1)
    assert llama_cpp_refusal(flash) is None
    assert "scoring_func" in (llama_cpp_refusal(cut_config(flash, without(47, 5))) or "")


def test_switches_that_llama_cpp_does_not_read_must_stand_as_it_takes_them() -> None:
    assert llama_cpp_refusal(config_of("afmoe", 4, **AFMOE)) is None
    assert "config.mup_enabled is false" in (llama_cpp_refusal(config_of("afmoe", 4, route_norm=True)) or "")
    assert 'add "route_norm": true' in (llama_cpp_refusal(config_of("afmoe", 4, mup_enabled=True)) or "")
    half = "rotate half of each head"
    whole = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    assert half in (llama_cpp_refusal(config_of("solar_open", 4)) or "")
    assert llama_cpp_refusal(config_of("solar_open", 4, rope_parameters=whole)) is None
    bases = {"full_attention": {**whole, "rope_theta": 5e5}, "sliding_attention": whole}
    assert "has [10000.0, 500000.0]" in (llama_cpp_refusal(config_of("mellum", 4, rope_parameters=bases)) or "")
    bases["full_attention"] = whole
    assert llama_cpp_refusal(config_of("mellum", 4, rope_parameters=bases)) is None
    tuned = config_of("llama4_text", 4, attention_chunk_size=8192, interleave_moe_layer_step=1, floor_scale=4)
    assert "attn_scale are True, 4, 0.1" in (llama_cpp_refusal(tuned) or "")
    assert "config.norm_topk_prob is false" in (llama_cpp_refusal(config_of("qwen3_moe", 4)) or "")
    assert llama_cpp_refusal(config_of("falcon", 4)) is None
    assert "config.alibi is true" in (llama_cpp_refusal(config_of("falcon", 4, alibi=True)) or "")


def test_afmoe_rotates_by_number_even_without_a_window() -> None:
    config = config_of("afmoe", 8, sliding_window=None, **AFMOE)
    assert llama_cpp_refusal(config) is None
    assert "layer 2 of this student" in (llama_cpp_refusal(cut_config(config, without(8, 0))) or "")


def test_gemma3n_is_read_by_fixed_layer_numbers() -> None:
    settings = {"layer_types": 7 * (4 * ["sliding_attention"] + ["full_attention"])}
    config = config_of("gemma3n_text", 35, num_kv_shared_layers=15, **settings)
    assert llama_cpp_refusal(config) is None
    config.activation_sparsity_pattern = 9 * [0.95] + 26 * [0.0]
    assert "layer 9 of this student for a layer with sparse activations" in (llama_cpp_refusal(config) or "")
    config.num_kv_shared_layers = 14
    assert "this student has 21" in (llama_cpp_refusal(config) or "")


def test_multi_token_prediction_layers_that_are_not_saved_are_refused() -> None:
    config = config_of("exaone_moe", 8, num_nextn_predict_layers=1, first_k_dense_replace=1, scoring_func="sigmoid")
    assert "expects 1 multi-token-prediction layers" in (llama_cpp_refusal(config) or "")
    assert llama_cpp_refusal(cut_config(config, without(8, 4, 5, 6, 7))) is None


def test_a_head_of_its_own_is_refused_where_llama_cpp_has_none() -> None:
    for model_type in ("gemma", "gemma2", "gemma3_text", "cohere2", "bitnet", "lfm2_moe"):
        config = config_of(model_type, 6, tie_word_embeddings=False, query_pre_attn_scalar=16, rotary_pct=1.0)
        assert "config.tie_word_embeddings" in (llama_cpp_refusal(config) or "")


def test_fields_that_the_converter_misses_are_named() -> None:
    assert "needs config.rotary_pct" in (llama_cpp_refusal(config_of("gpt_neox", 4)) or "")
    assert "needs config.n_ctx" in (llama_cpp_refusal(CONFIG_MAPPING["gpt2"]()) or "")
    assert llama_cpp_refusal(config_of("gpt2", 4, n_ctx=1024)) is None
    assert "needs config.num_hash_layers" in (llama_cpp_refusal(CONFIG_MAPPING["deepseek_v4"]()) or "")
    assert "needs config.head_dim" in (llama_cpp_refusal(CONFIG_MAPPING["falcon_h1"]()) or "")
    assert llama_cpp_refusal(CONFIG_MAPPING["falcon_h1"].from_dict({"head_dim": 128})) is None


def test_heads_of_which_a_share_rotates_are_refused_where_the_converter_pairs_whole_heads() -> None:
    config = config_of("bamba", 3, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=16)
    assert "only a share of 0.5 rotates" in (llama_cpp_refusal(config) or "")
    config.rope_parameters["partial_rotary_factor"] = 1.0
    assert llama_cpp_refusal(config) is None


def test_layer_kinds_under_names_that_the_converter_does_not_know_are_refused() -> None:
    kinds = ["mamba", "attention", "mamba"]
    config = config_of("granitemoehybrid", 3, layer_types=kinds, mamba_n_heads=8, mamba_d_head=16)
    assert "linear_attention for something else" in (llama_cpp_refusal(config) or "")
    config.layer_types = kinds
    assert llama_cpp_refusal(config) is None
    mlp = config_of("nemotron_h", 3, layers_block_type=["mamba", "mlp", "attention"])
    assert "config.layers_block_type" in (llama_cpp_refusal(mlp) or "")


def test_the_text_part_decides_in_a_multimodal_model() -> None:
    text = config_of("gemma3_text", 12, query_pre_attn_scalar=16).to_dict()
    config = CONFIG_MAPPING["gemma3"].from_dict({"text_config": text})
    config.architectures = ["Gemma3ForConditionalGeneration"]
    assert llama_cpp_refusal(config) is None
    assert "layer 4 of this student" in (llama_cpp_refusal(cut_config(config, without(12, 0))) or "")


def test_a_family_without_converter_is_refused() -> None:
    assert llama_cpp_refusal(CONFIG_MAPPING["opt"]()) == "llama.cpp has no converter for OPTForCausalLM"
    assert llama_cpp_refusal(config_of("llama", 5)) is None


def test_a_window_that_llama_cpp_ignores_is_told_and_one_that_it_knows_is_not() -> None:
    assert "beyond 8 tokens" in (llama_cpp_caveat(config_of("mistral", 4)) or "")
    assert llama_cpp_caveat(config_of("mistral", 4, sliding_window=None)) is None
    assert llama_cpp_caveat(config_of("qwen2", 4)) is None
    mixed = config_of("qwen2", 4, use_sliding_window=True, max_window_layers=2)
    assert "no sliding window for Qwen2ForCausalLM" in (llama_cpp_caveat(mixed) or "")
    assert llama_cpp_caveat(config_of("gemma2", 4)) is None
    assert llama_cpp_caveat(config_of("llama", 4)) is None


# --- against the sources of llama.cpp, where they are installed -----------------------------------------------------


@pytest.fixture(scope="module")
def sources() -> Path:
    try:
        return find_converter().parent
    except UserError as error:
        pytest.skip(str(error))


def test_the_table_of_converters_is_that_of_llama_cpp(sources: Path) -> None:
    text = (sources / "conversion" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r"^TEXT_MODEL_MAP: .*? = (\{.*?^\})", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    known = set(ast.literal_eval(found[1]))
    assert known >= CONVERTED
    decoders: set[str] = set()
    for names in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        decoders |= {str(name) for name in names.values()}
    assert decoders & known == CONVERTED
    assert RULES.keys() | llama_cpp.WITH_WINDOWS | llama_cpp.WITHOUT_MTP <= CONVERTED


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
