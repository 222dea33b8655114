"""The programme against all subsets, over items of equal and unequal savings, one resource and several."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction

import pytest

from shoal.compress.knapsack import Saving, by_cost, cheapest, tradeoffs

NUM_ITEMS = 9


def cost_of(costs: list[float], items: tuple[int, ...]) -> tuple[Fraction, int, Fraction]:
    """By the definition: damage, then number, then the sum with its gains. Fractions do not round."""
    own = [Fraction(costs[item]) for item in items]
    return sum((max(Fraction(0), cost) for cost in own), Fraction(0)), len(own), sum(own, Fraction(0))


def reaches(items: tuple[int, ...], savings: list[Saving], needs: Saving) -> bool:
    return all(sum(savings[item][k] for item in items) >= need for k, need in enumerate(needs))


def subsets(count: int) -> list[tuple[int, ...]]:
    return [items for size in range(count + 1) for items in itertools.combinations(range(count), size)]


def problem(seed: int, num_resources: int, *, num_kinds: int | None) -> tuple[list[float], list[Saving], Saving]:
    """Costs with ties, zeros and gains; savings of ``num_kinds`` kinds or all different; needs up to beyond reach."""
    draw = random.Random(seed)

    def saving() -> Saving:
        return tuple(draw.choice((0, 1, 3, 7, 10, 11)) for _ in range(num_resources))

    kinds = [saving() for _ in range(num_kinds or NUM_ITEMS)]
    savings = [draw.choice(kinds) for _ in range(NUM_ITEMS)] if num_kinds else kinds
    costs = [draw.choice((draw.uniform(-0.3, 1), 0.1, 0.2, 0.3, 0.0)) for _ in range(NUM_ITEMS)]
    share = draw.uniform(-0.1, 1.5)
    return costs, savings, tuple(int(share * sum(column)) for column in zip(*savings, strict=True))


@pytest.mark.parametrize("num_resources", [1, 2, 3])
@pytest.mark.parametrize("num_kinds", [1, 3, None])
def test_the_cheapest_is_that_of_all_subsets(num_resources: int, num_kinds: int | None) -> None:
    found_none = 0
    for seed in range(25):
        costs, savings, needs = problem(seed, num_resources, num_kinds=num_kinds)
        every = [cost_of(costs, items) for items in subsets(NUM_ITEMS) if reaches(items, savings, needs)]
        found = cheapest(costs, savings, needs)
        if found is None:
            assert not every
            found_none += 1
            continue
        assert reaches(found, savings, needs)
        assert cost_of(costs, found) == min(every)
    assert 0 < found_none < 25, "both outcomes must be seen"


def test_twelve_unequal_layers_with_real_sizes() -> None:
    """Savings of billions, where a bound by rounded numbers must not cut off the optimum."""
    draw = random.Random(3)
    savings: list[Saving] = [(draw.randrange(10**8, 10**9), draw.randrange(10**6)) for _ in range(12)]
    costs = [draw.random() ** 3 for _ in savings]
    for share in (0.1, 0.35, 0.6, 0.9):
        needs = tuple(math.ceil(share * sum(column)) for column in zip(*savings, strict=True))
        found = cheapest(costs, savings, needs)
        assert found is not None
        every = (items for items in subsets(12) if reaches(items, savings, needs))
        assert cost_of(costs, found) == min(cost_of(costs, items) for items in every)


def test_a_need_is_met_to_the_unit() -> None:
    assert cheapest([0.1, 0.2], [(10,), (11,)], (10,)) == (0,)
    assert cheapest([0.1, 0.2], [(10,), (11,)], (11,)) == (1,)
    assert cheapest([0.1, 0.2], [(10,), (11,)], (21,)) == (0, 1)
    assert cheapest([0.1, 0.2], [(10,), (11,)], (22,)) is None
    assert cheapest([0.1, 0.2], [(10,), (11,)], (0,)) == ()


def test_a_hundred_unequal_layers_are_no_matter_of_patience() -> None:
    draw = random.Random(5)
    savings = [(100_000 + 3777 * layer, 1000 * (1 + layer // 10), draw.randrange(1, 400_000)) for layer in range(100)]
    needs = tuple(sum(column) // 3 for column in zip(*savings, strict=True))
    found = cheapest([draw.random() for _ in savings], savings, needs)
    assert found is not None
    assert reaches(found, savings, needs)


def test_tradeoffs_are_those_of_all_subsets() -> None:
    for seed in range(10):
        costs, savings, _ = problem(seed, 1, num_kinds=None if seed % 2 else 3)
        amounts = [saving for (saving,) in savings]
        points = {(cost_of(costs, items), sum(amounts[item] for item in items)) for items in subsets(NUM_ITEMS)}
        best = {
            (cost, saved)
            for cost, saved in points
            if not any(c <= cost and s >= saved and (c, s) != (cost, saved) for c, s in points)
        }
        found = tradeoffs(costs, amounts)
        assert [(cost_of(costs, items), sum(amounts[item] for item in items)) for items in found] == sorted(best)


def test_plans_by_cost_are_all_that_need_each_of_their_items() -> None:
    for seed in range(6):
        costs, savings, needs = problem(seed, 2, num_kinds=3)
        every = {items for items in subsets(NUM_ITEMS) if reaches(items, savings, needs)}
        needed = {items for items in every if not any({*items} > {*other} for other in every)}
        found = list(by_cost(costs, savings, needs))
        assert set(found) == needed
        assert len(found) == len(needed)
        assert [cost_of(costs, items) for items in found] == sorted(cost_of(costs, items) for items in needed)
