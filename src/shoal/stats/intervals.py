"""95 % intervals: of shares, of their paired differences and ratios, and of sums of estimates in closed form; of what
else there is by bootstrap over items, for many variants of one model at once.

A table of paired 0/1 items is four counts: right both times, won (right only after), lost (only before), neither.
N items, U units (variants of the model), K = 1 + U columns of which the first is the intact model, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
Limits = tuple[float, float, float]
"""A value, and the lower and the upper limit of its 95 % interval."""
Z95 = float(stats.norm.ppf(0.975))


def wilson(successes: float, n: int) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927); inside [0, 1] and never of zero width.

    Raises:
        ValueError: for n below 1.
    """
    if n < 1:
        raise ValueError(f"an interval needs at least one item, got {n}")
    share, z2 = successes / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # exact ends: rounding would leave 1 - 1e-16, above which a score of 1 lies
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def newcombe_paired(*, both: int, won: int, lost: int, neither: int) -> tuple[float, float]:
    """95 % interval of (won - lost) / n, from the Wilson intervals of both proportions and their correlation."""
    n = both + won + lost + neither
    after, before = (both + won) / n, (both + lost) / n
    after_low, after_high = wilson(both + won, n)
    before_low, before_high = wilson(both + lost, n)
    phi = paired_correlation(both, won, lost, neither)

    def spread(reach: float, other_reach: float) -> float:
        return math.sqrt(max(reach**2 - 2 * phi * reach * other_reach + other_reach**2, 0.0))

    difference = after - before
    low = difference - spread(after - after_low, before_high - before)
    high = difference + spread(after_high - after, before - before_low)
    return low, high


def paired_ratio(both: int, won: int, lost: int, neither: int, chance: float) -> tuple[float, float] | None:
    """95 % limits of (after - chance) / (before - chance) for paired 0/1 scores; None where they are not finite.

    From the Wilson limits of both shares and their correlation. At a ratio of 1 this is Newcombe's limit of the
    difference, so that retention holds 1 exactly where the change holds 0. Resampling would give [1, 1] where no item
    happened to change.
    """
    n = both + won + lost + neither

    def above(right: int) -> Limits:
        low, high = wilson(right, n)
        return right / n - chance, low - chance, high - chance

    return ratio(above(both + won), above(both + lost), paired_correlation(both, won, lost, neither))


def ratio(part: Limits, whole: Limits, correlation: float) -> tuple[float, float] | None:
    """95 % limits of ``part`` / ``whole``, each a value with its limits; None where they are not finite.

    INFERRED for shares kept: the r at which the square-and-add limit of part - r * whole reaches zero (MOVER for
    ratios, Donner and Zou 2012, Stat. Methods Med. Res. 21:347). ``correlation`` of the two estimates.
    """
    (part_value, part_low, part_high), (value, low, high) = part, whole

    def root(part_reach: float, reach: float, sign: int) -> float | None:
        # (part - r whole)**2 = part_reach**2 - 2 phi r part_reach reach + r**2 reach**2, solved for r
        square = value**2 - reach**2
        middle = part_value * value - correlation * part_reach * reach
        inside = middle**2 - square * (part_value**2 - part_reach**2)
        return (middle + sign * math.sqrt(max(inside, 0.0))) / square if value > 0 and square > 0 else None

    # below r = 0 the whole enters with the other sign, so its other limit counts
    lowest = root(part_value - part_low, high - value if part_low >= 0 else value - low, -1)
    highest = root(part_high - part_value, value - low if part_high >= 0 else high - value, +1)
    return None if lowest is None or highest is None else (lowest, highest)


def paired_correlation(both: int, won: int, lost: int, neither: int) -> float:
    """Correlation (phi) of the two scores with Newcombe's continuity correction, towards independence."""
    margins = float((both + won) * (lost + neither) * (both + lost) * (won + neither))
    covariance = float(both * neither - won * lost)
    if covariance > 0:
        covariance = max(covariance - (both + won + lost + neither) / 2, 0.0)
    return covariance / math.sqrt(margins) if margins else 0.0


def combined(values: Sequence[float], lows: Sequence[float], highs: Sequence[float], correlation: Array) -> Array:
    """(low, value, high) of the sum of ``values`` by square-and-add of their limits (Zou and Donner 2008).

    A difference is the sum with a negated second part. ``correlation`` of the parts' estimates, (U, U). One part
    without a limit leaves the sum without it.
    """
    value, down, up = np.asarray(values), np.asarray(values) - lows, np.asarray(highs) - values
    total = float(value.sum())
    reach = [
        # infinity times a correlation of 0 would be NaN
        math.inf if np.isinf(part).any() else math.sqrt(max(0.0, float(part @ correlation @ part)))
        for part in (down, up)
    ]
    return np.array([total - reach[0], total, total + reach[1]])


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
