"""Do 95 % intervals of atlas and report hold the truth 95 times in 100? Item scores are drawn from known chances.

    python benchmarks/coverage.py [--data-sets 2000]

Three kinds of column are planted, each over layers that range from harmless to fatal: option text (0/1, chance 1/4),
generated text (0/1, chance 0) and nats per token (skewed, a few hard items). Every data set goes through the same
function as a sweep; a truth is the expected score of the drawn distribution, so luck in the intact score counts too.
0/1 changes are discrete: where only a few items of a data set change, no interval can be right in 95 % of data sets for
all truths, and these err to the safe side.

What the report adds is planted for itself: the gap between what two protocols keep (on the same items and on others),
retention of scores between 0 and 1, the mean of few items, rates of written text, and how often a test finds a change
where there is none.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from shoal.artifacts.evaluation import ItemScore, TaskScore
from shoal.artifacts.importance import Estimate
from shoal.compress.sweeps.table import sweep_table
from shoal.eval.harness.rates import rate_difference, with_rates
from shoal.recipe.edits import Component
from shoal.stats.paired import bootstrap_mean, interval, paired, retention, retention_gap

Array = NDArray[np.float64]
LOSS = (0.9, 0.4, 0.2, 0.1, 0.05, 0.02, 0.005)
"""Layer -> share of the right items that its removal loses."""
WON = (0.0, 0.02, 0.02, 0.02, 0.01, 0.01, 0.0)
"""Layer -> share of the wrong items that its removal wins."""
INCREASE = (3.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.0)
"""Layer -> mean increase in nats."""
GOAL = (0.93, 0.97)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data-sets", type=int, default=2000)
    arguments = parser.parse_args()
    rows = []
    for name, items, intact, chance in (
        ("option text", 100, 0.6, 0.25),
        ("option text", 200, 0.9, 0.25),
        ("generated text", 100, 0.4, 0.0),
        ("generated text", 200, 0.7, 0.0),
    ):
        rows += coverage(name, items, planted_shares(items, intact, chance), arguments.data_sets)
    for items in (20, 60):
        rows += coverage("nats", items, planted_nats(items), arguments.data_sets)
    print_summary(rows)
    report = planted_report(arguments.data_sets)
    outside = [row for row in report if not row["low"] <= row["share"] <= row["high"]]
    print(f"report: {len(report) - len(outside)} of {len(report)} inside what is promised")
    for row in (*rows, *report):
        print(json.dumps(row))


def print_summary(rows: list[dict[str, Any]]) -> None:
    """How the atlas's intervals did, in a few lines."""
    for quantity in ("change", "retention"):
        with_quantity = [row for row in rows if quantity in row]
        mean = float(np.mean([row[quantity] for row in with_quantity]))
        often = [row[quantity] for row in with_quantity if row["changed"] >= 10]
        print(f"{quantity}: {mean:.3f} over all, {min(often):.3f} to {max(often):.3f} where 10 items or more change")
        print(f"  goal {GOAL[0]} to {GOAL[1]}; lowest of all {min(row[quantity] for row in with_quantity):.3f}")


@dataclass(frozen=True)
class Planted:
    """A column of which the truth is known."""

    draw: Callable[[], Array]
    """Scores of one data set: a row per item, the intact model first and then every layer's removal."""
    change_L: Array
    kept_L: Array | None
    """Layer -> retention; None where there is none."""
    changed_L: Array
    """Layer -> items whose score changes."""
    chance: float = 0.0


def planted_shares(items: int, intact: float, chance: float) -> Planted:
    """Right-or-wrong items."""
    rng = np.random.default_rng(20251002)
    loss_L, won_L = np.array(LOSS), np.array(WON)
    change_L = (1 - intact) * won_L - intact * loss_L

    def draw() -> Array:
        right_N1 = rng.random((items, 1)) < intact
        luck_NL = rng.random((items, len(LOSS)))
        return np.hstack([right_N1, np.where(right_N1, luck_NL >= loss_L, luck_NL < won_L)]).astype(float)

    kept_L = (intact + change_L - chance) / (intact - chance)
    return Planted(draw, change_L, kept_L, items * (intact * loss_L + (1 - intact) * won_L), chance)


