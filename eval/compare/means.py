"""Means over tasks, each column counting the same, and sums of paired changes with what they may claim.

What is trained comes back in the form of the training text first, so what ranks is measured outside that form: in twin
forms, on abilities that no text trains and on public benchmarks. Only where there is nothing of that, everything ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from shoal.artifacts.evaluation import Evaluation, Interval, TaskScore
from shoal.stats.intervals import Array, combined
from shoal.stats.paired import kept_change, kept_influences, paired

HEADLINE = ("twin", "out", "public")
"""Columns outside the form of the training text."""
Scores = Mapping[str, TaskScore]
"""Scores by task name."""


def by_task(evaluation: Evaluation) -> Scores:
    """The scores of an evaluation by task name."""
    return {task.task: task for task in evaluation.tasks}


def columns_that_rank(columns: Iterable[str]) -> frozenset[str]:
    """Those of ``columns`` that are outside the trained form; all of them where none is."""
    ranked = frozenset(columns)
    return ranked & frozenset(HEADLINE) or ranked


def even_weights(tasks: Sequence[TaskScore], *keys: Callable[[TaskScore], Any]) -> dict[str, float]:
    """Weight by task, 1 in all: groups by the first key count the same, in each those by the next key, then tasks."""
    if not keys:
        return {task.task: 1 / len(tasks) for task in tasks}
    groups: dict[Any, list[TaskScore]] = {}
    for task in tasks:
        groups.setdefault(keys[0](task), []).append(task)
    return {
        task: weight / len(groups)
        for group in groups.values()
        for task, weight in even_weights(group, *keys[1:]).items()
    }


def summed_change(scales: Mapping[str, float], before: Scores, after: Scores) -> Interval:
    """The sum over tasks of scale times change from ``before`` to ``after``, with the interval that theirs make.

    Distances to the ends of the tasks' intervals are added like standard errors (MOVER: Zou and Donner 2008, Statistics
    in Medicine 27:1693), so what holds for few items on one task holds for the sum. Tasks that ask the same items in
    another way err together; their correlation is taken from the items' own differences.
    """
    changes = [paired(before[task], after[task]) for task in scales]
    moves = {task: _changes(before[task], after[task]) for task in scales}
    correlations = np.array([[_together(before, moves, task, other) for other in scales] for task in scales])
    limits = [(change.difference, change.ci_low, change.ci_high) for change in changes]
    return weighted_sum(list(scales.values()), limits, correlations)


def summed_kept(weights: Mapping[str, float], teacher: Scores, before: Scores, after: Scores) -> Interval:
    """The sum over tasks of weight times the change of the share kept of ``teacher``, with its interval, as
    summed_change adds them up."""
    changes = [kept_change(teacher[task], before[task], after[task]) for task in weights]
    influences = {task: kept_influences(teacher[task], before[task], after[task]) for task in weights}
    correlations = np.array([[_together(before, influences, task, other) for other in weights] for task in weights])
    return weighted_sum(list(weights.values()), changes, correlations)


def weighted_sum(scales: Sequence[float], limits: Sequence[tuple[float, float, float]], correlation: Array) -> Interval:
    """The sum of ``limits`` (value and ends), each times its positive scale."""
    values_U3 = np.array(scales)[:, None] * np.array(limits)
    values, lows, highs = values_U3.T.tolist()
    low, value, high = combined(values, lows, highs, correlation).tolist()
    # sums of equal shares in another order must stay equal, or rounding would rank
    return Interval(round(value, 12), round(low, 12), round(high, 12))


def _together(scores: Scores, moves: Mapping[str, Mapping[str, float]], first: str, other: str) -> float:
    """How far two tasks err together, by how each item moves them; 0 where they share no items."""
    if first == other:
        return 1.0
    if scores[first].ability != scores[other].ability:
        return 0.0
    shared = sorted(moves[first].keys() & moves[other].keys())
    pairs = np.array([[moves[task][item] for item in shared] for task in (first, other)])
    if len(shared) < 3 or np.ptp(pairs, axis=1).min() == 0:
        return 0.0
    return float(np.corrcoef(pairs)[0, 1])


def _changes(before: TaskScore, after: TaskScore) -> dict[str, float]:
    earlier = {item.id: item.score for item in before.items}
    return {item.id: item.score - earlier[item.id] for item in after.items}
