"""95 % intervals of shares, of their paired differences and of their ratios, in closed form; and of sums of estimates.

A table of paired 0/1 items is four counts: right both times, won (right only after), lost (only before), neither.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
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

    INFERRED for retention: the r at which the square-and-add limit of after - r * before (with chance taken off both)
    reaches zero, from the Wilson limits of both shares and their correlation (MOVER for ratios, Donner and Zou 2012,
    Stat. Methods Med. Res. 21:347). At r = 1 this is Newcombe's limit of the difference, so that retention holds 1
    exactly where the change holds 0. Resampling would give [1, 1] where no item happened to change.
    """
    n = both + won + lost + neither
    after, before = (both + won) / n - chance, (both + lost) / n - chance
    after_low, after_high = (limit - chance for limit in wilson(both + won, n))
    before_low, before_high = (limit - chance for limit in wilson(both + lost, n))
    phi = paired_correlation(both, won, lost, neither)

    def root(after_reach: float, before_reach: float, sign: int) -> float | None:
        # (after - r before)**2 = after_reach**2 - 2 phi r after_reach before_reach + r**2 before_reach**2, solved for r
        square = before**2 - before_reach**2
        middle = after * before - phi * after_reach * before_reach
        inside = middle**2 - square * (after**2 - after_reach**2)
        return (middle + sign * math.sqrt(max(inside, 0.0))) / square if before > 0 and square > 0 else None

    # below r = 0 the intact share enters with the other sign, so its other limit counts
    low = root(after - after_low, before_high - before if after_low >= 0 else before - before_low, -1)
    high = root(after_high - after, before - before_low if after_high >= 0 else before_high - before, +1)
    return None if low is None or high is None else (low, high)


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
