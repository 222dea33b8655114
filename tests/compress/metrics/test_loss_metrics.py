"""Metrics of the loss against float64 loops over really cut models that share no code with them."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrations import loss_without, measured, plain_loss
from packed_rows import ROWS
from ranks import call_on_ranks, in_group
from tiny import KINDS, NUM_LAYERS, tiny_model
from transformers import PreTrainedModel

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.importance import Importance, Removal
from shoal.components import Component
from shoal.compress.measure import measure_importance
from shoal.compress.metrics.loss_metrics import (
    LOSS_METRICS,
    Absent,
    antithetic_pairs,
    local_shapley,
    present_absent,
    shapley_of_walks,
)
from shoal.compress.plan import choose_changes
from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers
from shoal.recipe.prune import CutByScore

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
    ("name", "num_drop", "message"), [("sleb", 5, "5 .* 4 are possible"), ("blockpruner", 5, "10 .* 8 are possible")]
)
def test_more_removals_than_candidates_are_refused(name: str, num_drop: int, message: str) -> None:
    with pytest.raises(UserError, match=f"{name}: {message}"):
        measured(tiny_model("llama"), name, num_drop=num_drop)


def test_one_layer_is_compared_with_no_other() -> None:
    with pytest.raises(UserError, match="local_shapley compares layers, and this model has only one"):
        measured(tiny_model("llama", num_hidden_layers=1), "local_shapley")


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
            choice = choose_changes(CutByScore(metric=name, num_drop=2), num_layers=NUM_LAYERS, importance=importance)
            assert len(choice.drop) == 2
        assert (metric.yields == "order") == (name in scores.orders)
    of_sleb = choose_changes(CutByScore(metric="sleb", num_drop=2), num_layers=NUM_LAYERS, importance=importance)
    assert set(of_sleb.drop) == {removal.unit.layers[0] for removal in scores.orders["sleb"]}


# --- estimates of small games against their definitions by enumeration


def random_game(num_players: int, *, seed: int = 0) -> dict[Absent, float]:
    """A worth for every set of absent players, with strong interactions."""
    generator = random.Random(seed)
    sets = [frozenset(s) for size in range(num_players + 1) for s in itertools.combinations(range(num_players), size)]
    return {absent: generator.gauss(0, 1) - len(absent) ** 1.5 for absent in sets}


class Asked:
    """A game that remembers what it was asked for."""

    def __init__(self, worth: dict[Absent, float]) -> None:
        self.worth = worth
        self.sets: list[Absent] = []

    def __call__(self, sets: Sequence[Absent]) -> list[float]:
        self.sets += sets
        return [self.worth[absent] for absent in sets]


def exact_shapley(worth: dict[Absent, float], num_players: int) -> list[float]:
    """sum over S without i of |S|! (n - |S| - 1)! / n! * (v(S + i) - v(S)), S being what is present."""
    everyone = frozenset(range(num_players))
    values = []
    for player in range(num_players):
        total = 0.0
        others = sorted(everyone - {player})
        for size in range(num_players):
            for present in map(frozenset, itertools.combinations(others, size)):
                weight = math.factorial(size) * math.factorial(num_players - size - 1) / math.factorial(num_players)
                total += weight * (worth[everyone - present - {player}] - worth[everyone - present])
        values.append(total)
    return values


# --- local Shapley values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_players", [1, 2, 3, 4])
def test_all_orders_give_the_exact_shapley_values(num_players: int) -> None:
    worth = random_game(num_players)
    orders = [list(itertools.permutations(range(num_players)))]
    found = shapley_of_walks(Asked(worth), num_players, orders, window=num_players)
    assert found.values == pytest.approx(exact_shapley(worth, num_players), abs=1e-12)
    assert sum(found.values) == pytest.approx(worth[frozenset()] - worth[frozenset(range(num_players))])


def test_a_whole_window_estimates_the_shapley_value_within_its_errors() -> None:
    num_players, worth = 6, random_game(6)
    exact = exact_shapley(worth, num_players)
    inside, deviations, estimates = 0, [], []
    for seed in range(100):
        found = local_shapley(Asked(worth), num_players, window=num_players, num_subnetworks=12 * 40, seed=seed)
        estimates.append(found.values)
        for value, error, expected in zip(found.values, found.standard_errors, exact, strict=True):
            deviations.append((value - expected) / error)
            inside += abs(value - expected) < 2 * error
    means = [sum(values) / len(values) for values in zip(*estimates, strict=True)]
    assert means == pytest.approx(exact, abs=0.06)
    assert 0.92 < inside / len(deviations) < 0.98
    assert 0.9 < math.sqrt(sum(d * d for d in deviations) / len(deviations)) < 1.15


def test_a_smaller_window_means_over_the_first_to_leave() -> None:
    num_players, window, worth = 6, 2, random_game(6)
    expected = []
    for player in range(num_players):
        others = sorted(set(range(num_players)) - {player})
        means = []
        for size in range(window):  # how many have left before
            before = [frozenset(absent) for absent in itertools.combinations(others, size)]
            means.append(sum(worth[absent] - worth[absent | {player}] for absent in before) / len(before))
        expected.append(sum(means) / window)
    every_order = [list(itertools.permutations(range(num_players)))]
    asked = Asked(worth)
    assert shapley_of_walks(asked, num_players, every_order, window=window).values == pytest.approx(expected)
    assert {len(absent) for absent in asked.sets} == {0, 1, 2}
    found = local_shapley(Asked(worth), num_players, window=window, num_subnetworks=4000)
    for value, error, mean in zip(found.values, found.standard_errors, expected, strict=True):
        assert error < 0.1
        assert abs(value - mean) < 4 * error


@pytest.mark.parametrize(("num_players", "window"), [(6, 6), (6, 3), (7, 3), (12, 2), (30, 3)])
def test_orders_come_in_antithetic_pairs_that_let_all_players_leave_equally_often(
    num_players: int, window: int
) -> None:
    pairs = antithetic_pairs(num_players, window, 11, seed=1)
    first = [0] * num_players
    for order, reverse in pairs:
        assert sorted(order) == list(range(num_players))
        assert list(reverse) == list(order)[::-1]
        for player in {*order[:window], *reverse[:window]}:
            first[player] += 1
    assert max(first) - min(first) <= 1
    assert pairs == antithetic_pairs(num_players, window, 11, seed=1)
    assert pairs != antithetic_pairs(num_players, window, 11, seed=2)


def test_a_walk_ends_where_it_comes_to_chance() -> None:
    worth = {absent: 3.0 - sum({0: 1, 1: 2.5, 2: 0.5, 3: 0.25}[player] for player in absent) for absent in GAME_OF_4}
    asked = Asked(worth)
    found = shapley_of_walks(asked, 4, [[(0, 1, 2, 3)]], window=4, chance=0.0)
    assert found.values == (1.0, 2.5, 0.0, 0.0)  # the step that leads to chance counts, what leaves later does not
    assert asked.sets == [frozenset(), frozenset({0}), frozenset({0, 1})]
    assert all(math.isnan(error) for error in found.standard_errors)  # of one cluster
    both = shapley_of_walks(Asked(worth), 4, [[(0, 1, 2, 3)], [(3, 2, 0, 1)]], window=4, chance=0.0)
    assert both.values == pytest.approx((1.0, 2.5, 0.25, 0.125))
    at_chance = Asked(worth)
    assert shapley_of_walks(at_chance, 4, [[(0, 1, 2, 3)]], window=4, chance=3.0).values == (0.0,) * 4
    assert at_chance.sets == [frozenset()]


GAME_OF_4 = random_game(4)


# --- present-absent -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_absent", [1, 2, 3])
def test_present_absent_is_its_definition_where_all_subnetworks_are_taken(num_absent: int) -> None:
    num_players, worth = 6, random_game(6)
    sets = [frozenset(absent) for absent in itertools.combinations(range(num_players), num_absent)]
    expected = []
    for player in range(num_players):
        present = [worth[absent] for absent in sets if player not in absent]
        gone = [worth[absent] for absent in sets if player in absent]
        expected.append(sum(present) / len(present) - sum(gone) / len(gone))
    found = present_absent(Asked(worth), num_players, num_absent=num_absent, num_subnetworks=len(sets))
    assert found.values == pytest.approx(expected)
    assert found.standard_errors == (0.0,) * num_players
    assert found.num_subnetworks == len(sets)


def test_a_sample_of_subnetworks_estimates_the_definition_within_its_errors() -> None:
    num_players, num_absent, worth = 8, 3, random_game(8)
    settings = {"num_absent": num_absent}
    exact = present_absent(Asked(worth), num_players, num_subnetworks=56, **settings).values
    means = [0.0] * num_players
    inside = 0
    for seed in range(60):
        found = present_absent(Asked(worth), num_players, num_subnetworks=28, seed=seed, **settings)
        for player, (value, error) in enumerate(zip(found.values, found.standard_errors, strict=True)):
            means[player] += value / 60
            inside += abs(value - exact[player]) < 2 * error
    assert inside / (60 * num_players) > 0.9
    assert means == pytest.approx(exact, abs=0.2)


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
