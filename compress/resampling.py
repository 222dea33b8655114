"""Bootstrap over items for many variants of one model at once, and the intervals that rest on it.

N items, U units (variants of the model), K = 1 + U columns of which the first is the intact model, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ..eval.statistics import NUM_RESAMPLES, RESAMPLE_SEED, Z95, wilson

Array = NDArray[np.float64]
COUNT_ELEMENTS = 1 << 22
"""Resample counts held at one time: with thousands of items all of them together would be half a gigabyte."""


def num_resamples(num_units: int) -> int:
    """Enough that the smallest possible p-value survives Holm's correction over ``num_units``."""
    return max(NUM_RESAMPLES, 40 * num_units)


def resampled_means(scores_NK: Array, weights_N: Array, resamples: int = NUM_RESAMPLES) -> Array:
    """(R, K): the weighted mean of every column in each resample of the items.

    The resamples depend on the number of items only: every column over the same items sees the same ones, figures
    repeat, and they are those of shoal.eval.statistics.
    """
    weighted_NK = scores_NK * weights_N[:, None]
    blocks = [counts @ weighted_NK / (counts @ weights_N)[:, None] for counts in _counts(len(weights_N), resamples)]
    return np.concatenate(blocks)


def _counts(n: int, resamples: int) -> Iterator[Array]:
    """How often each item is drawn, (some R, N) at a time; how many at a time changes no draw."""
    rng = np.random.default_rng(RESAMPLE_SEED)
    shares, size = np.full(n, 1 / n), max(1, COUNT_ELEMENTS // n)
    for start in range(0, resamples, size):
        yield rng.multinomial(n, shares, size=min(size, resamples - start)).astype(np.float64)


def expanded_percentiles(means_RK: Array, value_K: Array, n: int) -> tuple[Array, Array]:
    """95 % limits from resamples of a smooth statistic, widened as Student's t is wider than the normal.

    Plain percentiles cover too little with few items, first because resampling divides by n instead of n - 1 and then
    because the spread is itself estimated (Hesterberg 2015, The American Statistician 69:371, "expanded percentile").
    """
    low_K, high_K = np.percentile(means_RK, (2.5, 97.5), axis=0)
    factor = math.sqrt(n / (n - 1)) * float(stats.t.ppf(0.975, n - 1)) / Z95
    return value_K + (low_K - value_K) * factor, value_K + (high_K - value_K) * factor


def bias_corrected(values_R: Array, value: float) -> tuple[float, float]:
    """95 % percentile limits, shifted by how far the resamples' median lies from ``value`` (Efron 1987, BC).

    For statistics that clip at zero, whose resamples lie to one side of the value itself.
    """
    below = (np.sum(values_R < value) + 0.5 * np.sum(values_R == value)) / len(values_R)
    shift = float(stats.norm.ppf(min(max(below, 1 / len(values_R)), 1 - 1 / len(values_R))))
    low, high = np.percentile(values_R, 100 * stats.norm.cdf([2 * shift - Z95, 2 * shift + Z95]))
    return min(float(low), value), max(float(high), value)


def bootstrap_p(means_RU: Array, change_U: Array) -> Array:
    """Two-sided p-values that the mean change is 0, as in shoal.eval.statistics.paired; 1 where no item has moved."""
    as_far_U = (np.abs(means_RU - change_U) >= np.abs(change_U)).sum(axis=0)
    return (1 + as_far_U) / (1 + len(means_RU))


def paired_ratio(both: int, won: int, lost: int, neither: int, chance: float) -> tuple[float, float] | None:
    """95 % limits of (after - chance) / (before - chance) for paired 0/1 scores; None where they are not finite.

    INFERRED for retention: the r at which the square-and-add limit of after - r * before (with chance taken off both)
    reaches zero, from the Wilson limits of both shares and their correlation (MOVER for ratios, Donner and Zou 2012,
    Stat. Methods Med. Res. 21:347). At r = 1 this is Newcombe's limit of the difference, so that retention holds 1
    exactly where the change holds 0. Resampling would give [1, 1] where no item happened to change.
    """
    n = both + won + lost + neither
    after, before = (both + won) / n - chance, (both + lost) / n - chance
    after_low, after_high = (limit - chance for limit in wilson(both + won, n))
    before_low, before_high = (limit - chance for limit in wilson(both + lost, n))
    phi = _phi(both, won, lost, neither)

    def root(after_reach: float, before_reach: float, sign: int) -> float | None:
        square = before**2 - before_reach**2
        middle = after * before - phi * after_reach * before_reach
        inside = middle**2 - square * (after**2 - after_reach**2)
        return (middle + sign * math.sqrt(max(inside, 0.0))) / square if before > 0 and square > 0 else None

    # below r = 0 the intact share enters with the other sign, so its other limit counts
    low = root(after - after_low, before_high - before if after_low >= 0 else before - before_low, -1)
    high = root(after_high - after, before - before_low if after_high >= 0 else before_high - before, +1)
    return None if low is None or high is None else (low, high)


def _phi(both: int, won: int, lost: int, neither: int) -> float:
    """Correlation of the two scores with Newcombe's continuity correction, towards independence."""
    margins = float((both + won) * (lost + neither) * (both + lost) * (won + neither))
    covariance = float(both * neither - won * lost)
    if covariance > 0:
        covariance = max(covariance - (both + won + lost + neither) / 2, 0.0)
    return covariance / math.sqrt(margins) if margins else 0.0


def combined(values: Sequence[float], lows: Sequence[float], highs: Sequence[float], correlation: Array) -> Array:
    """(low, value, high) of the sum of ``values`` by square-and-add of their limits (Zou and Donner 2008).

    A difference is the sum with a negated second part. ``correlation`` of the parts' estimates, (U, U).
    """
    value, down, up = np.asarray(values), np.asarray(values) - lows, np.asarray(highs) - values
    total = float(value.sum())
    reach = [math.sqrt(max(float(part @ correlation @ part), 0.0)) for part in (down, up)]
    return np.array([total - reach[0], total, total + reach[1]])
