"""Means over tasks of shares kept and of their changes, with the intervals that those of the tasks add up to.

Limits are added as squares, distances to the ends of the tasks' intervals like standard errors (MOVER: Zou and Donner
2008, Statistics in Medicine 27:1693), so what holds for few items on one task holds for the sum. Tasks that ask the
same items in another way err together: their correlation is taken from the items' own influences.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from shoal.artifacts.evaluation import Interval, TaskScore
from shoal.stats.intervals import Array, combined
from shoal.stats.paired import kept_change, kept_influences, no_retention, retention, shared_luck

TaskScores = Mapping[str, TaskScore]
"""Scores by task name."""


def mean_share(teacher: TaskScores, after: TaskScores, weights: Mapping[str, float]) -> Interval | None:
    """The weighted share of ``teacher`` above chance that ``after`` keeps; None where a task has none."""
    kept = [retention(teacher[task], after[task]) for task in weights]
    limits = [(own.value, own.ci_low, own.ci_high) for own in kept if own.value is not None and own.ci_low is not None]
    if not limits or len(limits) < len(kept):
        return None
    influences = [kept_influences(teacher[task], after[task]) for task in weights]
    together = correlations([after[task] for task in weights], influences)
    return weighted_sum([*weights.values()], np.array(limits, dtype=np.float64).tolist(), together)


def mean_change(
    teacher: TaskScores, before: TaskScores, after: TaskScores, weights: Mapping[str, float]
) -> Interval | None:
    """The weighted change of the share kept of ``teacher``; None where there is no share to keep."""
    if not weights or any(no_retention(teacher[task]) for task in weights):
        return None
    changes = [kept_change(teacher[task], before[task], after[task]) for task in weights]
    influences = [kept_influences(teacher[task], after[task], before[task]) for task in weights]
    return weighted_sum(list(weights.values()), changes, correlations([before[task] for task in weights], influences))


def correlations(scores: Sequence[TaskScore], influences: Sequence[Mapping[str, float]]) -> Array:
    """How far estimates on several tasks err together, by how their items move them; 0 between abilities, where equal
    ids mean nothing."""
    found = np.eye(len(scores))
    for i, j in itertools.combinations(range(len(scores)), 2):
        if scores[i].ability == scores[j].ability:
            found[i, j] = found[j, i] = shared_luck(influences[i], influences[j])
    return found


def weighted_sum(scales: Sequence[float], limits: Sequence[tuple[float, float, float]], correlation: Array) -> Interval:
    """The sum of ``limits`` (value and ends), each times its positive scale."""
    values_U3 = np.array(scales)[:, None] * np.array(limits)
    values, lows, highs = values_U3.T.tolist()
    low, value, high = combined(values, lows, highs, correlation).tolist()
    # sums of equal shares in another order must stay equal, or rounding would rank
    return Interval(round(value, 12), round(low, 12), round(high, 12))
