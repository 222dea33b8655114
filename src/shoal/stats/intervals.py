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
