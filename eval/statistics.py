"""Intervals, paired tests and retention: what a before/after table may claim.

Two roles answer the same items, so every comparison is per item: the noise of which items were drawn cancels.

N items, R bootstrap resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from shoal.artifact import TaskScore
from shoal.errors import UserError

Array = NDArray[np.float64]
Z95 = float(stats.norm.ppf(0.975))
NUM_RESAMPLES = 4000
RESAMPLE_SEED = 20251002
SAME_MEASUREMENT = (
    "task",
    "ability",
    "protocol",
    "metric",
    "chance",
    "higher_is_better",
    "version",
    "num_fewshot",
    "n",
)
"""Fields that must agree before two scores are compared."""


@dataclass(frozen=True)
class PairedDifference:
    """after - before over the same items."""

    n: int
    difference: float
    ci_low: float
    ci_high: float
    """95 %: Newcombe's score interval for 0/1 scores, percentile bootstrap otherwise."""
    p_value: float
    test: Literal["mcnemar-exact", "paired-bootstrap"]
    won: int
    """Items on which `after` is better; better means lower for lower-is-better metrics."""
    lost: int


@dataclass(frozen=True)
class Retention:
    """(after - chance) / (before - chance), or None with the reason why that ratio would mean nothing."""

    value: float | None
    ci_low: float | None
    ci_high: float | None
    reason: str = ""


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


def bootstrap_mean(values: Sequence[float], weights: Sequence[float] | None = None) -> tuple[float, float]:
    """95 % interval of the (weighted) mean by resampling items, seeded.

    The percentiles are widened by sqrt(n / (n - 1)), the factor by which resampling underestimates the spread.
    """
    values_N = np.asarray(values, dtype=np.float64)
    weights_N = np.ones_like(values_N) if weights is None else np.asarray(weights, dtype=np.float64)
    mean = float(np.average(values_N, weights=weights_N))
    return _widened_percentiles(_resampled_means(values_N, weights_N), mean, len(values_N))


def interval(task: TaskScore) -> tuple[float, float]:
    """The 95 % interval of a task's score from its items: Wilson for 0/1 scores, bootstrap otherwise."""
    scores = [item.score for item in task.items]
    if is_binary(task):
        return wilson(sum(scores), len(scores))
    return bootstrap_mean(scores, [item.weight for item in task.items])


def is_binary(task: TaskScore) -> bool:
    """Whether the items count as right or wrong. Nats are never counted so, whatever their values happen to be."""
    return task.higher_is_better and all(item.score in (0.0, 1.0) and item.weight == 1.0 for item in task.items)


def paired(before: TaskScore, after: TaskScore) -> PairedDifference:
    """The change from ``before`` to ``after``, item by item.

    0/1 scores: exact McNemar test, and Newcombe's interval for paired proportions (1998, Stat. in Medicine 17:2635,
    method 10), whose coverage holds near 0 and 1 and with few discordant items. Others: paired bootstrap.

    Raises:
        UserError: the scores were measured with different settings or over different items; names the field.
    """
    require_same_measurement(before, after)
    before_N, after_N, weights_N = _aligned(before, after)
    gain_N = after_N - before_N if before.higher_is_better else before_N - after_N
    won, lost = int((gain_N > 0).sum()), int((gain_N < 0).sum())
    difference = float(np.average(after_N - before_N, weights=weights_N))
    if is_binary(before) and is_binary(after):
        low, high = newcombe_paired(
            both=int((before_N * after_N).sum()),
            won=won,
            lost=lost,
            neither=int(((1 - before_N) * (1 - after_N)).sum()),
        )
        return PairedDifference(before.n, difference, low, high, mcnemar(won, lost), "mcnemar-exact", won, lost)
    means_R = _resampled_means(after_N - before_N, weights_N)
    low, high = _widened_percentiles(means_R, difference, before.n)
    as_far = int((np.abs(means_R - difference) >= abs(difference)).sum())
    p_value = (1 + as_far) / (1 + NUM_RESAMPLES) if won or lost else 1.0
    return PairedDifference(before.n, difference, low, high, p_value, "paired-bootstrap", won, lost)


def require_same_measurement(before: TaskScore, after: TaskScore) -> None:
    """Refuse two scores that do not measure the same thing.

    Raises:
        UserError: naming the field that differs, or the first item that only one of them has.
    """
    for field in SAME_MEASUREMENT:
        here, there = getattr(before, field), getattr(after, field)
        if here != there:
            raise UserError(
                f"task {before.task!r}: {field} is {here!r} in one evaluation and {there!r} in the other; "
                "they cannot be compared, evaluate both with the same settings"
            )
    differing = sorted({item.id for item in before.items} ^ {item.id for item in after.items})
    if differing:
        raise UserError(
            f"task {before.task!r}: items differ ({len(differing)} are in one evaluation only, for example "
            f"{differing[0]!r}); evaluate both with the same settings"
        )
    targets = {item.id: item.target for item in after.items}
    changed = next((item for item in before.items if item.target != targets[item.id]), None)
    if changed is not None:
        raise UserError(
            f"task {before.task!r}: target of item {changed.id!r} is {changed.target!r} in one evaluation and "
            f"{targets[changed.id]!r} in the other; evaluate both with the same data"
        )


def mcnemar(won: int, lost: int) -> float:
    """Exact two-sided p-value that wins and losses are equally likely (binomial test over the discordant items)."""
    if won + lost == 0:
        return 1.0
    return float(stats.binomtest(won, won + lost, 0.5).pvalue)


