"""The student's configuration, made from the teacher's. ``keep`` is everywhere the kept teacher indices, in order; a
new layer, which is of the kind of the one below it, repeats that one's.

A depth cut touches more of a configuration than `num_hidden_layers`: lists with one entry per layer, thresholds, lists
of layer indices, and rules such as "every sixth layer". RULES knows the fields that transformers 5.24 uses. What a cut
cannot express is refused; cut_model.py then proves on the built model that every kept layer is still what it was.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from shoal.errors import UserError
from shoal.models.anatomy import deepstack_layers
from shoal.models.checkpoint_files import CLOSED_GAPS, KEPT_LAYERS, ZEROED_WEIGHTS
from shoal.models.families import family
from shoal.models.load import NOT_CAUSAL

from .special_cuts import GROUP_RULES, instead, refuse_moved_layers

log = logging.getLogger(__name__)

Rule = Callable[[str, Any, Sequence[int]], Any]
"""(field, the teacher's value, kept teacher indices in order) -> the student's value."""


def keep_entries(field: str, value: Any, keep: Sequence[int]) -> Any:
    """One entry per layer (a list, or a string with one letter per layer): the kept layers' entries."""
    if isinstance(value, str):
        return "".join(value[layer] for layer in keep)
    if isinstance(value, list):
        return [value[layer] for layer in keep]
    return keep_step(field, value, keep)


def keep_entries_or_value(_: str, value: Any, keep: Sequence[int]) -> Any:
    """Either one entry per layer, or one value that holds for all of them and stays."""
    return [value[layer] for layer in keep] if isinstance(value, list) else value


def recount(_: str, value: Any, keep: Sequence[int]) -> int:
    """A threshold "layers below this index": how many of them stay."""
    return sum(layer < value for layer in keep)


def count(_: str, value: Any, keep: Sequence[int]) -> int:
    """Another name of the number of layers (xLSTM)."""
    return len(keep)


def renumber(_: str, value: Any, keep: Sequence[int]) -> list[int]:
    """A list of layer indices: those kept, under their new numbers."""
    return [new for layer in value for new, old in enumerate(keep) if old == layer]


def renumber_cross_attention(field: str, value: Any, keep: Sequence[int]) -> list[int]:
    """Llama 3.2 Vision's layers that read the image: without one they are passed over and cache nothing.

    Raises:
        UserError: such a layer would come first.
    """
    student = renumber(field, value, keep)
    if 0 in student:
        raise UserError(
            f"config.{field}: would begin with layer {keep[0]}, but the first layer must be one that caches the text, "
            f"because transformers reads the text's length there; keep a layer before {keep[0]}"
        )
    return student


def renumber_from_one(field: str, value: Any, keep: Sequence[int]) -> list[int]:
    """A list of layer numbers that start at 1: those kept, under their new numbers."""
    return [layer + 1 for layer in renumber(field, [number - 1 for number in value], keep)]


def renumber_lists_from_one(field: str, value: Any, keep: Sequence[int]) -> dict[str, Any]:
    """Kimi's settings of linear attention, among them lists of layer numbers that start at 1."""
    is_list = {key: key.endswith("_layers") and isinstance(entry, list) for key, entry in value.items()}
    return {
        key: renumber_from_one(f"{field}.{key}", entry, keep) if is_list[key] else entry for key, entry in value.items()
    }


def spell_out_groups(_: str, value: Any, keep: Sequence[int]) -> list[Any]:
    """GPT-Neo's groups [[kinds in turn, times], ...]: one group of the kept layers' kinds."""
    kinds = [kind for group, times in value for kind in list(group) * times]
    return [[[kinds[layer] for layer in keep], 1]]


def renumber_keys(_: str, value: Any, keep: Sequence[int]) -> dict[str, Any]:
    """A mapping from layer index to settings: those of kept layers, under their new numbers."""
    settings = {int(layer): setting for layer, setting in value.items()}  # saved as "05" where there are ten or more
    return {str(new): settings[old] for new, old in enumerate(keep) if old in settings}


def keep_step(field: str, value: Any, keep: Sequence[int]) -> Any:
    """A rule "every n-th layer": true of the student only where every kept layer moved by a multiple of n.

    Raises:
        UserError: a layer moved by another number.
    """
    if value in (0, 1) or all((old - new) % value == 0 for new, old in enumerate(keep)):
        return value
    raise UserError(
        f"config.{field}={value}: says that one layer in {value} is special, and this plan would shift which one; "
        + instead(keep, f"drop layers in aligned groups of {value}")
    )


def refuse(field: str, value: Any, _: Sequence[int]) -> Any:
    """Raise the UserError that says what a cut cannot express and why."""
    raise UserError(
        f"config.{field}={value!r}: ties layers to each other in a way shoal cannot cut yet; choose another model"
    )


def drop_mtp(field: str, value: Any, _: Sequence[int]) -> int:
    """Multi-token-prediction layers come after the last layer and only speed decoding up: the student has none."""
    log.warning("config.%s=%s: the student is saved without multi-token-prediction layers", field, value)
    return 0


FIELDS: dict[Rule, str] = {
    keep_entries: """
        layer_types mlp_layer_types attention_layers layers_block_type no_rope_layers indexer_types moe_layer_freq
        layer_rope_theta num_attention_heads_per_layer hybrid_override_pattern hybrid_layer_pattern attn_type_list""",
    keep_entries_or_value: """
        intermediate_size activation_sparsity_pattern moe_intermediate_size moe_topk num_experts num_shared_expert""",
    recount: """
        max_window_layers first_k_dense_replace num_dense_layers loop_layer_index_start loop_layer_index_end""",
    renumber: """
        mlp_only_layers moe_layers attn_layer_indices full_attn_idxs local_layer_ids hybrid_layer_ids""",
    keep_step: """
        decoder_sparse_step moe_layer_interval interleave_moe_layer_step attn_layer_period expert_layer_period
        full_attention_interval global_attn_every_n_layers no_rope_layer_interval sliding_window_pattern""",
    count: "num_blocks",
    renumber_from_one: "ple_layer_ids",
    renumber_cross_attention: "cross_attention_layers",
    renumber_lists_from_one: "linear_attn_config",
    spell_out_groups: "attention_types",
    renumber_keys: "per_layer_config",
    refuse: "num_kv_shared_layers deepstack_visual_indexes n_recurrent_layers rescale_every",
    drop_mtp: "num_nextn_predict_layers num_mtp_layers num_mtp_modules mtp_num_hidden_layers",
}
"""What a depth cut does to a configuration -> the fields it is done to. Unset and empty values stay as they are."""
RULES: dict[str, Rule] = {field: rule for rule, fields in FIELDS.items() for field in fields.split()}


SPELT_OUT_BY: dict[str, str] = {
    **dict.fromkeys(("sliding_window_pattern", "_sliding_window_pattern", "full_attention_interval"), "layer_types"),
    **dict.fromkeys(("layer_group_size", "layer_switch", "global_attn_every_n_layers"), "layer_types"),
    "no_rope_layer_interval": "no_rope_layers",
    "interleave_moe_layer_step": "moe_layers",
    "attn_layer_period": "layers_block_type",
    **dict.fromkeys(("index_topk_pattern", "index_topk_freq", "index_skip_topk_offset"), "indexer_types"),
}
"""A step rule -> the list that transformers makes from it and obeys once it is there."""

WITHOUT_KV_CACHE = {"linear_attention", "conv", "mamba", "mlp", "moe", "dense", "sparse"}
"""Layer kinds by which a cache cannot tell how long the sequence is."""

NOT_PER_LAYER = {
    *("architectures", "bos_token_id", "eos_token_id", "pad_token_id", "keys_to_ignore_at_inference", "id2label"),
    *("mtp_layers_block_type", "mtp_layer_types", "mtp_mlp_layer_types", "mtp_local_layer_ids"),
    *(CLOSED_GAPS, KEPT_LAYERS, ZEROED_WEIGHTS),
}
"""Lists that are not about the decoder layers, whatever their length and name."""


def cut_config(config: PreTrainedConfig, keep: Sequence[int]) -> PreTrainedConfig:
    """A new configuration for the layers ``keep`` (teacher indices, increasing) of ``config``, which stays unchanged.

    Raises:
        UserError: a field that the cut cannot express, a list with one entry per layer that shoal does not know, or a
            model that is not a decoder alone.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise UserError("config.quantization_config: quantised weights cannot be cut; give the full-precision model")
    student = copy.deepcopy(config)
    # the part that is cut: `student` itself, or one of its sub-configurations
    text = student.get_text_config(decoder=True)
    if reason := family(text.model_type).no_cut:
        raise UserError(f"{text.model_type}: {reason}; shoal cannot cut this family")
    values = _explicit_values(text)
    num_layers = text.num_hidden_layers
    _refuse_unknown_lists(values, num_layers)
    refuse_moved_layers(text.model_type, {**values, "num_hidden_layers": num_layers}, keep)
    changes = _changes(values, keep)
    rebuilt = _rebuild(text, {**values, **changes, "num_hidden_layers": len(keep)}, without=_obsolete(values, changes))
    if student is text:
        student = rebuilt
    else:
        _refuse_moved_features(config, keep)
        part = next((name for name in student.sub_configs if getattr(student, name) is text), None)
        if part is None:  # a view of one configuration, as T5 gives of its decoder
            raise UserError(f"{config.model_type}: {NOT_CAUSAL}")
        setattr(student, part, rebuilt)
    setattr(student, KEPT_LAYERS, [uncut_layers(config, num_layers)[layer] for layer in keep])
    vars(student).pop("auto_map", None)  # names code that lies beside the teacher only
    if zeroed := getattr(config, ZEROED_WEIGHTS, None):
        setattr(student, ZEROED_WEIGHTS, _renumbered_names(zeroed, keep))
    _check_round_trip(config, student, keep)
    _refuse_without_attention(config, student)
    return student


def _refuse_moved_features(config: PreTrainedConfig, keep: Sequence[int]) -> None:
    """Refuse cuts that move a text layer behind which features of the image are added, and lists of an outer
    configuration that may name text layers."""
    fed = deepstack_layers(config)
    if tuple(keep[: len(fed)]) != fed:
        gone = [layer for layer in fed if layer not in keep]
        named = f"drop: names {gone[0]}, one" if gone else "insert: puts a new layer among those"
        raise UserError(
            f"{named} of the layers 0 to {fed[-1]} of {config.model_type} behind which features of the image are added "
            f"(deepstack_visual_indexes); keep these {len(fed)} layers as they are"
        )
    for field, value in config.to_dict().items():
        about_layers = "layer" in field and isinstance(value, list | dict) and not field.startswith("vision_")
        if about_layers and field not in (*NOT_PER_LAYER, *config.sub_configs):
            raise UserError(
                f"config.{field}: may name layers of the text decoder, which shoal does not know to renumber for "
                f"{config.model_type}; choose another model"
            )


def _explicit_values(text: PreTrainedConfig) -> dict[str, Any]:
    """Everything that configuration says; lists that a class derives from rules are there already."""
    return {key: value for key, value in text.to_dict().items() if key not in ("transformers_version", "model_type")}


def _changes(values: dict[str, Any], keep: Sequence[int]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    # rules of several fields first: where one says of a field what becomes of it, the field's own rule is not asked
    for fields, group_rule in GROUP_RULES.items():
        if all(field in values for field in fields) and _is_obeyed(fields[0], values):
            changes |= group_rule(values, keep)
    for field, rule in RULES.items():
        if field not in changes and _is_obeyed(field, values):
            changes[field] = rule(field, values[field], keep)
    return changes


def _is_obeyed(field: str, values: dict[str, Any]) -> bool:
    """Whether ``field`` is set and no list says the same layer by layer."""
    spelt_out = SPELT_OUT_BY.get(field)
    return values.get(field) not in (None, 0, [], {}, "") and (spelt_out is None or values.get(spelt_out) is None)


def _obsolete(values: dict[str, Any], changes: dict[str, Any]) -> set[str]:
    """Step rules that a list replaces: left in the file they would mislead whoever reads the rule and not the list."""
    return {field for field, spelt_out in SPELT_OUT_BY.items() if field in values and spelt_out in changes}


def _rebuild(text: PreTrainedConfig, values: dict[str, Any], *, without: set[str]) -> PreTrainedConfig:
    declared = type(text).default_config_fields()  # a class would put its default in the place of one that is left out
    kept = {key: value for key, value in values.items() if key not in without or key in declared}
    try:
        rebuilt = type(text).from_dict(kept)
    except (ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"config: {text.model_type} does not allow what these cuts would leave: {reason}; drop other layers"
        ) from error
    # loading details that are no part of the saved file
    rebuilt._attn_implementation = text._attn_implementation
    rebuilt._name_or_path = text._name_or_path
    return rebuilt


def uncut_layers(config: PreTrainedConfig, num_layers: int) -> list[int]:
    """The uncut model's index of every layer, so that a second cut still names the first teacher's layers.

    Raises:
        UserError: the configuration names another number of layers.
    """
    recorded = getattr(config, KEPT_LAYERS, None)
    if recorded is None:
        return list(range(num_layers))
    if len(recorded) != num_layers:
        raise UserError(
            f"config.{KEPT_LAYERS}: names {len(recorded)} layers but the model has {num_layers}; "
            "the configuration was edited after the cut"
        )
    return list(recorded)


def _renumbered_names(names: Sequence[str], keep: Sequence[int]) -> list[str]:
    """Parameter names of kept layers under their new numbers; the first number in a name is the layer's."""
    renamed = []
    for name in names:
        before, layer, after = re.split(r"(?<=\.)(\d+)(?=\.)", name, maxsplit=1)
        if int(layer) in keep:
            renamed.append(f"{before}{list(keep).index(int(layer))}{after}")
    return renamed


def _refuse_unknown_lists(values: dict[str, Any], num_layers: int) -> None:
    for field, value in values.items():
        is_list = isinstance(value, list | tuple) and len(value) > 0
        if is_list and RULES.get(field) in (keep_entries, keep_entries_or_value) and len(value) != num_layers:
            raise UserError(
                f"config.{field}: has {len(value)} entries for {num_layers} layers; shoal cuts it only where there is "
                "one per layer"
            )
        # a list as long as the model is deep may mean the layers by chance; better asked about than shifted
        about_layers = is_list and (len(value) == num_layers > 1 or "layer" in field)
        if about_layers and field not in RULES and field not in NOT_PER_LAYER:
            raise UserError(
                f"config.{field}: is a list about layers ({len(value)} entries, {num_layers} layers) that shoal does "
                "not know; add it to FIELDS in compress/surgery/config_cut.py"
            )


def _refuse_without_attention(config: PreTrainedConfig, student: PreTrainedConfig) -> None:
    """A hybrid model cut down to its recurrent layers would load and then fail at the first cached token."""
    before, after = (
        set(getattr(part.get_text_config(decoder=True), "layer_types", None) or ()) for part in (config, student)
    )
    if before - WITHOUT_KV_CACHE and not after - WITHOUT_KV_CACHE:
        raise UserError(
            f"drop: leaves only {' and '.join(sorted(after))} layers; transformers cannot generate with a cache then: "
            f"keep one layer of {' or '.join(sorted(before - WITHOUT_KV_CACHE))}"
        )


def _check_round_trip(config: PreTrainedConfig, student: PreTrainedConfig, keep: Sequence[int]) -> None:
    """Assert that saving and loading keeps the cut: no rule of the class may overwrite a list we cut.

    Per-layer lists that a class computes (properties) must come out as the kept entries too.
    """
    reloaded = type(student).from_dict(student.to_diff_dict())  # what save_pretrained writes
    before, after = config.get_text_config(decoder=True), reloaded.get_text_config(decoder=True)
    if after.num_hidden_layers != len(keep):
        raise UserError(
            f"config.num_hidden_layers: reads {after.num_hidden_layers} after a reload instead of {len(keep)}; "
            f"shoal cannot cut the {config.model_type} family yet"
        )
    refuse_wrong_entries(before, after, keep)


def refuse_wrong_entries(before: PreTrainedConfig, after: PreTrainedConfig, keep: Sequence[int]) -> None:
    """Per-layer lists of two text configurations, computed ones too, must hold the kept layers' entries.

    Raises:
        UserError: naming the first list that does not.
    """
    for field in (name for name, rule in RULES.items() if rule is keep_entries):
        old, new = getattr(before, field, None), getattr(after, field, None)
        if isinstance(old, list | tuple) and len(old) > 0 and list(new or ()) != [old[layer] for layer in keep]:
            raise UserError(
                f"config.{field}: reads {new} after a reload, which is not what the kept layers had; "
                f"shoal cannot cut these layers of the {before.model_type} family"
            )
