"""Tiny random models of every decoder-only family of transformers, several layer kinds mixed where a family has them.

The rows of ARCHITECTURES are what test_architectures.py proves and what docs/reference/families.csv reports. A row is
keyed by its name: the model type, with a suffix where one family needs several rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
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
    "tie_word_embeddings": False,
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
    "index_n_heads": 16,  # with few heads many scores are equally 0, and rounding chooses among them
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
    "mamba_expand": 2,
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
    drops: tuple[tuple[int, ...], ...] = ()
    """Cuts to examine besides single layers and random sets: those that are exact where most are refused."""
    padding: str = ""
    """Why padded batches are not compared: the teacher itself gives other text for a padded row; empty = compared."""
    images: dict[str, Any] = field(default_factory=dict)
    """Arguments that hold one random image: name -> shape of random numbers (a tuple), or what they are (a list)."""
    cache: str = ""
    """Why text with a KV cache is not compared with text without: the teacher itself differs; empty = compared."""


ALTERNATING = ["sliding_attention", "full_attention"] * 3
MOSTLY_LINEAR = ["linear_attention", "full_attention", "linear_attention"] * 2
"""Kinds of layers of families with linear attention: a cut of layers 1 and 4 would leave that only."""
QWEN_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "depth": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "num_position_embeddings": 16,
}
INKLING: dict[str, Any] = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "d_rel": 4,
    "rel_extent": 16,
    "unpadded_vocab_size": 96,
}
QWEN4: dict[str, Any] = {
    "layer_types": ["linear_attention", "indexed_attention", "linear_attention"] * 2,
    "eos_token_id": 91,
    "hc_count": 2,
    "hc_lowrank": 8,
    "ple_layer_ids": [1, 4],
    "ngram_vocab_size_base": 50,
    "make_ngram_vocab_size_divisible_by": 2,
    "heads_per_ngram": 2,
    "split_ngram_parts": 2,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
CLIP, SIGLIP, PIXTRAL = (
    {**VISION, "model_type": kind} for kind in ("clip_vision_model", "siglip_vision_model", "pixtral")
)
LLAMA, QWEN2 = {"model_type": "llama"}, {"model_type": "qwen2", "head_dim": None}
QWEN2_VISION: dict[str, Any] = {
    "depth": 2,
    "embed_dim": 16,
    "hidden_size": 32,
    "mlp_ratio": 2,
    "num_heads": 2,
    "patch_size": 4,
}
PICTURE = {"pixel_values": (1, 3, 32, 32)}
PATCHES = {"pixel_values": (16, 96), "image_grid_thw": [[1, 4, 4]]}
"""4 x 4 patches of 3 channels, 2 times and 4 x 4 pixels, of which the model makes 2 x 2 tokens."""
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}


PLAIN = (
    *("apertus", "apertus1p5_text", "arcee", "aria_text", "axk1", "axk2", "biogpt", "bitnet", "bloom", "cohere"),
    *("cohere2", "cohere2_moe", "ctrl", "cwm", "deepseek_v4", "doge", "ernie4_5", "exaone", "falcon_mamba"),
    *("flex_olmo", "flint", "gemma", "gemma2", "glm", "glm4", "glm4_moe_lite", "gpt-sw3", "gpt2", "gpt_bigcode"),
    *("gpt_neox", "gpt_oss", "granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoeshared", "helium"),
    *("hy_v3", "hyperclovax", "internlm3", "iquestcoder", "jais2", "jetmoe", "kolibri1", "lara_mini", "lfm3"),
    *("llama", "mamba", "minicpm3", "minimax_m3_vl_text", "ministral3", "mistral", "mixtral", "nanochat", "olmo"),
    *("olmo2", "olmo3", "olmoe", "openai-gpt", "opt", "persimmon", "phi", "phi3", "phimoe", "seed_oss", "smollm3"),
    *("solar_open", "stablelm", "starcoder2", "vaultgemma", "xglm", "youtu"),
)
"""Families of which toy dimensions are all that has to be said."""
ARCHITECTURES: dict[str, Architecture] = {
    **{name: Architecture() for name in PLAIN},
    "afmoe": Architecture({"num_dense_layers": 2, "global_attn_every_n_layers": 3}),
    "bailing_hybrid": Architecture(
        {"layer_types": MOSTLY_LINEAR, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
        refuses="leaves only",
        drops=((1, 4),),
    ),
    "bamba": Architecture({"attn_layer_indices": [1, 4]}, refuses="leaves only", drops=((1, 4),)),
    "beam": Architecture(refuses="attn_residual_add_idx"),
    "codegen": Architecture({"rotary_dim": 4}),
    "cohere_compass_text": Architecture(
        {
            "layer_types": ALTERNATING,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        }
    ),
    "cpmant": Architecture(
        {
            "dim_head": 8,
            "dim_ff": 48,
            "prompt_length": 4,
            "segment_types": 4,
            "prompt_types": 4,
            "position_bias_num_buckets": 8,
            "position_bias_max_distance": 32,
        },
        padding="its positions count the padding",
    ),
    "dbrx": Architecture(
        {
            "d_model": 32,
            "hidden_size": None,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        }
    ),
    "deepseek_v2": Architecture({"first_k_dense_replace": 2, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}),
    "deepseek_v3": Architecture({"first_k_dense_replace": 2}),
    "deepseek_v32": Architecture({"first_k_dense_replace": 2}),
    "diffllama": Architecture(refuses="lambda_init is .* but would become", drops=((4, 5),)),
    "dory": Architecture({"n_input_layers": 2, "n_output_layers": 2}, refuses="is about layers|ties layers"),
    "dots1": Architecture(
        {
            "first_k_dense_replace": 2,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "max_window_layers": 3,
        }
    ),
    "dots3_note_text": Architecture(
        {
            "num_key_value_heads": 4,
            "head_dim": 16,
            "layer_types": ALTERNATING,
            "shared_experts_intermediate_size": 16,
            "per_layer_config": {
                str(layer): {"num_attention_heads": 2, "num_key_value_heads": 2} for layer in (0, 2, 4)
            },
        }
    ),
    "ernie4_5_moe": Architecture(
        {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 2, "moe_layer_end_index": 4}
    ),
    "ernie4_5_moe_interval": Architecture(
        {"moe_num_experts": 4, "moe_k": 2, "moe_layer_interval": 2},
        "ernie4_5_moe",
        refuses="says that one layer in 2 is special",
        drops=((0, 1), (2, 3), (1, 2)),
    ),
    "exaone4": Architecture({"sliding_window_pattern": 3}),
    "exaone_moe": Architecture({"sliding_window_pattern": 3, "first_k_dense_replace": 2}),
    "falcon": Architecture({"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_alibi": Architecture({"alibi": True, "multi_query": False}, model_type="falcon"),
    "falcon_h1": Architecture({"mamba_d_ssm": 64}),
    "fuyu": Architecture({"text_config": {"model_type": "persimmon"}}),
    "gemma3": Architecture(
        {
            "text_config": {"sliding_window_pattern": 3, "query_pre_attn_scalar": 8},
            "vision_config": {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
            "mm_tokens_per_image": 4,
            "image_token_index": 95,
        },
        images=PICTURE,
    ),
    "gemma3_text": Architecture({"sliding_window_pattern": 3, "query_pre_attn_scalar": 8}),
    "gemma3n_text": Architecture(
        {
            "layer_types": ALTERNATING,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 96,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0, 0.0, 0.0],
        },
        refuses="uses the keys and values of layer",
    ),
    "gemma4": Architecture(
        {
            "text_config": {"layer_types": ALTERNATING, "hidden_size_per_layer_input": 0, "global_head_dim": 16},
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "position_embedding_size": 16,
            },
            "audio_config": {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "subsampling_conv_channels": [4, 4],
                "output_proj_dims": 16,
            },
        },
        refuses="layer_types: reads",
    ),
    "gemma4_text": Architecture(
        {
            "layer_types": ALTERNATING,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 96,
            "global_head_dim": 16,
        },
        refuses="uses the keys and values of layer|layer_types: reads",
    ),
    "gemma4_unified": Architecture(
        {
            "text_config": {"layer_types": ALTERNATING},
            "vision_config": {"mm_embed_dim": 32, "mm_posemb_size": 16, "output_proj_dims": 32},
            "audio_config": {"audio_embed_dim": 16},
        },
        refuses="layer_types: reads",
    ),
    "gemma4_unified_text": Architecture({"layer_types": ALTERNATING}, refuses="layer_types: reads"),
    "git": Architecture(
        {"vision_config": {**VISION, "num_hidden_layers": 1}}, padding="its positions count the padding"
    ),
    "glm4_moe": Architecture({"first_k_dense_replace": 2}),
    "glm_moe_dsa": Architecture(
        {"indexer_types": ["full", "shared", "full", "full", "shared", "shared"], "first_k_dense_replace": 2},
        refuses="uses the chosen tokens of layer",
        drops=((0, 1), (3, 4, 5)),
    ),
    "got_ocr2": Architecture(
        {
            "text_config": {
                "model_type": "qwen2",
                "head_dim": None,
                "use_sliding_window": True,
                "max_window_layers": 3,
            },
            "vision_config": {
                "hidden_size": 16,
                "output_channels": 8,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 16,
                "mlp_dim": 16,
                "global_attn_indexes": [1],
            },
        }
    ),
    "gpt2_inverse_scale": Architecture(
        {"scale_attn_by_inverse_layer_idx": True},
        "gpt2",
        refuses="attn.scaling is .* but would become",
        drops=((4, 5),),
    ),
    "gpt_neo": Architecture(
        {"num_layers": 6, "attention_types": [[["global", "local"], 3]], "window_size": SLIDING_WINDOW}
    ),
    "gpt_neox_japanese": Architecture(refuses="use_bias is .* but would become"),
    "gptj": Architecture({"rotary_dim": 4}),
    "granitemoehybrid": Architecture(
        {"layer_types": ["mamba", "attention", "mamba"] * 2}, refuses="leaves only", drops=((1, 4),)
    ),
    "hrm_text": Architecture(refuses="does not know where this architecture keeps its decoder layers"),
    "hunyuan_v1_dense": Architecture({"head_dim": 8}),
    "hunyuan_v1_moe": Architecture({"head_dim": 8, "moe_topk": [2, 1, 3, 2, 1, 3], "num_shared_expert": [1] * 6}),
    "hy_v4": Architecture(refuses="uses the chosen tokens of layer"),
    "idefics3": Architecture(
        {"image_token_id": 95, "text_config": LLAMA, "vision_config": VISION},
        images={"pixel_values": (1, 1, 3, 32, 32)},
    ),
    "inkling2_loop_text": Architecture(
        {
            **INKLING,
            "n_layers_per_attn_res_block": 2,
            "loop_layer_index_start": 2,
            "loop_layer_index_end": 4,
            "loop_gate_rank": 8,
        },
        refuses="outputs of earlier blocks",
    ),
    "inkling2_text": Architecture(INKLING, refuses="outputs of earlier blocks"),
    "inkling_text": Architecture(
        {
            **INKLING,
            "sliding_window_size": SLIDING_WINDOW,
            "log_scaling_n_floor": 16,
            "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid"] * 2,
        }
    ),
    "internvl": Architecture(
        {
            "image_token_id": 95,
            "text_config": QWEN2,
            "vision_config": {**VISION, "image_size": [32, 32], "patch_size": [16, 16]},
        },
        images=PICTURE,
    ),
    "jamba": Architecture(
        {"attn_layer_period": 3, "attn_layer_offset": 1}, refuses="says that one layer in . is special|leaves only"
    ),
    "kimi_linear": Architecture(
        {"num_local_experts": 4, "linear_head_dim": 8, "linear_num_heads": 4, "layer_types": MOSTLY_LINEAR},
        refuses="leaves only",
        drops=((1, 4),),
    ),
    "laguna": Architecture({"layer_types": ["full_attention", "sliding_attention", "sliding_attention"] * 2}),
    "lfm2": Architecture({"full_attn_idxs": [1, 4]}, refuses="leaves only", drops=((1, 4),)),
    "lfm2_moe": Architecture(
        {"layer_types": ["conv", "full_attention", "conv"] * 2}, refuses="leaves only", drops=((1, 4),)
    ),
    "llama4": Architecture({"vision_config": {**VISION, "intermediate_size": 64, "vision_output_dim": 32}}),
    "llama4_text": Architecture(
        {
            "intermediate_size_mlp": 48,
            "attention_chunk_size": SLIDING_WINDOW,
            "sliding_window": None,
            "interleave_moe_layer_step": 2,
            "no_rope_layer_interval": 3,
            "floor_scale": 4,
        }
    ),
    "llava": Architecture({"image_token_index": 95, "text_config": LLAMA, "vision_config": CLIP}, images=PICTURE),
    "llava_next": Architecture(
        {
            "image_token_index": 95,
            "image_grid_pinpoints": [[32, 64]],
            "text_config": {"model_type": "mistral"},
            "vision_config": CLIP,
        },
        images={"pixel_values": (1, 3, 3, 32, 32), "image_sizes": [[30, 60]]},
    ),
    "llava_onevision": Architecture(
        {
            "image_token_index": 95,
            "video_token_index": 94,
            "image_grid_pinpoints": [[32, 64]],
            "text_config": QWEN2,
            "vision_config": {**SIGLIP, "vision_use_head": False},
        },
        images={"pixel_values": (1, 3, 3, 32, 32), "image_sizes": [[30, 60]]},
    ),
    "llava_pixtral": Architecture(
        {
            "image_token_index": 95,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "text_config": {"model_type": "mistral"},
            "vision_config": PIXTRAL,
        },
        "llava",
        images={**PICTURE, "image_sizes": [[32, 32]]},
    ),
    "longcat_flash": Architecture(
        {
            "num_layers": 6,
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": 16,
            "zero_expert_num": 2,
            "moe_topk": 2,
            "qk_head_dim": 16,
        },
        refuses="does not know where",
    ),
    "mamba2": Architecture({"num_heads": 8, "head_dim": 8, "n_groups": 2}),
    "mellum": Architecture({"layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2}),
    "mimo_v2_flash": Architecture({"hybrid_layer_pattern": [0, 1, 1, 1, 1, 0]}),
    "minimax": Architecture(
        {"block_size": 8, "sliding_window": None}, refuses="would come first|leaves only", drops=((0, 1),)
    ),
    "minimax_m2": Architecture({"attn_type_list": [1] * 6, "num_mtp_modules": 3}),
    "ministral": Architecture({"head_dim": 8}),
    "mistral3": Architecture(
        {
            "image_token_index": 95,
            "text_config": {"model_type": "mistral"},
            "vision_config": {**PIXTRAL, "image_size": 64},
        },
        images={"pixel_values": (1, 3, 64, 64), "image_sizes": [[64, 64]]},
    ),
    "mllama": Architecture(
        {
            "image_token_index": 95,
            "text_config": {"cross_attention_layers": [1, 4]},
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 2,
                "image_size": 32,
                "patch_size": 16,
                "intermediate_layers_indices": [0],
                "vision_output_dim": 32,
            },
        },
        refuses="would come first",
        images={
            "pixel_values": (1, 1, 4, 3, 32, 32),
            "aspect_ratio_ids": [[1]],
            "aspect_ratio_mask": [[[1, 1, 0, 0]]],
            "cross_attention_mask": (),
        },
    ),
    "modernbert-decoder": Architecture(refuses="attn_norm.class is .* but would become"),
    "mpt": Architecture({"expansion_ratio": 2}),
    "nemotron": Architecture({"head_dim": 8, "num_key_value_heads": 2}),
    "nemotron_h": Architecture(
        {
            "layer_types": None,
            "layers_block_type": [
                "linear_attention",
                "moe",
                "full_attention",
                "mlp",
                "linear_attention",
                "full_attention",
            ],
            "ssm_state_size": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 1,
            "moe_shared_expert_intermediate_size": 16,
        },
        refuses="leaves only",
        drops=((2, 5),),
    ),
    "olmo_hybrid": Architecture(
        {"layer_types": MOSTLY_LINEAR}, refuses="leaves only|at least one attention layer", drops=((1, 4),)
    ),
    "paligemma": Architecture(
        {
            "image_token_index": 95,
            "projection_dim": 32,
            "text_config": {"model_type": "gemma"},
            "vision_config": {**SIGLIP, "vision_use_head": False},
        },
        images=PICTURE,
    ),
    "phi4_multimodal": Architecture(
        {
            "vision_config": {**VISION, "crop_size": 32},
            "audio_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_blocks": 2,
                "num_attention_heads": 2,
                "ext_pw_out_channel": 16,
                "depthwise_separable_out_channel": 16,
                "nemo_conv_channels": 16,
            },
        }
    ),
    "qwen2": Architecture({"use_sliding_window": True, "max_window_layers": 3, "head_dim": None}),
    "qwen2_5_vl": Architecture(
        {
            "image_token_id": 95,
            "text_config": MROPE,
            "vision_config": {
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 32,
                "patch_size": 4,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
        },
        images=PATCHES,
    ),
    "qwen2_moe": Architecture({"use_sliding_window": True, "max_window_layers": 3, "mlp_only_layers": [1, 4]}),
    "qwen2_vl": Architecture(
        {"image_token_id": 95, "text_config": MROPE, "vision_config": QWEN2_VISION}, images=PATCHES
    ),
    "qwen3": Architecture({"use_sliding_window": True, "max_window_layers": 3}),
    "qwen3_5": Architecture(
        {"text_config": {"layer_types": MOSTLY_LINEAR}, "vision_config": QWEN_VISION},
        refuses="leaves only",
        drops=((1, 4),),
    ),
    "qwen3_5_moe": Architecture(
        {"text_config": {"layer_types": MOSTLY_LINEAR}, "vision_config": QWEN_VISION},
        refuses="leaves only",
        drops=((1, 4),),
    ),
    "qwen3_5_moe_text": Architecture({"layer_types": MOSTLY_LINEAR}, refuses="leaves only", drops=((1, 4),)),
    "qwen3_5_text": Architecture({"layer_types": MOSTLY_LINEAR}, refuses="leaves only", drops=((1, 4),)),
    "qwen3_moe": Architecture({"mlp_only_layers": [0, 3]}),
    "qwen3_moe_step": Architecture({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, "qwen3_moe"),
    "qwen3_next": Architecture(
        {"layer_types": MOSTLY_LINEAR, "mlp_only_layers": [1, 2]}, refuses="leaves only", drops=((1, 4),)
    ),
    "qwen4_exp": Architecture({"text_config": QWEN4, "vision_config": QWEN_VISION}, refuses="ngram_embedding"),
    "qwen4_exp_text": Architecture(QWEN4, refuses="leaves only|ngram_embedding"),
    "qwen3_vl": Architecture(
        {
            "image_token_id": 95,
            "text_config": MROPE,
            "vision_config": {**QWEN_VISION, "depth": 3, "deepstack_visual_indexes": [0, 1]},
        },
        refuses="features of the image are added behind",
        drops=((2, 3), (3, 5), (2, 4, 5), (2, 3, 4)),
        images=PATCHES,
    ),
    "recurrent_gemma": Architecture({"attention_window_size": SLIDING_WINDOW}, refuses="leaves only", drops=((2, 5),)),
    "rwkv": Architecture(refuses="rescale_every=6: ties layers"),
    "sarvam_mla": Architecture({"first_k_dense_replace": 2}),
    "sarvam_moe": Architecture({"first_k_dense_replace": 2}),
    "smolvlm": Architecture(
        {"image_token_id": 95, "text_config": LLAMA, "vision_config": VISION},
        images={"pixel_values": (1, 1, 3, 32, 32)},
    ),
    "vipllava": Architecture(
        {"image_token_index": 95, "vision_feature_layer": [-2, 0], "text_config": LLAMA, "vision_config": CLIP},
        images=PICTURE,
    ),
    "xlstm": Architecture({"hidden_size": 64, "num_heads": 4, "qk_dim_factor": 1.0}),
    "zamba": Architecture(refuses="leaves only"),
    "zamba2": Architecture(
        {
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "hybrid", "hybrid"],
            "num_mem_blocks": 2,
            "use_shared_attention_adapter": True,
            "adapter_rank": 4,
            "use_mem_rope": True,
            "head_dim": None,
            "initializer_range": 0.1,  # above, rounding decides the text
        },
        refuses="num_mem_blocks=2: ties layers",
        drops=((1, 3), (3, 5), (4, 5)),
    ),
    "zaya": Architecture({"num_experts_per_tok": 1}, refuses="reads the state of the router before it"),
}
"""Alphabetical."""

NOT_CUT: dict[str, str] = {
    "blt": "reads bytes through an encoder of patches: no single list of decoder layers",
    "dots3_note": "a multimodal model around dots3_note_text, not examined",
    "emu3": "transformers saves its text model under a type that it cannot load again",
    "gemma3n": "its vision tower needs the package timm; its text part is gemma3n_text",
    "moshi": "speech: an audio decoder with a second, depthwise decoder inside",
    "moss_transcribe_diarize": "transcribes speech; its text part is qwen3",
    "reformer": "reversible layers",
    "xlnet": "permutation language model, no causal decoder",
    **dict.fromkeys(
        (
            *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "bert-generation", "marian", "mbart"),
            *("musicgen", "musicgen_melody", "mvp", "pegasus", "plbart", "prophetnet", "trocr", "whisper"),
        ),
        "the decoder of an encoder-decoder model",
    ),
    **dict.fromkeys(
        (
            *("bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert"),
            *("roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta", "xlm-roberta-xl"),
            "xmod",
        ),
        "an encoder",
    ),
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"), "a draft model that reads the states of another model"
    ),
}
"""Model types of the causal-LM mapping that have no row, and why."""


FEW = (
    *("arcee", "bamba", "bloom", "cohere2", "deepseek_v3", "falcon_h1", "gemma3_text", "gemma3n_text", "gpt2"),
    *("gpt_oss", "granite", "lfm2_moe", "llama", "llava", "mamba", "nemotron_h", "olmo2", "phi3", "qwen2"),
    *("qwen3_moe", "qwen3_next", "qwen3_vl", "recurrent_gemma", "smollm3", "zamba2"),
)
"""Rows that `make test` looks at: one for every way in which layers differ, share, or are refused."""


def census(names: Iterable[str]) -> list[Any]:
    """Cases of a test over families, of which `make test` runs FEW."""
    return [name if name in FEW else pytest.param(name, marks=pytest.mark.prove) for name in names]


def tiny_config(name: str, **overrides: Any) -> PreTrainedConfig:
    """The configuration of row ``name`` with toy dimensions; None in settings or overrides = unset."""
    row = ARCHITECTURES[name]
    return _toy(CONFIG_MAPPING[row.model_type or name], row.settings | overrides)


def _toy(family: Any, settings: dict[str, Any]) -> PreTrainedConfig:
    known = family.default_config_fields().keys() | family.attribute_map.keys()
    values = {key: value for key, value in SHAPE.items() if key in known}
    if "kv_lora_rank" in known:  # latent attention has no groups of heads
        values["num_key_value_heads"] = values["num_attention_heads"]
    values |= settings
    for part, part_family in family.sub_configs.items():
        part_settings = dict(values.get(part, {}))
        if part_family is AutoConfig:
            part_family = CONFIG_MAPPING[part_settings.pop("model_type")]
        values[part] = _toy(part_family, part_settings)
    return family(**{key: value for key, value in values.items() if value is not None})


def tiny_model(name: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model of row ``name`` in eval mode and float32; ``overrides`` go into its configuration.

    Norms and biases are randomised too: at their usual 1 and 0 a forgotten copy of them would pass every test.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with_images = bool(ARCHITECTURES[name].images)
        automatic = AutoModelForImageTextToText if with_images else AutoModelForCausalLM
        model = automatic.from_config(tiny_config(name, **overrides))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()