def newcombe_paired(*, both: int, won: int, lost: int, neither: int) -> tuple[float, float]:
    """95 % interval of (won - lost) / n, from the Wilson intervals of both proportions and their correlation."""
    n = both + won + lost + neither
    after, before = (both + won) / n, (both + lost) / n
    after_low, after_high = wilson(both + won, n)
    before_low, before_high = wilson(both + lost, n)
    margins = (both + won) * (lost + neither) * (both + lost) * (won + neither)
    covariance = float(both * neither - won * lost)
    if covariance > 0:
        covariance = max(covariance - n / 2, 0.0)  # Newcombe's continuity correction, towards independence
    phi = covariance / math.sqrt(margins) if margins else 0.0

    def spread(one: float, other: float) -> float:
        return math.sqrt(max(one**2 - 2 * phi * one * other + other**2, 0.0))

    difference = after - before
    low = difference - spread(after - after_low, before_high - before)
    high = difference + spread(after_high - after, before - before_low)
    return low, high


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for having looked at several tasks (Holm 1979), in the order given."""
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for position, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - position) * p_values[index]))
        adjusted[index] = running
    return adjusted


def retention(before: TaskScore, after: TaskScore) -> Retention:
    """Which share of the teacher's score above chance is kept, with a paired bootstrap interval.

    Defined for higher-is-better metrics whose teacher lies above chance with its whole interval. Nats per token have no
    chance level, and a ratio over a teacher that is at chance is noise over noise.
    """
    require_same_measurement(before, after)
    if reason := no_retention(before):
        return Retention(None, None, None, reason)
    before_N, after_N, weights_N = _aligned(before, after)
    counts_RN = _resample_counts(before.n) * weights_N
    totals_R = counts_RN.sum(axis=1)
    above_R = counts_RN @ before_N / totals_R - before.chance
    kept_R = counts_RN @ after_N / totals_R - before.chance
    usable = above_R > 0  # the interval test above leaves at most a few resamples out
    low, high = np.percentile(kept_R[usable] / above_R[usable], (2.5, 97.5))
    value = (after.score - before.chance) / (before.score - before.chance)
    return Retention(float(value), float(low), float(high))


def no_retention(teacher: TaskScore) -> str:
    """Why no share of this score can be kept; empty where one can."""
    if not teacher.higher_is_better:
        return f"{teacher.metric} has no chance level; compare the difference"
    if teacher.ci_low <= teacher.chance:
        return f"the teacher is not above chance ({teacher.score:.2f} against {teacher.chance:.2f}, n = {teacher.n})"
    return ""


def z_above_chance(task: TaskScore) -> float | None:
    """How many standard errors a higher-is-better score lies above chance; None for lower-is-better ones.

    The standard error is that of a guesser (score test) where chance is inside (0, 1). At chance 0 a guesser has no
    spread, so the score's own is taken, with two successes and two failures added (Agresti and Coull 1998).
    """
    if not task.higher_is_better:
        return None
    if 0 < task.chance < 1 and is_binary(task):
        return (task.score - task.chance) / math.sqrt(task.chance * (1 - task.chance) / task.n)
    if is_binary(task):
        share = (task.score * task.n + 2) / (task.n + 4)
        return (task.score - task.chance) / math.sqrt(share * (1 - share) / (task.n + 4))
    spread = float(np.std([item.score for item in task.items], ddof=1)) if task.n > 1 else math.inf
    return (task.score - task.chance) / (spread / math.sqrt(task.n)) if spread > 0 else None


def minimal_detectable_difference(before: TaskScore, after: TaskScore, *, power: float = 0.8) -> float:
    """The smallest true difference that ``n`` items would show at the 5 % level with this power, in the metric's unit.

    For 0/1 scores from the share of discordant items (Connor 1987), at least three of them; 1 where none can be shown.
    """
    before_N, after_N, _ = _aligned(before, after)
    z_power, n = float(stats.norm.ppf(power)), before.n
    if not (is_binary(before) and is_binary(after)):
        spread = float(np.std(after_N - before_N, ddof=1)) if n > 1 else math.inf
        return (Z95 + z_power) * spread / math.sqrt(n)
    discordant = min(1.0, max(int((before_N != after_N).sum()), 3) / n)

    def shortfall(difference: float) -> float:
        spread = math.sqrt(max(discordant - difference**2, 0.0))
        return difference * math.sqrt(n) - Z95 * math.sqrt(discordant) - z_power * spread

    if shortfall(discordant) < 0:
        return 1.0
    return float(optimize.brentq(shortfall, 0.0, discordant))  # pyright: ignore[reportArgumentType]


def _aligned(before: TaskScore, after: TaskScore) -> tuple[Array, Array, Array]:
    """Scores of both, and the weights, in the order of ``before``'s items."""
    by_id = {item.id: item.score for item in after.items}
    return (
        np.array([item.score for item in before.items], dtype=np.float64),
        np.array([by_id[item.id] for item in before.items], dtype=np.float64),
        np.array([item.weight for item in before.items], dtype=np.float64),
    )


def _resample_counts(n: int) -> Array:
    """(R, N): how often each item is drawn in each resample; the same for equal n, so that figures repeat."""
    rng = np.random.default_rng(RESAMPLE_SEED)
    return rng.multinomial(n, np.full(n, 1 / n), size=NUM_RESAMPLES).astype(np.float64)


def _resampled_means(values_N: Array, weights_N: Array) -> Array:
    counts_RN = _resample_counts(len(values_N)) * weights_N
    return counts_RN @ values_N / counts_RN.sum(axis=1)


def _widened_percentiles(means_R: Array, mean: float, n: int) -> tuple[float, float]:
    low, high = np.percentile(means_R, (2.5, 97.5))
    widening = math.sqrt(n / (n - 1)) if n > 1 else 1.0
    return float(mean + (low - mean) * widening), float(mean + (high - mean) * widening)
