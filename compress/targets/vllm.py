"""What vLLM makes of a student's configuration: whether it loads it, and whether every layer is what it was.

Read, not run: vLLM needs a GPU, so no rule here was ever compared with a running vLLM. Each repeats what the code in
the wheel of VERSION does, and holds for that release only; a newer one wants every rule read again.

vLLM has its own code for most families. Where that code works out a layer's kind from its number, or from a field that
transformers does not obey, a cut student may load without a word and be another model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from shoal.models.anatomy import text_config

from .llama_cpp import names_in

VERSION = "0.33.0"
"""Release of vLLM whose registry and model code these rules were read from."""

NATIVE = names_in(
    """
    AXK1ForCausalLM AfmoeForCausalLM ApertusForCausalLM BeamForCausalLM BloomForCausalLM Cohere2ForCausalLM
    Cohere2MoeForCausalLM CohereForCausalLM DbrxForCausalLM DeepseekV2ForCausalLM DeepseekV32ForCausalLM
    DeepseekV3ForCausalLM DeepseekV4ForCausalLM DoryForCausalLM Dots3NoteForCausalLM Ernie4_5ForCausalLM
    Ernie4_5_MoeForCausalLM Exaone4ForCausalLM ExaoneMoeForCausalLM FalconForCausalLM FalconH1ForCausalLM
    FalconMambaForCausalLM FlintForCausalLM GPT2LMHeadModel GPTJForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM
    Gemma3ForConditionalGeneration Gemma3nForCausalLM Gemma3nForConditionalGeneration Gemma4ForCausalLM
    Gemma4ForConditionalGeneration Gemma4UnifiedForConditionalGeneration GemmaForCausalLM Glm4ForCausalLM
    Glm4MoeForCausalLM Glm4MoeLiteForCausalLM GlmMoeDsaForCausalLM GptOssForCausalLM GraniteForCausalLM
    GraniteMoeForCausalLM GraniteMoeHybridForCausalLM GraniteMoeSWAForCausalLM GraniteMoeSharedForCausalLM
    GraniteSWAForCausalLM HYV3ForCausalLM HYV4ForCausalLM HrmTextForCausalLM HyperCLOVAXForCausalLM
    InklingForCausalLM JambaForCausalLM KimiLinearForCausalLM LagunaForCausalLM Lfm2ForCausalLM Lfm2MoeForCausalLM
    Llama4ForCausalLM LlamaForCausalLM LongcatFlashForCausalLM Mamba2ForCausalLM
    MambaForCausalLM MiMoV2FlashForCausalLM MiniCPM3ForCausalLM MiniMaxM2ForCausalLM Ministral3ForCausalLM
    MistralForCausalLM MixtralForCausalLM NemotronForCausalLM NemotronHForCausalLM OPTForCausalLM
    OlmoHybridForCausalLM OlmoeForCausalLM Phi3ForCausalLM Qwen2ForCausalLM Qwen2MoeForCausalLM Qwen3ForCausalLM
    Qwen3MoeForCausalLM Qwen3NextForCausalLM Qwen3_5ForCausalLM Qwen3_5MoeForCausalLM Qwen4ExpForCausalLM
    StableLmForCausalLM Zamba2ForCausalLM
    """
)
"""Architectures of its registry that AutoModelForCausalLM can load."""

OWN_CONFIGURATION = names_in("beam dory dots3_note dots3_note_text flint hy_v4 inkling_text")
"""Model types for which vLLM's configuration class or field names are others than transformers'; not compared here."""

NEWEST_TRANSFORMERS = "5.20"
"""Newest that vLLM of this version can be installed with."""

TOO_NEW = names_in(
    """
    apertus1p5_text exaone inkling2_loop_text inkling2_text internlm3 iquestcoder lara_mini lfm3 sarvam_mla sarvam_moe
    """
)
"""Model types that neither that transformers nor vLLM itself knows."""

LISTED = names_in(
    """
    ArceeForCausalLM CwmForCausalLM FlexOlmoForCausalLM GPTBigCodeForCausalLM GPTNeoXForCausalLM GlmForCausalLM
    HunYuanDenseV1ForCausalLM HunYuanMoEV1ForCausalLM Jais2ForCausalLM Kolibri1ForCausalLM MellumForCausalLM
    Olmo2ForCausalLM Olmo3ForCausalLM OlmoForCausalLM PhiForCausalLM SeedOssForCausalLM SmolLM3ForCausalLM
    Starcoder2ForCausalLM VaultGemmaForCausalLM
    """
)
"""Architectures that its registry sends to its Transformers backend: transformers' layers with vLLM's attention."""

RECURRENT = names_in("linear_attention mamba conv hybrid hybrid_sliding")

Loads = Literal["yes", "no", "unknown"]
Rule = Callable[[Any], str | None]
"""Configuration of the text decoder -> mistake that vLLM would make; None = none."""


def vllm_loads(config: Any) -> tuple[Loads, str]:
    """Whether vLLM of VERSION loads a model of this configuration and runs it as transformers does, and why.

    Only what depends on the configuration is judged, not whether a GPU or a kernel is there for it.
    """
    text = text_config(config)
    architecture = _architecture(config)
    if text.model_type in TOO_NEW:
        return "no", f"it works with transformers up to {NEWEST_TRANSFORMERS}, which does not know {text.model_type}"
    if architecture not in NATIVE:
        return _through_transformers(architecture, text)
    if text.model_type in OWN_CONFIGURATION:
        return "unknown", f"it reads {text.model_type} by field names of its own, which shoal has not compared"
    for rule in RULES.get(text.model_type, ()):
        if wrong := rule(text):
            return "no", wrong
    kinds = set(getattr(text, "layer_types", None) or ())
    if architecture in HYBRID and not kinds & RECURRENT and kinds - {"full_attention"}:
        return "unknown", "it expects recurrent layers in this family, and none is left"
    return "yes", f"it has its own code for {architecture}"


def _architecture(config: Any) -> str:
    """The class that AutoModelForCausalLM makes of the configuration and a student's config.json names."""
    names: Any = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type) or config.architectures or [""]
    return names if isinstance(names, str) else names[0]


