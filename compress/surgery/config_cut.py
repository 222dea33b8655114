"""The student's configuration, made from the teacher's. ``keep`` is everywhere the kept teacher indices, in order.

A depth cut touches more of a configuration than `num_hidden_layers`: lists with one entry per layer, thresholds, lists
of layer indices, and rules such as "every sixth layer". RULES knows the fields that transformers 5.25 uses. What a cut
cannot express is refused; cut_model.py then proves on the built model that every kept layer is still what it was.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from shoal.errors import UserError
from shoal.models.anatomy import deepstack_layers
from shoal.models.checkpoint_files import CLOSED_GAPS, KEPT_LAYERS, NOT_CAUSAL
from shoal.models.families import family
from shoal.yaml_text import own_yaml

log = logging.getLogger(__name__)

Rule = Callable[[str, Any, Sequence[int]], Any]
"""(field, the teacher's value, kept teacher indices in order) -> the student's value."""
GroupRule = Callable[[dict[str, Any], Sequence[int]], dict[str, Any]]
"""(the teacher's configuration as a dictionary, kept teacher indices in order) -> values of fields of the student."""


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
        f"config.{field}={value}: one layer in {value} is special in this model, and this plan would move that "
        f"pattern; drop aligned groups of {value} layers, for example 0 to {value - 1}"
    )


def refuse(field: str, value: Any, _: Sequence[int]) -> Any:
    """Raise the UserError that says what a cut cannot express and why."""
    raise UserError(
        f"config.{field}={value!r}: ties layers to each other, and shoal cannot cut them; choose other "
        "layers, or another model"
    )


def drop_mtp(field: str, value: Any, _: Sequence[int]) -> int:
    """Multi-token-prediction layers come after the last layer and only speed decoding up: the student has none."""
    log.warning("config.%s=%s: the student is saved without multi-token-prediction layers", field, value)
    return 0


_TABLES = own_yaml(__file__)
RULES: dict[str, Rule] = {
    field: globals()[rule] for rule, fields in _TABLES["rules"].items() for field in fields.split()
}
"""Field of a configuration -> what a depth cut does to it. Unset and empty values stay as they are."""


def _refit_period(period_field: str, offset_field: str, values: dict[str, Any], keep: Sequence[int]) -> dict[str, Any]:
    """Jamba: layer i is special where i % period == offset. Another pair may say so of the kept layers."""
    period, offset = values[period_field], values[offset_field]
    # new indices of the kept special layers, which must again be an arithmetic sequence
    special = [new for new, old in enumerate(keep) if old % period == offset]
    # the teacher's own period first; one above the number of layers says that at most one is special
    for candidate in (period, *range(1, len(keep) + 2)):
        start = special[0] if special else candidate - 1  # no special layer: the first one lies past the end
        if start < candidate and list(range(start, len(keep), candidate)) == special:
            return {period_field: candidate, offset_field: start}
    return {}


def _refit_interval(values: dict[str, Any], keep: Sequence[int]) -> dict[str, Any]:
    """ERNIE 4.5: every n-th layer between a first and a last one is a mixture of experts."""
    fields = ("moe_layer_interval", "moe_layer_start_index", "moe_layer_end_index")
    interval, first, last = (values[field] for field in fields)

    def sparse(layers: Sequence[int], interval: int, first: int, last: int) -> list[int]:
        return [new for new, old in enumerate(layers) if (old + 1) % interval == 0 and first <= old <= last]

    wanted = sparse(keep, interval, first, last)
    start, end = (wanted[0], wanted[-1]) if wanted else (len(keep), len(keep))
    student = range(len(keep))
    for candidate in (interval, *range(1, len(keep) + 1)):
        if sparse(student, candidate, start, end) == wanted:
            return dict(zip(fields, (candidate, start, end), strict=True))
    return {}


def _list_dense_layers(values: dict[str, Any], keep: Sequence[int]) -> dict[str, Any]:
    """Qwen's mixtures: every n-th layer is sparse unless listed as dense; the list alone can say it of any cut."""
    step, listed = values["decoder_sparse_step"], values["mlp_only_layers"] or ()
    dense = [new for new, old in enumerate(keep) if old in listed or (old + 1) % step != 0]
    if all((new in dense) == ((new + 1) % step != 0) for new, old in enumerate(keep) if old not in listed):
        return {"mlp_only_layers": [new for new, old in enumerate(keep) if old in listed], "decoder_sparse_step": step}
    return {"mlp_only_layers": dense, "decoder_sparse_step": 1}


def _recount_shared_layers(values: dict[str, Any], keep: Sequence[int]) -> dict[str, Any]:
    """Gemma 3n and 4: the last n layers use the keys and values of the last earlier layer of their attention kind."""
    kinds: list[str] = values["layer_types"]
    first_shared = len(kinds) - values["num_kv_shared_layers"]
    donors = {kind: layer for layer, kind in enumerate(kinds[:first_shared])}
    _refuse_lost_sources(
        f"num_kv_shared_layers={values['num_kv_shared_layers']}",
        "uses the keys and values",
        {layer: donors[kinds[layer]] for layer in keep if layer >= first_shared},
        keep,
    )
    return {"num_kv_shared_layers": sum(layer >= first_shared for layer in keep)}


def _keep_indexers(values: dict[str, Any], keep: Sequence[int]) -> dict[str, Any]:
    """Sparse attention: a "shared" layer attends to the tokens that the last "full" layer before it chose."""
    kinds: list[str] = values["indexer_types"]
    choosers = {
        layer: max(index for index in range(layer + 1) if kinds[index] == "full" or index == 0)
        for layer in keep
        if kinds[layer] == "shared"
    }
    _refuse_lost_sources("indexer_types", "uses the chosen tokens", choosers, keep)
    return {"indexer_types": [kinds[layer] for layer in keep]}


def _refuse_lost_sources(field: str, what: str, sources: dict[int, int], keep: Sequence[int]) -> None:
    """Refuse layers without the one layer that they read from; ``sources``: layer -> that one."""
    for layer, source in sources.items():
        if source not in keep:
            raise UserError(
                f"config.{field}: layer {layer} {what} of layer {source}, which this plan drops; keep layer "
                f"{source}, or drop all layers that read from it"
            )


def _recount_shared_blocks(values: dict[str, Any], keep: Sequence[int]) -> dict[str, Any]:
    """Zamba 2: the k-th hybrid layer runs block k % num_mem_blocks, whose weights are shared."""
    num_blocks = values["num_mem_blocks"]
    blocks = [rank % num_blocks for rank in kept_ranks(values["layers_block_type"], keep)]
    if not blocks:
        return {"num_mem_blocks": num_blocks}
    # blocks are used in turn, so the kept ones must repeat from the first on
    for candidate in range(1, len(set(blocks)) + 1):  # more would store a block twice
        if all(block == blocks[new % candidate] for new, block in enumerate(blocks)):
            return {"num_mem_blocks": candidate}
    return {}


def kept_ranks(kinds: Sequence[str], keep: Sequence[int]) -> list[int]:
    """Which of the teacher's hybrid layers, counted among themselves, the kept ones are."""
    hybrid = [layer for layer, kind in enumerate(kinds) if kind == "hybrid"]
    return [hybrid.index(layer) for layer in keep if layer in hybrid]


def _rescale_depth(values: dict[str, Any], keep: Sequence[int]) -> dict[str, Any]:
    """MiniCPM multiplies every residual branch by scale_depth / sqrt(number of layers), which must stay: to a unit in
    the last place of float64, so that float32, in which it multiplies, has the same number."""
    return {"scale_depth": values["scale_depth"] * math.sqrt(len(keep) / values["num_hidden_layers"])}


_PERIODS = (("attn_layer_period", "attn_layer_offset"), ("expert_layer_period", "expert_layer_offset"))
GROUP_RULES: dict[tuple[str, ...], GroupRule] = {
    ("scale_depth", "num_hidden_layers"): _rescale_depth,
    **{fields: partial(_refit_period, *fields) for fields in _PERIODS},
    ("moe_layer_interval", "moe_layer_start_index", "moe_layer_end_index"): _refit_interval,
    ("decoder_sparse_step", "mlp_only_layers"): _list_dense_layers,
    ("num_kv_shared_layers", "layer_types"): _recount_shared_layers,
    ("indexer_types",): _keep_indexers,
    # RecurrentGemma repeats a short list of kinds; a list as long as the student says it of any cut
    ("block_types",): lambda values, keep: {
        "block_types": [(own := values["block_types"])[n % len(own)] for n in keep]
    },
    ("num_mem_blocks", "layers_block_type"): _recount_shared_blocks,
}
"""Fields that only together say which layers are special -> their rule, whose answer is empty where no values could
say it; then the first field's own rule is asked. The first field must be set."""

SPELT_OUT_BY = {rule: spelt for spelt, rules in _TABLES["spelt_out_by"].items() for rule in rules.split()}
"""A step rule -> the list that transformers makes from it and obeys once it is there."""

WITHOUT_KV_CACHE = {"linear_attention", "conv", "mamba", "mlp", "moe", "dense", "sparse"}
"""Layer kinds by which a cache cannot tell how long the sequence is."""
WITHOUT_STATE = {"mlp", "moe"}
"""Those that keep nothing in a cache."""

NOT_PER_LAYER = {
    *("architectures", "bos_token_id", "eos_token_id", "pad_token_id", "keys_to_ignore_at_inference", "id2label"),
    *("mtp_layers_block_type", "mtp_layer_types", "mtp_mlp_layer_types", "mtp_local_layer_ids"),
    *(CLOSED_GAPS, KEPT_LAYERS),
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
    # all that it says; lists that a class derives from rules are there already
    values = {key: value for key, value in text.to_dict().items() if key not in ("transformers_version", "model_type")}
    num_layers = text.num_hidden_layers
    _refuse_unknown_lists(config, values, num_layers)
    changes = _changes(values, keep)
    # step rules that a list replaces: left in the file they would mislead whoever reads the rule and not the list
    obsolete = {field for field, spelt_out in SPELT_OUT_BY.items() if field in values and spelt_out in changes}
    rebuilt = _rebuild(text, {**values, **changes, "num_hidden_layers": len(keep)}, without=obsolete)
    if student is text:
        student = rebuilt
    else:
        fed = deepstack_layers(config)
        if tuple(keep[: len(fed)]) != fed:
            raise UserError(
                f"drop: {config.model_type} adds features of the image after the layers 0 to {fed[-1]} "
                f"(deepstack_visual_indexes); keep these {len(fed)} layers"
            )
        part = next((name for name in student.sub_configs if getattr(student, name) is text), None)
        if part is None:  # a view of one configuration, as T5 gives of its decoder
            raise UserError(f"{config.model_type}: {NOT_CAUSAL}")
        setattr(student, part, rebuilt)
    setattr(student, KEPT_LAYERS, [uncut_layers(config, num_layers)[layer] for layer in keep])
    vars(student).pop("auto_map", None)  # names code that lies beside the teacher only
    # no rule of the class may overwrite a list that was cut
    reloaded = type(student).from_dict(student.to_diff_dict())  # what save_pretrained writes
    refuse_wrong_entries(config.get_text_config(decoder=True), reloaded.get_text_config(decoder=True), keep)
    _refuse_useless_cache(config, student, keep)
    return student


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


def _rebuild(text: PreTrainedConfig, values: dict[str, Any], *, without: set[str]) -> PreTrainedConfig:
    declared = type(text).default_config_fields()  # a class would put its default in the place of one that is left out
    kept = {key: value for key, value in values.items() if key not in without or key in declared}
    try:
        rebuilt = type(text).from_dict(kept)
    except (ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"config: {text.model_type} does not allow the layers that this plan keeps: {reason}; drop other layers"
        ) from error
    # loading details that are no part of the saved file
    rebuilt._attn_implementation = text._attn_implementation
    rebuilt._name_or_path = text._name_or_path
    return rebuilt


def uncut_layers(config: PreTrainedConfig, num_layers: int) -> list[int]:
    """The uncut model's index of every layer, so that a second cut still names the first teacher's layers."""
    return list(getattr(config, KEPT_LAYERS, None) or range(num_layers))


def _refuse_unknown_lists(config: PreTrainedConfig, values: dict[str, Any], num_layers: int) -> None:
    """Refuse lists about layers that no rule is known for, in the text decoder's ``values`` or around them."""
    lists = {field: value for field, value in values.items() if isinstance(value, list | tuple) and len(value) > 0}
    # a list as long as the model is deep may mean the layers by chance; better asked about than shifted
    unknown = [
        field
        for field, value in lists.items()
        if (RULES.get(field) in (keep_entries, keep_entries_or_value) and len(value) != num_layers)
        or ((len(value) == num_layers > 1 or "layer" in field) and field not in RULES and field not in NOT_PER_LAYER)
    ]
    if config.get_text_config(decoder=True) is not config:
        outer = {field: value for field, value in config.to_dict().items() if isinstance(value, list | dict)}
        others = (*NOT_PER_LAYER, *config.sub_configs)
        unknown += [f for f in outer if "layer" in f and not f.startswith("vision_") and f not in others]
        lists |= outer
    if unknown:
        raise UserError(
            f"config.{unknown[0]}: has an entry for every layer ({len(lists[unknown[0]])} entries, {num_layers} "
            "layers), and shoal does not know its meaning; add it to compress/surgery/config_cut.yaml"
        )


def _refuse_useless_cache(config: PreTrainedConfig, student: PreTrainedConfig, keep: Sequence[int]) -> None:
    """Refuse students whose KV cache would not tell how long the text is, though all is right without one."""
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or []
    before, after = set(kinds), set(getattr(student.get_text_config(decoder=True), "layer_types", None) or ())
    by_first = family(text.model_type).measured_by_first and kinds[0] == "full_attention" != kinds[keep[0]]
    # from transformers 5.25 on, a first layer of this kind ends its generation with an AttributeError
    by_first = by_first or (bool(kinds) and kinds[0] not in WITHOUT_STATE and kinds[keep[0]] in WITHOUT_STATE)
    if by_first or keep[0] in (getattr(text, "cross_attention_layers", None) or ()):
        problem = (
            f"layer {keep[0]} would come first and keeps no cache, but transformers measures the cached text of "
            f"{text.model_type} by the first layer; keep an earlier layer that has a cache"
        )
    elif before - WITHOUT_KV_CACHE and not after - WITHOUT_KV_CACHE:
        problem = (
            f"leaves only {' and '.join(sorted(after))} layers, and transformers cannot generate with a cache "
            f"from these; keep one layer of {' or '.join(sorted(before - WITHOUT_KV_CACHE))}"
        )
    else:
        return
    raise UserError(f"drop: {problem}")


def refuse_wrong_entries(before: PreTrainedConfig, after: PreTrainedConfig, keep: Sequence[int]) -> None:
    """The number of layers and per-layer lists of two text configurations, computed ones too, must be those of the kept
    layers."""
    expected: dict[str, Any] = {"num_hidden_layers": len(keep)}
    for field in (name for name, rule in RULES.items() if rule is keep_entries):
        old = getattr(before, field, None)
        if isinstance(old, list | tuple) and len(old) > 0:
            expected[field] = [old[layer] for layer in keep]
    for field, entries in expected.items():
        found = getattr(after, field, None)
        if (list(found or ()) if isinstance(entries, list) else found) != entries:
            raise UserError(
                f"config.{field}: is {found} after a reload, not the value of the kept layers; shoal cannot cut "
                f"these layers of the {before.model_type} family"
            )