def planted_nats(items: int) -> Planted:
    """Nats per token: items of different difficulty, increases that are skewed."""
    rng = np.random.default_rng(7)
    increase_L = np.array(INCREASE)

    def draw() -> Array:
        intact_N1 = rng.gamma(4.0, 0.5, size=(items, 1))
        noise_NL = rng.normal(0.0, 0.05, size=(items, len(INCREASE)))
        return np.hstack([intact_N1, intact_N1 + increase_L * rng.gamma(2.0, 0.5, size=noise_NL.shape) + noise_NL])

    return Planted(draw, increase_L, None, np.full(len(INCREASE), items))


def coverage(name: str, items: int, planted: Planted, data_sets: int) -> list[dict[str, Any]]:
    """Share of data sets whose intervals hold the truth, per layer."""
    num_layers = len(planted.change_L)
    units = [Component((layer,), "mlp") for layer in range(num_layers)]
    hits_L = {"change": np.zeros(num_layers), "retention": np.zeros(num_layers)}
    counted = dict.fromkeys(hits_L, 0)
    for _ in range(data_sets):
        tasks = [_task(scores_N, planted.chance, planted.kept_L is not None) for scores_N in planted.draw().T]
        (column,) = sweep_table("mlp", units, tasks[:1], [[task] for task in tasks[1:]]).columns
        truths = {"change": planted.change_L}
        if planted.kept_L is not None and not column.no_retention:
            truths["retention"] = planted.kept_L
        for quantity, truth_L in truths.items():
            counted[quantity] += 1
            estimates = [getattr(effect, quantity) for effect in column.effects]
            hits_L[quantity] += [holds(estimate, truth) for estimate, truth in zip(estimates, truth_L, strict=True)]
    shares_L = {quantity: hits_L[quantity] / number for quantity, number in counted.items() if number}
    return [
        {"column": name, "items": items, "layer": layer, "changed": round(float(planted.changed_L[layer]), 1)}
        | {quantity: float(share_L[layer]) for quantity, share_L in shares_L.items()}
        for layer in range(num_layers)
    ]


def planted_report(data_sets: int) -> list[dict[str, Any]]:
    """What the report's intervals and tests promise, and how often they keep it: `share` between `low` and `high`."""
    luck = 3 * (0.95 * 0.05 / data_sets) ** 0.5
    promises: list[tuple[str, tuple[int, ...], Callable[[np.random.Generator, int], bool], int]] = [
        ("gap of protocols, the same items", (100, 400), partial(gap_holds, shared=True), 11),
        ("gap of protocols, other items", (100, 400), partial(gap_holds, shared=False), 11),
        ("mean of nats", (10, 20, 60), mean_holds, 12),
        ("mean of nats, unequal windows", (10, 20, 60), partial(mean_holds, unequal=True), 12),
        ("change of length", (10, 20, 60), partial(rate_holds, name="mean_tokens", truth=8.0), 14),
        ("retention of scores between 0 and 1", (40, 200), soft_retention_holds, 13),
        ("change of malformed answers", (40, 200), partial(rate_holds, name="malformed", truth=0.2), 14),
        ("no change found in nats", (8, 20, 60), no_alarm, 15),
    ]
    rows = []
    for name, sizes, hit, seed in promises:
        high = 1.0 if hit is no_alarm else 0.98
        for n in sizes:
            rng = np.random.default_rng(seed)
            share = sum(hit(rng, n) for _ in range(data_sets)) / data_sets
            rows.append({"interval": name, "items": n, "share": share, "low": 0.93 - luck, "high": high + luck})
    return rows


