"""What a cut does beyond one field or tensor per layer: against the definitions, for every cut of small models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any

import pytest
import torch
from architectures import tiny_model
from cases import cases
from torch import Tensor

from shoal.compress.surgery.config_cut import GROUP_RULES
from shoal.compress.surgery.cut_model import cut_model, kept_part, side_by_side_dim
from shoal.errors import UserError
from shoal.models.anatomy import anatomy

CASES = cases(__file__)

NUM_LAYERS = 7

Special = Callable[[int, dict[str, Any]], bool]


def cuts(num_layers: int = NUM_LAYERS) -> Iterator[tuple[int, ...]]:
    """Every choice of at least one layer to keep."""
    for size in range(1, num_layers + 1):
        yield from combinations(range(num_layers), size)


def attempt(fields: tuple[str, ...], values: dict[str, Any], keep: Sequence[int]) -> dict[str, Any] | None:
    """The student's values of ``fields``, or None for a cut that they cannot express."""
    changes = GROUP_RULES[fields](values, keep)
    return values | changes if changes else None


def by_period(layer: int, values: dict[str, Any]) -> bool:
    return layer % values["attn_layer_period"] == values["attn_layer_offset"]


def by_interval(layer: int, values: dict[str, Any]) -> bool:
    """As ERNIE 4.5 reads its three fields."""
    first, last = values["moe_layer_start_index"], values["moe_layer_end_index"]
    return (layer + 1) % values["moe_layer_interval"] == 0 and first <= layer <= last


def by_step(layer: int, values: dict[str, Any]) -> bool:
    """As Qwen's mixtures read their two fields."""
    return layer not in values["mlp_only_layers"] and (layer + 1) % values["decoder_sparse_step"] == 0


def by_cycle(layer: int, values: dict[str, Any]) -> bool:
    return (values["block_types"] * 100)[layer] == "attention"


GROUPS: list[tuple[Special, dict[str, Any]]] = [
    *((by_period, {"attn_layer_period": period, "attn_layer_offset": period - 1}) for period in (1, 2, 3, 9)),
    (by_period, {"attn_layer_period": 3, "attn_layer_offset": 0}),
    *(
        (by_interval, {"moe_layer_interval": step, "moe_layer_start_index": first, "moe_layer_end_index": last})
        for step, first, last in ((1, 0, 6), (1, 2, 4), (2, 1, 6), (3, 0, 6), (2, 9, 9))
    ),
    *((by_step, {"decoder_sparse_step": step, "mlp_only_layers": dense}) for step in (1, 2) for dense in ([], [1, 3])),
    (by_cycle, {"block_types": ["recurrent", "recurrent", "attention"]}),
]


