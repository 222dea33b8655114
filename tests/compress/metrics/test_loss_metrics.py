"""Metrics of the loss against float64 loops over really cut models that share no code with them."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrations import (
    ROWS,
    loss_without,
    measured,
    plain_loss,
)
from ranks import call_on_ranks, in_group
from tiny import KINDS, NUM_LAYERS, tiny_model
from transformers import PreTrainedModel

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.importance import Importance, Removal
from shoal.components import Component
from shoal.compress.measure import measure_importance
from shoal.compress.metrics.loss_metrics import LOSS_METRICS
from shoal.compress.metrics.shapley import shapley_of_walks
from shoal.compress.plan import choose_changes
from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers
from shoal.recipe.prune import Prune

Half = tuple[str, int]


CANDIDATES = tuple(range(1, NUM_LAYERS - 1))


def loss_without_halves(model: PreTrainedModel, halves: Sequence[Half]) -> float:
    silenced = copy.deepcopy(model)
    for half, layer in halves:
        name = "self_attn.o_proj" if half == "attention" else "mlp.down_proj"
        for parameter in decoder_layers(silenced)[layer].get_submodule(name).parameters():
            torch.nn.init.zeros_(parameter)
    return plain_loss(silenced)


def plain_greedy(units: Sequence[Any], loss: Callable[[list[Any]], float], count: int) -> list[tuple[Any, float]]:
    found: list[tuple[Any, float]] = []
    for _ in range(count):
        gone = [unit for unit, _ in found]
        tried = [(loss([*gone, unit]), unit) for unit in units if unit not in gone]
        best = min(tried, key=lambda pair: pair[0])
        found.append((best[1], best[0]))
    return found


# --- metrics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_single_drop_perplexity_equals_the_float64_loop(kind: str) -> None:
    model = tiny_model(kind)
    found = measured(model, "single_drop_perplexity")["single_drop_perplexity"]
    expected = [math.exp(loss_without(model, [layer])) for layer in range(NUM_LAYERS)]
    assert found == pytest.approx(expected, rel=3e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3"])
def test_sleb_equals_the_float64_loop_over_cut_models(kind: str) -> None:
    model = tiny_model(kind)
    order = measured(model, "sleb", num_drop=3)["sleb"]
    expected = plain_greedy(CANDIDATES, lambda drop: loss_without(model, drop), 3)
    assert [removal.unit for removal in order] == [Component((layer,)) for layer, _ in expected]
    assert [removal.score for removal in order] == pytest.approx([loss for _, loss in expected], abs=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_blockpruner_equals_the_float64_loop_over_models_with_silent_halves(kind: str) -> None:
    model = tiny_model(kind)
    order = measured(model, "blockpruner", num_drop=2)["blockpruner"]
    halves = [(half, layer) for layer in CANDIDATES for half in ("attention", "mlp")]
    expected = plain_greedy(halves, lambda gone: loss_without_halves(model, gone), 4)
    assert [removal.unit for removal in order] == [Component((layer,), half) for (half, layer), _ in expected]  # pyright: ignore[reportArgumentType]
    assert [removal.score for removal in order] == pytest.approx([loss for _, loss in expected], abs=2e-6)


@pytest.mark.slow
def test_present_absent_equals_its_definition() -> None:
    model = tiny_model("llama")  # one of six layers is absent, and all six subnetworks are measured
    found = measured(model, "present_absent")["present_absent"]
    losses = [loss_without(model, [layer]) for layer in range(NUM_LAYERS)]
    expected = [losses[layer] - (sum(losses) - losses[layer]) / (NUM_LAYERS - 1) for layer in range(NUM_LAYERS)]
    assert found == pytest.approx(expected, abs=4e-6)


@pytest.mark.slow
def test_local_shapley_is_near_the_value_over_all_walks(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    caplog.set_level("INFO")
    found = measured(model, "local_shapley")["local_shapley"]
    assert "no walk is cut short" in caplog.text  # random weights are worse than guessing
    losses = {
        frozenset(drop): loss_without(model, drop) if drop else plain_loss(copy.deepcopy(model))
        for size in range(4)
        for drop in itertools.combinations(range(NUM_LAYERS), size)
    }
    every_walk = [list(itertools.permutations(range(NUM_LAYERS)))]
    exact = shapley_of_walks(lambda sets: [-losses[absent] for absent in sets], NUM_LAYERS, every_walk, window=3)
    errors = [float(part.split("+- ")[1]) for part in caplog.text.split("standard errors: ")[1].split(", layer")]
    assert len(errors) == NUM_LAYERS
    for value, error, expected in zip(found, errors, exact.values, strict=True):
        assert 0 < error < 1
        assert abs(value - expected) < 4 * error


@pytest.mark.parametrize(
    ("name", "num_drop", "message"),
    [
        (
            "sleb",
            5,
            r"sleb: 5 removals are asked for, but there are 4 units that may go \(layer 1, layer 2, layer 3, la",
        ),
        (
            "blockpruner",
            5,
            r"blockpruner: 10 removals are asked for, but there are 8 units that may go \(attention 1, m",
        ),
        ("sleb", 0, r"sleb: 0 removals are asked for"),
    ],
)
def test_more_removals_than_candidates_are_refused(name: str, num_drop: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        measured(tiny_model("llama"), name, num_drop=num_drop)


@pytest.mark.slow
def test_a_plan_can_be_made_of_what_is_measured() -> None:
    model = tiny_model("llama")
    scores = measure_importance(model, ROWS, metrics=list(LOSS_METRICS), batch_size=2, num_drop=2)
    importance = Importance(
        Provenance({}),
        num_layers=scores.num_layers,
        num_tokens=scores.num_tokens,
        layers=scores.layers,
        runs=scores.runs,
        orders=scores.orders,
    )
    assert scores.num_tokens == ROWS.input_ids_NS.numel()
    for name, metric in LOSS_METRICS.items():
        if name != "blockpruner":  # an order of halves
            choice = choose_changes(Prune(metric=name, num_drop=2), num_layers=NUM_LAYERS, importance=importance)
            assert len(choice.drop) == 2
        assert (metric.yields == "order") == (name in scores.orders)
    of_sleb = choose_changes(Prune(metric="sleb", num_drop=2), num_layers=NUM_LAYERS, importance=importance)
    assert set(of_sleb.drop) == {removal.unit.layers[0] for removal in scores.orders["sleb"]}


# --- ranks --------------------------------------------------------------------------------------------------------


def all_metrics(num_rows: int) -> dict[str, Any]:
    rows = PackedRows(ROWS.input_ids_NS[:num_rows], ROWS.position_ids_NS[:num_rows])
    return measured(tiny_model("llama"), *LOSS_METRICS, rows=rows, num_drop=2)


SHARES = {"uneven shares": 5, "a rank without rows": 1}


def _measure_on_rank(rank: int, world_size: int, folder: str) -> None:
    with in_group(rank, world_size, folder):
        torch.save([all_metrics(num_rows) for num_rows in SHARES.values()], f"{folder}/{rank}.pt")


@pytest.mark.prove
def test_two_ranks_give_the_scores_of_one(tmp_path: Path) -> None:
    call_on_ranks(_measure_on_rank, str(tmp_path), ranks=2)
    with torch.serialization.safe_globals([Removal, Component]):
        first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first == second
    for found, num_rows in zip(first, SHARES.values(), strict=True):
        alone = all_metrics(num_rows)
        assert found.keys() == alone.keys() == LOSS_METRICS.keys()
        for name, expected in alone.items():
            if LOSS_METRICS[name].yields == "order":
                assert [removal.unit for removal in found[name]] == [removal.unit for removal in expected]
                assert [r.score for r in found[name]] == pytest.approx([r.score for r in expected], abs=1e-6)
            else:
                assert found[name] == pytest.approx(expected, rel=1e-6, abs=1e-6)