def gap_holds(rng: np.random.Generator, n: int, *, shared: bool) -> bool:
    """Of two protocols, one gentle and one hard, whose luck per item is the same by half where items are shared."""
    luck = rng.normal(size=(2, n))  # of the item, for the intact model and for the change
    pairs, kept = [], []
    for right, loss, gain, chance in ((0.85, 0.1, 0.05, 0.25), (0.6, 0.4, 0.02, 0.0)):
        kept.append((right * (1 - loss) + (1 - right) * gain - chance) / (right - chance))
        own = rng.normal(size=(2, n))
        draws = stats.norm.cdf((luck + own) / np.sqrt(2) if shared else own)
        before = draws[0] < right
        after = np.where(before, draws[1] >= loss, draws[1] < gain)
        name = "" if shared else f"{len(pairs)}-"
        pairs.append(tuple(_task(scores.astype(float), chance, True, name) for scores in (before, after)))
    gap = retention_gap(*pairs)
    return gap is not None and gap[1] <= kept[0] - kept[1] <= gap[2]


def mean_holds(rng: np.random.Generator, n: int, *, unequal: bool = False) -> bool:
    """Of a role's nats per token, skewed."""
    weights = rng.integers(100, 512, size=n).astype(float) if unequal else np.ones(n)
    low, high = bootstrap_mean(rng.gamma(4.0, 0.5, size=n).tolist(), weights.tolist())
    return low <= 2.0 <= high


def soft_retention_holds(rng: np.random.Generator, n: int) -> bool:
    """Of scores like F1: teacher's mean 2/3, of which 3/4 stay."""
    before = rng.beta(2.0, 1.0, size=n)
    kept = retention(_task(before, 0.0, True), _task(before * rng.beta(3.0, 1.0, size=n), 0.0, True))
    return kept.ci_low is not None and kept.ci_high is not None and kept.ci_low <= 0.75 <= kept.ci_high


def rate_holds(rng: np.random.Generator, n: int, *, name: str, truth: float) -> bool:
    """Of the change of a rate of written text: 10 % to 30 % malformed, or 8 tokens more of about 20."""
    broken = rng.random(n) < 0.1
    later = broken | (rng.random(n) < 0.2 / 0.9)
    length = rng.poisson(20, size=n)
    longer = length + rng.poisson(8.0, size=n)
    change = rate_difference(_written(broken, length), _written(later, longer), name)
    return change.ci_low - 1e-9 <= truth <= change.ci_high + 1e-9


def no_alarm(rng: np.random.Generator, n: int) -> bool:
    """Whether a test at 5 % leaves a data set without a change alone."""
    before = rng.gamma(4.0, 0.5, size=n)
    after = before + rng.normal(0.0, 0.3, size=n)
    return paired(_task(before, 0.0, False), _task(after, 0.0, False)).p_value >= 0.05


def _written(malformed_N: NDArray[np.bool_], tokens_N: NDArray[Any]) -> TaskScore:
    score = _task(np.zeros(len(tokens_N)), 0.0, True)
    items = tuple(
        replace(item, rates={"malformed": float(bad), "repetition": 0.0, "cut_off": 0.0, "tokens": float(tokens)})
        for item, bad, tokens in zip(score.items, malformed_N, tokens_N, strict=True)
    )
    return with_rates(replace(score, items=items))


def holds(estimate: Estimate | None, truth: float) -> bool:
    """Whether the interval holds the truth, rounding aside."""
    return estimate is not None and estimate.low - 1e-9 <= truth <= estimate.high + 1e-9


def _task(scores_N: Array, chance: float, higher_is_better: bool, name: str = "") -> TaskScore:
    items = tuple(ItemScore(f"{name}{index}", score) for index, score in enumerate(scores_N.tolist()))
    metric, mean = "acc" if higher_is_better else "nats_per_token", float(scores_N.mean())
    score = TaskScore(
        "planted", "planted", "planted", metric, mean, mean, mean, len(items), chance, higher_is_better, "1", 0, items
    )
    if not higher_is_better:
        return score  # its own interval, a bootstrap, is not looked at here
    low, high = interval(score)
    return replace(score, ci_low=low, ci_high=high)


if __name__ == "__main__":
    main()
