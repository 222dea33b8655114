"""Estimates of small games against their definitions by enumeration."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import pytest

from shoal.compress.metrics.shapley import Absent, antithetic_pairs, local_shapley, present_absent, shapley_of_walks
from shoal.errors import UserError


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


@pytest.mark.parametrize(
    ("num_players", "window", "budget", "message"),
    [
        (12, 2, 11, r"11 subnetworks are too few for 12 layers and a window of 2: .* take 12 or more"),
        (4, 4, 15, r"15 subnetworks are too few for 4 layers and a window of 4: .* take 16 or more"),
        (4, 5, 99, r"window 5 is none of 1..4, the number of layers"),
        (4, 0, 99, r"window 0 is none of 1..4"),
    ],
)
def test_budgets_and_windows_that_give_no_value_are_refused(
    num_players: int, window: int, budget: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        local_shapley(Asked({}), num_players, window=window, num_subnetworks=budget)


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


@pytest.mark.parametrize(
    ("num_absent", "budget", "message"),
    [
        (2, 2, r"with 2 subnetworks of 4 of 6 layers not every layer is present and absent at least once; take 3 or"),
        (4, 2, r"with 2 subnetworks of 2 of 6 layers not every layer is present and absent at least once; take 3 or"),
        (2, 0, r"take 3 or more"),
        (0, 9, r"0 of 6 layers absent leaves nothing to compare"),
        (6, 9, r"6 of 6 layers absent leaves nothing to compare"),
    ],
)
def test_subnetworks_that_compare_nothing_are_refused(num_absent: int, budget: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        present_absent(Asked({}), 6, num_absent=num_absent, num_subnetworks=budget)