@pytest.mark.parametrize(("special", "values"), GROUPS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_fields_that_name_layers_together_name_the_kept_ones_or_nothing_could(
    special: Special, values: dict[str, Any]
) -> None:
    fields = tuple(values)
    exact = 0
    for keep in cuts():
        wanted = [special(layer, values) for layer in keep]
        student = attempt(fields, values, keep)
        if student is None:
            assert not _says(special, values, wanted), keep
            continue
        assert [special(layer, student) for layer in range(len(keep))] == wanted, keep
        exact += 1
    assert exact > NUM_LAYERS


def _says(special: Special, values: dict[str, Any], wanted: Sequence[bool]) -> bool:
    """Whether any values of these fields, tried one by one, would name the layers in ``wanted``."""
    ranges = [range(1 if number == 0 else 0, len(wanted) + 2) for number in range(len(values))]
    grid = torch.cartesian_prod(*(torch.tensor(one) for one in ranges)).tolist()
    candidates = (dict(zip(values, numbers, strict=True)) for numbers in grid)
    return any(
        [special(layer, candidate) for layer in range(len(wanted))] == list(wanted)
        for candidate in candidates
        if candidate.get("attn_layer_offset", 0) < candidate.get("attn_layer_period", 1)  # a rule of Jamba
    )


def shared(kinds: Sequence[str], num_shared: int) -> dict[int, int]:
    """Layer without keys and values of its own -> the last layer of its kind that has some."""
    first = len(kinds) - num_shared
    return {
        layer: max(donor for donor in range(first) if kinds[donor] == kinds[layer])
        for layer in range(first, len(kinds))
    }


def choosers(kinds: Sequence[str], _: int) -> dict[int, int]:
    """Layer that attends to what another chose -> the last one before it that chooses."""
    return {
        layer: max(other for other in range(layer) if kinds[other] == "full")
        for layer, kind in enumerate(kinds)
        if kind == "shared"
    }


@pytest.mark.parametrize(
    ("fields", "kinds", "sources"),
    [
        (("num_kv_shared_layers", "layer_types"), ["local", "full", "local", "full", "local", "local", "full"], shared),
        (("indexer_types",), ["full", "shared", "full", "full", "shared", "shared", "full"], choosers),
    ],
    ids=["keys and values", "chosen tokens"],
)
def test_layer_that_reads_from_another_keeps_its_source_or_the_cut_is_refused(
    fields: tuple[str, ...], kinds: list[str], sources: Callable[[Sequence[str], int], dict[int, int]]
) -> None:
    values = {fields[-1]: kinds, "num_kv_shared_layers": 3}
    source = sources(kinds, 3)
    for keep in cuts():
        lost = [layer for layer in keep if layer in source and source[layer] not in keep]
        if lost:
            with pytest.raises(UserError, match=rf"layer {source[lost[0]]}, .*keep layer {source[lost[0]]}, or drop"):
                GROUP_RULES[fields](values, keep)
            continue
        student = values | GROUP_RULES[fields](values, keep)
        found = sources([kinds[layer] for layer in keep], student["num_kv_shared_layers"])
        expected = {layer: source[layer] for layer in keep if layer in source}
        assert {keep[layer]: keep[other] for layer, other in found.items()} == expected, keep


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_hybrid_layers_keep_their_shared_block_and_no_block_is_stored_twice(num_blocks: int) -> None:
    kinds = ["linear_attention", "hybrid", "hybrid", "linear_attention", "hybrid", "hybrid", "hybrid"]
    values = {"num_mem_blocks": num_blocks, "layers_block_type": kinds}
    rank = {layer: number for number, layer in enumerate(layer for layer, kind in enumerate(kinds) if kind == "hybrid")}
    for keep in cuts():
        blocks = [rank[layer] % num_blocks for layer in keep if layer in rank]
        in_turn = [blocks[new % len(set(blocks))] for new in range(len(blocks))]
        student = attempt(("num_mem_blocks", "layers_block_type"), values, keep)
        assert (student is None) == (in_turn != blocks), keep
        assert student is None or not blocks or student["num_mem_blocks"] == len(set(blocks))


def test_tables_of_all_layers_keep_the_parts_of_the_kept_ones() -> None:
    embeddings = torch.arange(2 * 3 * 4).reshape(2, 12)  # 2 tokens, 3 layers of 4
    assert kept_part("a.embed_tokens_per_layer.weight", embeddings, (0, 2), 3).tolist() == [
        [0, 1, 2, 3, 8, 9, 10, 11],
        [12, 13, 14, 15, 20, 21, 22, 23],
    ]
    projection = torch.arange(6)[:, None]  # 3 layers of 2
    assert kept_part("a.per_layer_model_projection.weight", projection, (1,), 3).flatten().tolist() == [2, 3]
    assert kept_part("a.embed_tokens.weight", embeddings, (1,), 3) is embeddings
    assert side_by_side_dim("model.embed_tokens_per_layer.weight") == 1
    assert side_by_side_dim("model.embed_tokens.weight") is None


def test_every_layer_of_gemma_3n_still_gets_its_own_input() -> None:
    teacher, drop = tiny_model("gemma3n_text"), (1, 5)
    student = cut_model(teacher, drop)
    input_ids = torch.randint(0, 90, (1, 5), generator=torch.Generator().manual_seed(0))
    assert torch.equal(_layer_inputs(student, input_ids), _layer_inputs(teacher, input_ids)[:, :, [0, 2, 3, 4]])
    tables = [name for name, _ in student.named_parameters() if side_by_side_dim(name) is not None]
    assert len(tables) == 2
    shared_storage = cut_model(teacher, drop, share=True)
    assert all(shared_storage.get_parameter(name).is_contiguous() for name in tables)


@torch.inference_mode()
def _layer_inputs(model: Any, input_ids: Tensor) -> Tensor:
    decoder = model.get_submodule(anatomy(model).layers_name.rpartition(".")[0])
    return decoder.project_per_layer_inputs(decoder.embed_tokens(input_ids), decoder.get_per_layer_inputs(input_ids))


@pytest.mark.parametrize("num_kept", range(1, 8))
def test_branches_keep_their_scale_at_every_depth(num_kept: int) -> None:
    teacher = tiny_model("minicpm3", num_hidden_layers=8)
    both: tuple[Any, Any] = teacher, cut_model(teacher, tuple(range(num_kept, 8)))
    old, new = (anatomy(model).layers[0].residual_scale for model in both)
    assert torch.tensor(new) == torch.tensor(old)


@pytest.mark.parametrize(("family", "drop", "message"), CASES)
def test_layer_that_standing_elsewhere_would_change_is_named(family: str, drop: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cut_model(tiny_model(family), drop)