def _through_transformers(architecture: str, text: Any) -> tuple[Loads, str]:
    model_class = getattr(transformers, architecture, None)
    if model_class is None or not (model_class.is_backend_compatible() or model_class._can_set_attn_implementation()):
        return "no", f"it has no code for {architecture or text.model_type} and cannot run transformers' either"
    if others := sorted({*(getattr(text, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}):
        kinds = " and ".join(others)
        return "no", f"it has no code for {architecture}, and its Transformers backend none for {kinds} layers"
    if architecture in LISTED:
        return "yes", f"it runs transformers' code for {architecture} (its Transformers backend)"
    return "unknown", f"it has no code for {architecture}; its Transformers backend may run it, but does not list it"


def _sliding(text: Any) -> list[bool]:
    return [kind == "sliding_attention" for kind in text.layer_types]


def _sparse(text: Any) -> list[bool]:
    """Which layers are mixtures of experts in transformers, for families in which dense layers come first."""
    if kinds := getattr(text, "mlp_layer_types", None):
        return [kind == "sparse" for kind in kinds]
    return [layer >= text.first_k_dense_replace for layer in range(text.num_hidden_layers)]


def _missing(field: str) -> str:
    return f"it needs {field}, which this configuration does not have"


def _unless(claim: str, assumed: Sequence[Any], actual: Sequence[Any]) -> str | None:
    """``claim``, and for which layers it is wrong; None where it is right for all."""
    if len(assumed) != len(actual):
        return f"{claim}, for {len(assumed)} layers, and the student has {len(actual)}"
    wrong = [str(layer) for layer, pair in enumerate(zip(assumed, actual, strict=True)) if pair[0] != pair[1]]
    named = f"layer{'s' * (len(wrong) > 1)} {', '.join(wrong)}"
    return f"{claim}, which is wrong for {named} of the student" if wrong else None


def _alternating_window(text: Any) -> str | None:
    sliding = _sliding(text)
    # a layer without a window of its own gets the model's, which is set only where all layers slide
    assumed = [layer % 2 == 0 or all(sliding) for layer in range(len(sliding))]
    return _unless("it lets every second layer slide, layer 0 first, whatever layer_types says", assumed, sliding)


def _no_mixed_window(text: Any) -> str | None:
    mixed = len(set(text.layer_types)) > 1
    return "it refuses models of this family in which some layers slide and others do not" if mixed else None


def _no_single_window(text: Any) -> str | None:
    sliding = _sliding(text)
    return _unless("it lets all layers of this family slide or none", [all(sliding)] * len(sliding), sliding)


def _rope_without_sliding(text: Any) -> str | None:
    wrong = text.sliding_window is not None and not any(_sliding(text))
    return "it turns RoPE on in full-attention layers once no sliding layer is left" if wrong else None


def _dense_first(text: Any) -> str | None:
    first, every = getattr(text, "first_k_dense_replace", None), getattr(text, "moe_layer_freq", 1)
    if first is None:
        return _missing("first_k_dense_replace")
    assumed = [layer >= first and layer % every == 0 for layer in range(text.num_hidden_layers)]
    return _unless(f"it goes by first_k_dense_replace={first} and moe_layer_freq={every}", assumed, _sparse(text))


def _experts_by_step(text: Any) -> str | None:
    step, layers = text.interleave_moe_layer_step, range(text.num_hidden_layers)
    assumed = [step > 0 and (layer + 1) % step == 0 for layer in layers]
    claim = f"it finds mixtures of experts by interleave_moe_layer_step={step}, whatever moe_layers says"
    return _unless(claim, assumed, [layer in text.moe_layers for layer in layers])


def _shared_cache(text: Any) -> str | None:
    first = text.num_hidden_layers - text.num_kv_shared_layers
    kinds = text.layer_types
    for kind in sorted(set(kinds[first:])):
        expected = first - (2 if kind == "sliding_attention" else 1)
        if max((layer for layer in range(first) if kinds[layer] == kind), default=None) != expected:
            return f"it lets late layers read keys and values of layer {expected} as {kind}, which is not the last such"
    return None


def _hybrid_pattern(text: Any) -> str | None:
    for field, actual in (("hybrid_layer_pattern", _sliding(text)), ("moe_layer_freq", _sparse(text))):
        value = getattr(text, field, None)
        if not isinstance(value, list | tuple):
            return _missing(f"the list {field}")
        if wrong := _unless(f"it goes by {field}", [bool(entry) for entry in value], actual):
            return wrong
    return None


def _numbered_from_one(text: Any) -> str | None:
    fields = getattr(text, "linear_attn_config", None)
    if not fields:
        return _missing("linear_attn_config")
    layers = range(text.num_hidden_layers)
    recurrent = [kind == "linear_attention" for kind in text.layer_types]
    wrong = _unless("it goes by linear_attn_config", [layer + 1 in fields["kda_layers"] for layer in layers], recurrent)
    assumed = [layer >= getattr(text, "first_k_dense_replace", 0) for layer in layers]
    return wrong or _unless("it goes by first_k_dense_replace", assumed, _sparse(text))


def _indexers(text: Any) -> str | None:
    """Which layers choose tokens anew and which reuse the choice of the layer before."""
    layers = range(text.num_hidden_layers)
    pattern, every = getattr(text, "index_topk_pattern", None), getattr(text, "index_topk_freq", 1)
    if pattern:
        shared = [layer < len(pattern) and pattern[layer] == "S" for layer in layers]
    else:
        offset = getattr(text, "index_skip_topk_offset", 2)
        shared = [max(layer - offset + 1, 0) % every != 0 for layer in layers]
    actual = [kind == "shared" for kind in getattr(text, "indexer_types", None) or ["full"] * len(layers)]
    return _unless("it goes by index_topk_pattern or index_topk_freq, whatever indexer_types says", shared, actual)


RULES: dict[str, tuple[Rule, ...]] = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe", "glm4_moe_lite", "hy_v3"), (_dense_first,)),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa"), (_dense_first, _indexers)),
    **dict.fromkeys(("exaone4", "exaone_moe"), (_rope_without_sliding,)),
    **dict.fromkeys(("qwen2", "qwen3"), (_no_mixed_window,)),
    "gemma3n_text": (_shared_cache,),
    "gpt_oss": (_alternating_window,),
    "kimi_linear": (_numbered_from_one,),
    "llama4_text": (_experts_by_step,),
    "mimo_v2_flash": (_hybrid_pattern,),
    "qwen2_moe": (_no_single_window,),
}
"""Model type of the text decoder -> rules. Families without one get every layer's kind from the fields that
transformers obeys: layer_types, no_rope_layers, num_dense_layers, mlp_only_layers, moe_layer_*_index and the like."""

HYBRID = names_in(
    """
    FalconH1ForCausalLM GraniteMoeHybridForCausalLM JambaForCausalLM KimiLinearForCausalLM Lfm2ForCausalLM
    Lfm2MoeForCausalLM NemotronHForCausalLM OlmoHybridForCausalLM Qwen3NextForCausalLM Qwen3_5ForCausalLM
    Qwen3_5MoeForCausalLM Zamba2ForCausalLM
    """
)
"""Architectures that vLLM gives a cache of states beside that of keys and values."""
