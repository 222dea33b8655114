"""How far columns rank the layers alike, beside how far each of them agrees with itself on other items.

N items, L layers, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from shoal.artifacts.importance import Agreement, Stability
from shoal.stats.intervals import Array

from .table import Measured

SHARE_REMOVED = 0.2
"""Share of the layers whose sets are compared by Jaccard."""
NUM_DIVISIONS = 20
"""Random divisions of the items into three over which a column's stability is averaged."""
DIVISION_SEED = 7


def agreement(columns: Sequence[Measured], metrics: Mapping[str, Sequence[float]]) -> Agreement:
    """Rank correlations and shared removals of all task columns and metrics.

    Two columns that rank alike still correlate below 1, because each is measured on finite items: that bound is
    `ceiling`, and only a correlation well below it says that the columns mean different things.
    """
    scores = {name: tuple(values) for name, values in metrics.items()}
    scores |= {column.task.task: importances(column) for column in columns}
    num_layers = len(next(iter(scores.values())))
    k = max(1, round(SHARE_REMOVED * num_layers))
    stability = {column.task.task: column_stability(column) for column in columns}
    known = [stability[name].reliability if name in stability else None for name in scores]
    rows = list(scores.values())
    return Agreement(
        columns=tuple(scores),
        spearman=tuple(tuple(spearman(row, other) for other in rows) for row in rows),
        ceiling=tuple(tuple(_ceiling(row, other) for other in known) for row in known),
        jaccard=tuple(tuple(jaccard(row, other, k) for other in rows) for row in rows),
        k=k,
        stability=stability,
    )


def importances(column: Measured) -> tuple[float, ...]:
    """How much worse the score is without each layer. Higher = keep."""
    return tuple(_importances(column, np.arange(len(column.ids))).tolist())


def spearman(first: Sequence[float] | Array, second: Sequence[float] | Array) -> float | None:
    """Rank correlation with average ranks for equal values; None where one side holds a single value only."""
    ranks = [stats.rankdata(values) for values in (first, second)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1].clip(-1, 1))


def jaccard(first: Sequence[float], second: Sequence[float], k: int) -> float:
    """Shared part of the two sets of ``k`` layers of lowest score; equal scores go by lower index, as in plans."""
    lowest, others = (set(sorted(range(len(values)), key=lambda i: (values[i], i))[:k]) for values in (first, second))
    return len(lowest & others) / len(lowest | others)


def column_stability(column: Measured) -> Stability:
    """Rank correlation between disjoint thirds of the items, averaged over random divisions, and what it implies."""
    rng, correlations = np.random.default_rng(DIVISION_SEED), []
    for _ in range(NUM_DIVISIONS):
        thirds = [_importances(column, rows) for rows in np.array_split(rng.permutation(len(column.ids)), 3)]
        correlations += [spearman(thirds[a], thirds[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    known = [value for value in correlations if value is not None]
    if not known:
        return Stability(None, None)
    mean = float(np.mean(known))
    # from a third of the items to all of them (Spearman 1910, Brown 1910); nothing is reliable below 0
    return Stability(mean, 3 * mean / (1 + 2 * mean) if mean > 0 else 0.0)


def _importances(column: Measured, rows: NDArray[np.intp]) -> Array:
    mean_K = np.average(column.scores_NK[rows], axis=0, weights=column.weights_N[rows])
    # means of 0/1 scores that are equal must be equal in floating point too, or their ranks would be noise
    return np.round(mean_K[0] - mean_K[1:] if column.task.higher_is_better else mean_K[1:] - mean_K[0], 12)


def _ceiling(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else math.sqrt(first * second)
