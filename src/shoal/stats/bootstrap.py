"""Bootstrap over items for many variants of one model at once, and the intervals that rest on it.

N items, U units (variants of the model), K = 1 + U columns of which the first is the intact model, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from scipy import stats

from shoal.stats.intervals import Z95, Array

NUM_RESAMPLES = 4000
RESAMPLE_SEED = 20251002
COUNT_ELEMENTS = 1 << 22
"""Resample counts held at one time: with thousands of items all of them together would be half a gigabyte."""


def resampled_means(scores_NK: Array, weights_N: Array) -> Array:
    """(R, K): the weighted mean of every column in each resample of the items.

    The resamples depend on the number of items only: every column over the same items sees the same ones, and figures
    repeat.
    """
    weighted_NK = scores_NK * weights_N[:, None]
    # counts (R, N) @ (N, K): every resample of every column in one matrix product
    blocks = [counts @ weighted_NK / (counts @ weights_N)[:, None] for counts in _counts(len(weights_N))]
    return np.concatenate(blocks)


def _counts(n: int) -> Iterator[Array]:
    """How often each item is drawn, (some R, N) at a time; how many at a time changes no draw."""
    size = max(1, COUNT_ELEMENTS // n)
    if size >= NUM_RESAMPLES:
        yield _all_counts(n)
        return
    rng = np.random.default_rng(RESAMPLE_SEED)  # one generator for all blocks: the draws are those of one large call
    for start in range(0, NUM_RESAMPLES, size):
        yield rng.multinomial(n, np.full(n, 1 / n), size=min(size, NUM_RESAMPLES - start)).astype(np.float64)


@lru_cache(maxsize=4)
def _all_counts(n: int) -> Array:
    """Kept, because drawing takes longer than what is computed from it, and most tasks have as many items as others."""
    return np.random.default_rng(RESAMPLE_SEED).multinomial(n, np.full(n, 1 / n), size=NUM_RESAMPLES).astype(np.float64)


def expanded_percentiles(means_RK: Array, value_K: Array, n: float) -> tuple[Array, Array]:
    """95 % limits from resamples of a smooth statistic, widened as Student's t is wider than the normal.

    Plain percentiles cover too little with few items, first because resampling divides by n instead of n - 1 and then
    because the spread is itself estimated (Hesterberg 2015, The American Statistician 69:371, "expanded percentile").
    ``n`` of weighted items is their effective_n.
    """
    low_K, high_K = np.percentile(means_RK, (2.5, 97.5), axis=0)
    factor = expansion(n)
    return value_K + (low_K - value_K) * factor, value_K + (high_K - value_K) * factor


def expansion(n: float) -> float:
    """By how much the spread over resamples of ``n`` items understates what 95 % limits need.

    Below 2, which unequal weights can bring about, the factor of 2 is taken: there it is 9 already.
    """
    n = max(n, 2.0)
    return math.sqrt(n / (n - 1)) * float(stats.t.ppf(0.975, n - 1)) / Z95


def effective_n(weights_N: Array) -> float:
    """How many items of equal weight would give a mean of the same spread (Kish 1965)."""
    return float(weights_N.sum() ** 2 / (weights_N**2).sum())


def bias_corrected(values_R: Array, value: float) -> tuple[float, float]:
    """95 % percentile limits, shifted by how far the resamples' median lies from ``value`` (Efron 1987, BC).

    For statistics that clip at zero, whose resamples lie to one side of the value itself.
    """
    # share of resamples below the value, ties half; kept off 0 and 1, whose normal quantiles are infinite
    below = (np.sum(values_R < value) + 0.5 * np.sum(values_R == value)) / len(values_R)
    shift = float(stats.norm.ppf(min(max(below, 1 / len(values_R)), 1 - 1 / len(values_R))))
    low, high = np.percentile(values_R, 100 * stats.norm.cdf([2 * shift - Z95, 2 * shift + Z95]))
    return min(float(low), value), max(float(high), value)


def bootstrap_p(means_RU: Array, change_U: Array, n: float) -> Array:
    """Two-sided p-values that the mean change is 0; 1 where no item has moved.

    Student's t has this probability beyond zero, its scale being the expanded interval's reach towards zero: so p is
    0.05 exactly where the interval ends at zero, and three items with little spread do not make it tiny, as counting
    resamples beyond zero would. Where all items move alike there is no spread to go by, only their ``n`` equal signs.
    The number of resamples sets no least p, so none is lost to Holm's correction over hundreds of tasks.
    """
    low_U, high_U = expanded_percentiles(means_RU, change_U, n)
    reach_U = np.where(change_U > 0, change_U - low_U, high_U - change_U)
    n, size_U = max(n, 2.0), np.abs(change_U)
    spread_U = reach_U > 1e-9 * size_U  # rounding leaves a little
    # the interval reaches t(.975) standard errors, so this many of them lie between the change and zero
    t_U = stats.t.ppf(0.975, n - 1) * size_U / np.where(spread_U, reach_U, 1.0)
    return np.where(spread_U, 2 * stats.t.sf(t_U, n - 1), np.where(change_U == 0, 1.0, 2 ** (1 - n)))
