"""Depth cuts where one field or one whole tensor per layer is not the whole story.

Some families say only with several fields together which layers are special, let late layers read the keys and values
of an earlier one, or keep a table for all layers in one tensor. Every rule here either says of the kept layers exactly
what was said of them before, or refuses and names cuts that would work.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from shoal.errors import UserError
from shoal.models.families import family

GroupRule = Callable[[dict[str, Any], Sequence[int]], dict[str, Any]]
"""(the teacher's configuration as a dictionary, kept teacher indices in order) -> values of fields of the student."""


def instead(keep: Sequence[int], cuts: str) -> str:
    """What to ask for in place of a plan that keeps ``keep``: other ``cuts``, or new layers in other places."""
    return "insert new layers in other places, or none" if len(set(keep)) < len(keep) else cuts


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
    raise UserError(
        f"config.{period_field}={period}, {offset_field}={offset}: says that one layer in {period} is special, but of "
        f"the kept ones these would be: {special}; "
        + instead(keep, f"drop layers at either end, or {period} neighbouring ones at a time")
    )


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
    raise UserError(
        f"config.moe_layer_interval={interval}: says that one layer in {interval} is a mixture of experts, but of the "
        f"kept ones these would be: {wanted}; "
        + instead(keep, f"drop the last layers, or {interval} neighbouring ones at a time")
    )


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
    for kind, donor in donors.items():
        users = [layer for layer in keep if layer >= first_shared and kinds[layer] == kind]
        if users and keep.count(donor) > 1:
            raise UserError(
                f"config.num_kv_shared_layers={values['num_kv_shared_layers']}: layers {users} use the keys and values "
                f"of layer {donor} ({kind}), and would use those of a new layer after it; insert it elsewhere"
            )
        if users and donor not in keep:
            raise UserError(
                f"config.num_kv_shared_layers={values['num_kv_shared_layers']}: layers {users} have no keys and values "
                f"of their own but use those of layer {donor} ({kind}), which these cuts drop; keep layer {donor}, or "
                "drop those layers too"
            )
    return {"num_kv_shared_layers": sum(layer >= first_shared for layer in keep)}


def _keep_indexers(values: dict[str, Any], keep: Sequence[int]) -> dict[str, Any]:
    """Sparse attention: a "shared" layer attends to the tokens that the last "full" layer before it chose."""
    kinds: list[str] = values["indexer_types"]
    for layer in keep:
        chooser = max(index for index in range(layer + 1) if kinds[index] == "full" or index == 0)
        users = [user for user in keep if user > chooser and "full" not in kinds[chooser + 1 : user + 1]]
        if kinds[layer] == "shared" and keep.count(chooser) > 1:
            raise UserError(
                f"config.indexer_types: layers {users} attend to the tokens that layer {chooser} chooses, and would to "
                "those that a new layer after it chooses; insert it elsewhere"
            )
        if kinds[layer] == "shared" and chooser not in keep:
            raise UserError(
                f"config.indexer_types: layers {users} attend to the tokens that layer {chooser} chooses, which these "
                f"cuts drop; keep layer {chooser}, or drop those layers too"
            )
    return {"indexer_types": [kinds[layer] for layer in keep]}


def _spell_out_cycle(values: dict[str, Any], keep: Sequence[int]) -> dict[str, Any]:
    """RecurrentGemma repeats a short list of kinds; a list as long as the student says it of any cut."""
    cycle = values["block_types"]
    return {"block_types": [cycle[layer % len(cycle)] for layer in keep]}


def _recount_shared_blocks(values: dict[str, Any], keep: Sequence[int]) -> dict[str, Any]:
    """Zamba 2: the k-th hybrid layer runs block k % num_mem_blocks, whose weights are shared."""
    num_blocks = values["num_mem_blocks"]
    ranks = _kept_ranks(values["layers_block_type"], keep)
    blocks = [rank % num_blocks for rank in ranks]
    if not blocks:
        return {}
    # blocks are used in turn, so the kept ones must repeat from the first on
    for candidate in range(1, len(set(blocks)) + 1):  # more would store a block twice
        if all(block == blocks[new % candidate] for new, block in enumerate(blocks)):
            return {"num_mem_blocks": candidate}
    hybrid = [layer for layer in keep if values["layers_block_type"][layer] == "hybrid"]
    raise UserError(
        f"config.num_mem_blocks={num_blocks}: the hybrid layers share blocks in turn, but the kept ones {hybrid} would "
        f"use blocks {blocks}; "
        + instead(keep, f"drop {num_blocks} neighbouring hybrid layers at a time, or those at either end")
    )


def _kept_ranks(kinds: Sequence[str], keep: Sequence[int]) -> list[int]:
    """Which of the teacher's hybrid layers, counted among themselves, the kept ones are."""
    hybrid = [layer for layer, kind in enumerate(kinds) if kind == "hybrid"]
    return [hybrid.index(layer) for layer in keep if layer in hybrid]


def _rescale_depth(values: dict[str, Any], keep: Sequence[int]) -> dict[str, Any]:
    """MiniCPM multiplies every residual branch by scale_depth / sqrt(number of layers); this must not change a bit."""
    scale = values["scale_depth"] / math.sqrt(values["num_hidden_layers"])
    root = math.sqrt(len(keep))
    # scale * root rounds, so dividing it by root may miss the scale by a unit in the last place: its neighbours do not
    for limit in (math.inf, -math.inf):
        candidate = scale * root
        for _ in range(4):
            if candidate / root == scale:
                return {"scale_depth": candidate}
            candidate = math.nextafter(candidate, limit)
    raise UserError(
        f"config.scale_depth={values['scale_depth']}: no value gives {len(keep)} layers the scale that the teacher's "
        "have; drop one layer more or less"
    )


_PERIODS = (("attn_layer_period", "attn_layer_offset"), ("expert_layer_period", "expert_layer_offset"))
GROUP_RULES: dict[tuple[str, ...], GroupRule] = {
    ("scale_depth", "num_hidden_layers"): _rescale_depth,
    **{fields: partial(_refit_period, *fields) for fields in _PERIODS},
    ("moe_layer_interval", "moe_layer_start_index", "moe_layer_end_index"): _refit_interval,
    ("decoder_sparse_step", "mlp_only_layers"): _list_dense_layers,
    ("num_kv_shared_layers", "layer_types"): _recount_shared_layers,
    ("indexer_types",): _keep_indexers,
    ("block_types",): _spell_out_cycle,
    ("num_mem_blocks", "layers_block_type"): _recount_shared_blocks,
}
"""Fields that only together say which layers are special -> their rule. The first field must be set."""

LAYERS_SIDE_BY_SIDE: dict[str, int] = {"embed_tokens_per_layer.weight": 1, "per_layer_model_projection.weight": 0}
"""End of a tensor's name -> the dimension (num_layers x size per layer) in which it holds a part for every layer."""


def refuse_moved_layers(model_type: str, values: dict[str, Any], keep: Sequence[int]) -> None:
    """Refuse a cut by which a kept layer would become another kind of layer just by standing elsewhere.

    ``values`` is what the text decoder's configuration says, ``keep`` the kept layers in order.

    Raises:
        UserError: naming the layer, the reason, and layers to keep or drop.
    """
    num_layers, special = values["num_hidden_layers"], family(model_type)
    kinds = values.get("layer_types") or [""] * num_layers
    first, last = keep[0], keep[-1]
    for name, alone, layer in (
        ("layer 0", special.first_alone, 0),
        ("the last layer", special.last_alone, num_layers - 1),
    ):
        if alone and layer not in keep:
            raise UserError(f"drop: {name} of {model_type} alone {alone}, which no other can become; keep it")
        if alone and keep.count(layer) > 1:
            raise UserError(f"insert: {name} of {model_type} alone {alone}, which no other can; insert after another")
    if special.counts_from_zero and len(set(keep)) < len(keep):
        raise UserError(
            f"insert: {model_type} {special.counts_from_zero} from a layer's index, so that no layer may move; this "
            "model cannot be made deeper"
        )
    if special.counts_from_zero and last != len(keep) - 1:
        raise UserError(
            f"drop: {model_type} {special.counts_from_zero} from a layer's index, so that no kept layer may move; "
            f"drop the last layers: {list(range(len(keep), num_layers))}"
        )
    if special.measured_by_first and kinds[0] == "full_attention" != kinds[first]:
        raise UserError(
            f"config.layer_types: layer {first} ({kinds[first]}) would come first, but by its first layer transformers "
            f"measures the cached text of {model_type}; keep a full_attention layer before it"
        )
    if special.ends_with_full_attention and kinds[last] not in ("", "full_attention"):
        before = max((layer for layer in keep if kinds[layer] == "full_attention"), default=None)
        after = [layer for layer in range(last, num_layers) if kinds[layer] == "full_attention"]
        remedy = f"keep one of layers {after}" + ("" if before is None else f", or drop all above layer {before}")
        raise UserError(
            f"config.layer_types: layer {last} ({kinds[last]}) would be the student's last, and {model_type} gives its "
            f"last layer full attention; {remedy}"
        )


def side_by_side_dim(name: str) -> int | None:
    """The dimension of tensor ``name`` in which every layer has its part, or None for all other tensors."""
    return next((dim for end, dim in LAYERS_SIDE_BY_SIDE.items() if name.endswith(end)), None)


def kept_part(name: str, tensor: Tensor, keep: Sequence[int], num_layers: int) -> Tensor:
    """``tensor`` itself, or a copy of the kept layers' parts where ``name`` holds a part for every layer."""
    dim = side_by_side_dim(name)
    if dim is None:
        return tensor
    parts = tensor.unflatten(dim, (num_layers, -1))  # (..., L * size, ...) -> (..., L, size, ...)
    return parts.index_select(dim, torch.tensor(keep, device=tensor.device)).flatten(dim, dim + 1)


_ADAPTER = re.compile(r"(?<=_adapter_list\.)\d+(?=\.)")
"""Zamba 2 keeps in every shared block one adapter for each hybrid layer that runs it, numbered among hybrid layers."""


def teacher_leaf(config: PreTrainedConfig, leaf: str, keep: Sequence[int]) -> str:
    """Name within its layer of the teacher's tensor that the student's tensor ``leaf`` copies; mostly the same."""
    if config.model_type != "zamba2":
        return leaf
    ranks = _kept_ranks(config.layers_block_type, keep)
    return _ADAPTER.sub(lambda match: str(ranks[int(match[0])]), leaf)


def goes_with_a_dropped_layer(config: PreTrainedConfig, name: str, keep: Sequence[int]) -> bool:
    """Whether the teacher's tensor ``name`` serves only dropped layers though a kept one holds it."""
    adapter = _ADAPTER.search(name) if config.model_type == "zamba2" else None
    return adapter is not None and int(adapter[0]) not in _kept_ranks(config.layers_block_type, keep)
