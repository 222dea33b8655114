"""95 % intervals: of shares, of their paired differences and ratios, of sums of estimates, and of means and what else
is smooth in the items, for many variants of one model at once.

A table of paired 0/1 items is four counts: right both times, won (right only after), lost (only before), neither.
N items, U units (variants of the model), K = 1 + U columns of which the first is the intact model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Limits = tuple[float, float, float]
"""A value, and the lower and the upper limit of its 95 % interval."""
Z95 = 1.959963984540054
"""The normal distribution's quantile at 0.975."""


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


def ratio(part: Limits, whole: Limits, together: float) -> tuple[float, float] | None:
    """95 % limits of ``part`` / ``whole``, each a value with its limits; None where they are not finite.

    INFERRED for shares kept: the r at which the square-and-add limit of part - r * whole reaches zero (MOVER for
    ratios, Donner and Zou 2012, Stat. Methods Med. Res. 21:347). ``together`` is the correlation of the two. With
    Wilson's limits of paired shares and their paired_correlation the limit at a ratio of 1 is Newcombe's of the
    difference: the share kept holds 1 exactly where the change holds 0.
    """
    (part_value, part_low, part_high), (value, low, high) = part, whole

    def root(part_reach: float, reach: float, sign: int) -> float | None:
        # (part - r whole)**2 = part_reach**2 - 2 phi r part_reach reach + r**2 reach**2, solved for r
        square = value**2 - reach**2
        middle = part_value * value - together * part_reach * reach
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


def student(freedom: float) -> float:
    """Student's quantile at 0.975 with so many degrees of freedom."""
    from scipy import special  # as long to load as all that a comparison needs of shoal

    return float(special.stdtrit(freedom, 0.975))


def left_out_means(scores_NK: Array, weights_N: Array) -> Array:
    """(N, K): the weighted mean of every column without each of the items, two or more."""
    weighted_NK = scores_NK * weights_N[:, None]
    return (weighted_NK.sum(axis=0) - weighted_NK) / (weights_N.sum() - weights_N)[:, None]


def skewed_limits(left_out_NK: Array, value_K: Array, n: float) -> tuple[Array, Array]:
    """95 % limits of smooth statistics, from what each is without every one of the items.

    The standard error is the jackknife's, which for equal weights is the usual one of a mean. At each end stands the
    wider of Student's t limit, which is right for symmetric scores and too narrow on the long side of skewed ones, and
    of Hall's (1992, J. R. Statist. Soc. B 54:221), which corrects for skew but strays where a few items are far out.
    ``n`` of weighted items is their effective_n.
    """
    moves_NK, t = value_K - left_out_NK, student(max(n, 2.0) - 1)
    square_K, cube_K = (moves_NK**2).sum(axis=0), (moves_NK**3).sum(axis=0)
    error_K = np.sqrt(square_K * (1 - 1 / len(moves_NK)))
    skew_K = np.divide(cube_K, square_K**1.5, out=np.zeros_like(square_K), where=square_K > 0)  # of the mean
    skew_K = np.where(np.abs(skew_K) > 1e-9, skew_K, 1e-9)  # below, Hall's is Student's
    # where Hall's transformation, t + skew / 6 + skew t**2 / 3 + skew**2 t**3 / 27, reaches the quantiles t and -t
    down_K, up_K = (3 * (np.cbrt(1 + skew_K * (y - skew_K / 6)) - 1) / skew_K for y in (t, -t))
    return value_K - error_K * np.maximum(t, down_K), value_K + error_K * np.maximum(t, -up_K)


def effective_n(weights_N: Array) -> float:
    """How many items of equal weight would give a mean of the same spread (Kish 1965)."""
    return float(weights_N.sum() ** 2 / (weights_N**2).sum())


def t_test(left_out_NU: Array, change_U: Array, n: float) -> Array:
    """Two-sided p-values that the change is 0; 1 where no item has moved.

    Student's t has this probability beyond zero, its scale being the reach of skewed_limits towards zero: so p is 0.05
    exactly where the interval ends at zero. Where all items move alike there is no spread to go by, only their ``n``
    equal signs.
    """
    from scipy import special

    low_U, high_U = skewed_limits(left_out_NU, change_U, n)
    reach_U = np.where(change_U > 0, change_U - low_U, high_U - change_U)
    n, size_U = max(n, 2.0), np.abs(change_U)
    spread_U = reach_U > 1e-9 * size_U  # rounding leaves a little
    # the interval reaches t(.975) standard errors, so this many of them lie between the change and zero
    t_U = student(n - 1) * size_U / np.where(spread_U, reach_U, 1.0)
    return np.where(spread_U, 2 * special.stdtr(n - 1, -t_U), np.where(change_U == 0, 1.0, 2 ** (1 - n)))


def correlation(first_N: Array, other_N: Array) -> float:
    """Of two estimates, by how far each item moves them from their values; 0 where nothing moves one of them."""
    scale = math.sqrt(float(first_N @ first_N) * float(other_N @ other_N))
    return float(first_N @ other_N) / scale if scale > 0 else 0.0
