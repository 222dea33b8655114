"""The cheapest layers that together save enough of several things at once, exactly.

A dynamic programme over kinds of layers. Layers that save the same are one kind, of which the cheapest go first, so
that a model of few kinds has few states whatever its depth. Everything is counted in whole numbers (parameters,
bytes), and costs are compared as fractions without rounding: the result is the optimum, not near it.
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Saving = tuple[int, ...]
"""What one layer saves of each resource."""
Cost = tuple[int, int, int]
"""Order of sets: sum of the costs above 0, number of items, sum of all costs. Costs in the unit of _exact.

An item of negative cost counts as free and not as a gain, or such items would go though nothing needs them."""
MARGIN = 1e-9
"""Relative error that sums of floating point numbers are taken to have, in bounds and nowhere else."""


@dataclass(frozen=True)
class _Kind:
    """Items that save the same, by rising cost."""

    saving: Saving
    items: tuple[int, ...]
    costs: tuple[Cost, ...]
    """Cost of taking the first n of them, from n = 0."""


@dataclass(frozen=True)
class _State:
    """Some items of the kinds so far."""

    cost: Cost
    rest: Saving
    """What is still to be saved."""
    taken: tuple[int, ...]
    """Number of items of each kind so far."""


def cheapest(costs: Sequence[float], savings: Sequence[Saving], needs: Saving) -> tuple[int, ...] | None:
    """The items, increasing, whose sum of ``savings`` reaches all ``needs`` at the lowest Cost; None = no items do.

    ``costs`` and ``savings`` have one entry per item; no saving is negative. Of sets of the same Cost the one that is
    found first is taken, which is the same one every time; within a kind lower indices go first.
    """
    kinds = _kinds(costs, savings)
    states = [_State((0, 0, 0), tuple(max(0, need) for need in needs), ())]
    limit = _some_cost(costs, savings, needs)
    if limit is None:
        return None
    for index, kind in enumerate(kinds):
        states = [grown for state in states for grown in _grown(state, kind)]
        states = _undominated(_promising(states, kinds[index + 1 :], limit))
    best = min((state for state in states if not any(state.rest)), key=lambda state: state.cost)
    return _items(best, kinds)


def tradeoffs(costs: Sequence[float], savings: Sequence[int]) -> list[tuple[int, ...]]:
    """The sets that no other one beats: none saves as much at a lower Cost. By rising Cost; the first one is empty."""
    kinds = _kinds(costs, [(saving,) for saving in savings])
    total = sum(savings)
    states = [_State((0, 0, 0), (total,), ())]
    for kind in kinds:
        states = _undominated([grown for state in states for grown in _grown(state, kind)])
    return [_items(state, kinds) for state in sorted(states, key=lambda state: state.cost)]


def by_cost(costs: Sequence[float], savings: Sequence[Saving], needs: Saving) -> Iterator[tuple[int, ...]]:
    """All sets that reach ``needs`` and would not without any one of their items, by rising Cost.

    Every set but the cheapest lacks one of the items of the cheapest. Those that lack its first one are a problem of
    their own, as are those that have it and lack its second one, and so on (Lawler 1972, Management Science 18:401).
    """
    exact, serial = _exact(costs), itertools.count()
    problems: list[tuple[Cost, int, tuple[int, ...], frozenset[int], frozenset[int]]] = []

    def add(inside: frozenset[int], outside: frozenset[int]) -> None:
        free = [item for item in range(len(costs)) if item not in inside | outside]
        left = tuple(need - sum(savings[item][k] for item in inside) for k, need in enumerate(needs))
        added = cheapest([costs[item] for item in free], [savings[item] for item in free], left)
        if added is not None:
            items = tuple(sorted({*inside, *(free[place] for place in added)}))
            heapq.heappush(problems, (_cost([exact[item] for item in items]), next(serial), items, inside, outside))

    add(frozenset(), frozenset())
    while problems:
        _, _, items, inside, outside = heapq.heappop(problems)
        if _needs_all(items, savings, needs):
            yield items
        own = [item for item in items if item not in inside]
        for place, item in enumerate(own):
            add(inside | {*own[:place]}, outside | {item})


def _needs_all(items: Sequence[int], savings: Sequence[Saving], needs: Saving) -> bool:
    sums = [sum(savings[item][k] for item in items) for k in range(len(needs))]
    return all(any(sums[k] - savings[item][k] < need for k, need in enumerate(needs)) for item in items)


def _exact(costs: Sequence[float]) -> list[int]:
    """The costs as whole multiples of one unit: a floating point number is a whole number over a power of two."""
    ratios = [float(cost).as_integer_ratio() for cost in costs]
    unit = max((denominator for _, denominator in ratios), default=1)
    return [numerator * (unit // denominator) for numerator, denominator in ratios]


def _cost(costs: Sequence[int]) -> Cost:
    return sum(max(0, cost) for cost in costs), len(costs), sum(costs)


def _kinds(costs: Sequence[float], savings: Sequence[Saving]) -> list[_Kind]:
    exact = _exact(costs)
    members: dict[Saving, list[int]] = defaultdict(list)
    for item, saving in enumerate(savings):
        members[saving].append(item)
    kinds = []
    for saving, of_kind in members.items():
        items = tuple(sorted(of_kind, key=lambda item: (exact[item], item)))
        sums = tuple(_cost([exact[item] for item in items[:count]]) for count in range(len(items) + 1))
        kinds.append(_Kind(saving, items, sums))
    # what saves most decides most: later kinds then have little left to tell states apart
    return sorted(kinds, key=lambda kind: (-sum(kind.saving), kind.items))


def _grown(state: _State, kind: _Kind) -> Iterator[_State]:
    """``state`` with every number of items of one more kind that still brings it nearer."""
    rest = state.rest
    for count, cost in enumerate(kind.costs):
        yield _State(_added(state.cost, cost), rest, (*state.taken, count))
        after = tuple(max(0, left - saving) for left, saving in zip(rest, kind.saving, strict=True))
        if after == rest:
            return
        rest = after


def _added(first: Cost, second: Cost) -> Cost:
    return first[0] + second[0], first[1] + second[1], first[2] + second[2]


def _undominated(states: Sequence[_State]) -> list[_State]:
    """The states to which no other one is equal or better in cost and in every rest."""
    ordered = sorted(states, key=lambda state: (state.cost, state.rest))
    if not ordered:
        return []
    rests = np.array([state.rest for state in ordered], dtype=np.int64)
    kept = np.empty_like(rests)
    chosen: list[_State] = []
    for state, rest in zip(ordered, rests, strict=True):
        if not (kept[: len(chosen)] <= rest).all(axis=1).any():
            kept[len(chosen)] = rest
            chosen.append(state)
    return chosen


def _promising(states: Sequence[_State], later: Sequence[_Kind], limit: int) -> list[_State]:
    """The states that later kinds can complete at a cost of at most ``limit``, the first number of a Cost.

    The bound takes parts of items where one resource is to be saved alone, or all of them together in equal shares:
    whole items that save all of them cannot cost less.
    """
    if not states:
        return []
    rests = np.array([state.rest for state in states], dtype=np.float64)
    items = [(kind.saving, kind.costs[n + 1][0] - kind.costs[n][0]) for kind in later for n in range(len(kind.items))]
    saved = np.array([saving for saving, _ in items], dtype=np.float64).reshape(len(items), rests.shape[1])
    scale = float(limit) or 1.0
    prices = np.array([cost / scale for _, cost in items], dtype=np.float64)
    enough = (rests <= saved.sum(axis=0) * (1 + MARGIN)).all(axis=1)
    weights = [*np.eye(rests.shape[1]), 1 / np.maximum(rests.max(axis=0), 1.0)]
    spent = np.array([float(state.cost[0]) / scale for state in states])
    bound = spent + np.max([_in_parts(rests @ weight, saved @ weight, prices) for weight in weights], axis=0)
    keep = enough & (bound <= 1 + MARGIN if limit else bound <= 0)
    return [state for state, good in zip(states, keep, strict=True) if good]


def _in_parts(rests: Any, saved: Any, prices: Any) -> Any:
    """Lowest price of saving ``rests`` of one resource, where a part of an item saves and costs that part."""
    useful = saved > 0
    saved, prices = saved[useful], prices[useful]
    order = np.argsort(prices / saved, kind="stable")
    reached = np.concatenate([[0.0], np.cumsum(saved[order])])
    return np.interp(rests, reached, np.concatenate([[0.0], np.cumsum(prices[order])])) * (1 - MARGIN)


def _some_cost(costs: Sequence[float], savings: Sequence[Saving], needs: Saving) -> int | None:
    """The first number of the Cost of some set that reaches ``needs``, by taking what saves most for its cost."""
    exact, rest, taken = _exact(costs), list(needs), []
    shares = [sum(saved / need for saved, need in zip(saving, needs, strict=True) if need > 0) for saving in savings]
    order = sorted(range(len(costs)), key=lambda item: (costs[item] / shares[item] if shares[item] else 0, item))
    for item in order:
        if all(left <= 0 for left in rest):
            break
        if shares[item]:
            taken.append(item)
            rest = [left - saved for left, saved in zip(rest, savings[item], strict=True)]
    if any(left > 0 for left in rest):
        return None
    for item in reversed(taken.copy()):
        spare = all(left + saved <= 0 or not saved for left, saved in zip(rest, savings[item], strict=True))
        if spare:
            taken.remove(item)
            rest = [left + saved for left, saved in zip(rest, savings[item], strict=True)]
    return _cost([exact[item] for item in taken])[0]


def _items(state: _State, kinds: Sequence[_Kind]) -> tuple[int, ...]:
    taken = zip(kinds, state.taken, strict=True)
    return tuple(sorted(item for kind, count in taken for item in kind.items[:count]))
