"""The layers that go so that a student reaches prune.target: of all layers, of runs, or along an order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from shoal.errors import UserError

from .goals import Goals
from .knapsack import by_cost, tradeoffs

Spends = Callable[[Sequence[int]], bool]
"""Whether dropping these layers costs something that prune.spare saves."""
ALL_FREE = "dropping every layer that is free to go"
MOST_PLANS = 100
"""Plans that are tried against prune.spare, the cheapest first."""


@dataclass(frozen=True)
class Cut:
    """Layers and the score of dropping them together."""

    layers: tuple[int, ...]
    score: float


def free_cuts(free: Sequence[int], num_layers: int) -> list[tuple[int, ...]]:
    """The largest cuts of the layers ``free`` that leave a layer of ``num_layers``."""
    if len(free) < num_layers:
        return [tuple(free)]
    return list(itertools.combinations(free, num_layers - 1))


def cheapest_layers(scores: Sequence[float], free: Sequence[int], goals: Goals, spends: Spends) -> tuple[int, ...]:
    """The layers of ``free`` with the lowest sum of scores that reach all goals, none of them needless.

    A score below 0 counts as 0, then fewer layers are better, then a lower sum (see shoal.compress.knapsack).

    Raises:
        UserError: goals out of reach, or none of the MOST_PLANS cheapest plans spares what is to be spared.
    """
    goals.refuse_unreachable(free_cuts(free, len(scores)), ALL_FREE)
    plans = by_cost([scores[layer] for layer in free], [goals.saving(layer) for layer in free], goals.needs)
    leaving = (plan for plan in plans if len(plan) < len(scores))
    for places in itertools.islice(leaving, MOST_PLANS):
        layers = tuple(free[place] for place in places)
        if not spends(layers):
            return layers
    raise UserError(
        f"prune.spare: no plan that reaches prune.target goes without a significant loss there, by the sum of its "
        f"single removals (the cheapest were tried, {MOST_PLANS} at most); relax the target or spare less"
    )


def cheapest_run(runs: Sequence[Cut], goals: Goals, spends: Spends) -> Cut:
    """The run of the lowest score that reaches all goals; of equal scores the shorter, then the lower one.

    Raises:
        UserError: goals out of reach of all runs, or of those that spare what is to be spared.
    """
    goals.refuse_unreachable([run.layers for run in runs], "any run of neighbours that was measured and is free to go")
    for run in sorted(runs, key=lambda run: (run.score, len(run.layers), run.layers)):
        if goals.reached(run.layers) and not spends(run.layers):
            return run
    raise UserError(
        "prune.spare: no run of neighbours that reaches prune.target goes without a significant loss there, by the sum "
        "of its single removals; relax the target or spare less"
    )


def shortest_prefix(prefixes: Sequence[Sequence[int]], goals: Goals, order: str) -> int:
    """The position of the first of ``prefixes``, whole layers that are gone after so many removals, that reaches all.
    ``order`` says in words whose removals they are.

    Raises:
        UserError: none does.
    """
    goals.refuse_unreachable(prefixes, f"the {len(prefixes)} removals of the order of {order}")
    return next(index for index, layers in enumerate(prefixes) if goals.reached(layers))


def runs_of(rows: Sequence[Sequence[float]], free: Sequence[int], num_layers: int) -> Iterator[Cut]:
    """All runs of free layers that leave a layer; ``rows``: scores of runs by length - 1 and first layer."""
    for length, scores in enumerate(rows, 1):
        for start, score in enumerate(scores):
            layers = tuple(range(start, start + length))
            if length < num_layers and set(layers) <= set(free):
                yield Cut(layers, score)


def best_cuts(scores: Sequence[float], free: Sequence[int], num_bytes: Sequence[int]) -> list[Cut]:
    """The cuts of ``free`` layers, one layer at least and not all of the model, that none beats in score and bytes."""
    plans = tradeoffs([scores[layer] for layer in free], [num_bytes[layer] for layer in free])
    cuts = [tuple(free[place] for place in plan) for plan in plans]
    return [Cut(cut, sum(scores[layer] for layer in cut)) for cut in cuts if 0 < len(cut) < len(scores)]


def unbeaten(cuts: Iterable[Cut], num_bytes: Sequence[int]) -> list[Cut]:
    """The cuts of which no other one saves as much at a lower score, by rising score."""
    best: list[Cut] = []
    saved = 0
    for cut in sorted(cuts, key=lambda cut: (cut.score, -sum(num_bytes[layer] for layer in cut.layers), cut.layers)):
        if (own := sum(num_bytes[layer] for layer in cut.layers)) > saved:
            best.append(cut)
            saved = own
    return best
