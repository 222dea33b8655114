"""Do 95 % intervals of atlas and report hold the truth 95 times in 100? Item scores are drawn from known chances.

    python benchmarks/coverage.py [--data-sets 2000] [--json FILE]

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
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from shoal.artifacts.artifact import ItemScore, TaskScore
from shoal.artifacts.importance import Estimate
from shoal.atomic_files import write_json
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
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for name, items, intact, chance in (
        ("option text", 100, 0.6, 0.25),
        ("option text", 200, 0.9, 0.25),
        ("generated text", 100, 0.4, 0.0),
        ("generated text", 200, 0.7, 0.0),
    ):
        rows += planted_shares(name, items, intact, chance, arguments.data_sets)
    for items in (20, 60):
        rows += planted_nats(items, arguments.data_sets)
    print_summary(rows)
    report = planted_report(arguments.data_sets)
    outside = [row for row in report if not row["low"] <= row["share"] <= row["high"]]
    print(f"report: {len(report) - len(outside)} of {len(report)} inside what is promised")
    for row in (*rows, *report):
        print(json.dumps(row))
    if arguments.json:
        write_json(arguments.json, {"data_sets": arguments.data_sets, "rows": rows, "report": report})


def print_summary(rows: list[dict[str, Any]]) -> None:
    """How the atlas's intervals did, in a few lines."""
    for quantity in ("change", "retention"):
        with_quantity = [row for row in rows if quantity in row]
        mean = float(np.mean([row[quantity] for row in with_quantity]))
        often = [row[quantity] for row in with_quantity if row["changed"] >= 10]
        print(f"{quantity}: {mean:.3f} over all, {min(often):.3f} to {max(often):.3f} where 10 items or more change")
        print(f"  goal {GOAL[0]} to {GOAL[1]}; lowest of all {min(row[quantity] for row in with_quantity):.3f}")


def planted_shares(name: str, items: int, intact: float, chance: float, data_sets: int) -> list[dict[str, float | str]]:
    """Coverage per layer for right-or-wrong items."""
    rng = np.random.default_rng(20251002)
    loss_L, won_L = np.array(LOSS), np.array(WON)
    change_L = (1 - intact) * won_L - intact * loss_L
    kept_L = (intact + change_L - chance) / (intact - chance)

    def draw() -> Array:
        right_N1 = rng.random((items, 1)) < intact
        luck_NL = rng.random((items, len(LOSS)))
        return np.hstack([right_N1, np.where(right_N1, luck_NL >= loss_L, luck_NL < won_L)]).astype(float)

    hits = coverage(draw, data_sets, chance=chance, higher_is_better=True, change_L=change_L, kept_L=kept_L)
    changed_L = items * (intact * loss_L + (1 - intact) * won_L)
    return [
        {"column": name, "items": items, "layer": layer, "changed": round(float(changed_L[layer]), 1)} | hit
        for layer, hit in enumerate(hits)
    ]


def planted_nats(items: int, data_sets: int) -> list[dict[str, float | str]]:
    """Coverage per layer for nats per token: items of different difficulty, increases that are skewed."""
    rng = np.random.default_rng(7)
    increase_L = np.array(INCREASE)

    def draw() -> Array:
        intact_N1 = rng.gamma(4.0, 0.5, size=(items, 1))
        noise_NL = rng.normal(0.0, 0.05, size=(items, len(INCREASE)))
        return np.hstack([intact_N1, intact_N1 + increase_L * rng.gamma(2.0, 0.5, size=noise_NL.shape) + noise_NL])

    hits = coverage(draw, data_sets, chance=0.0, higher_is_better=False, change_L=increase_L, kept_L=None)
    return [
        {"column": "nats", "items": items, "layer": layer, "changed": items} | hit for layer, hit in enumerate(hits)
    ]


def coverage(
    draw: Callable[[], Array],
    data_sets: int,
    *,
    chance: float,
    higher_is_better: bool,
    change_L: Array,
    kept_L: Array | None,
) -> list[dict[str, float]]:
    """Share of data sets whose intervals hold the truth, per layer."""
    changes_L, kept_hits_L = np.zeros(len(change_L)), np.zeros(len(change_L))
    with_retention = 0
    for _ in range(data_sets):
        scores_NK = draw()
        tasks = [_task(column, chance, higher_is_better) for column in scores_NK.T]
        units = [Component((layer,), "mlp") for layer in range(len(change_L))]
        (column,) = sweep_table("mlp", units, tasks[:1], [[task] for task in tasks[1:]]).columns
        changes_L += [holds(effect.change, truth) for effect, truth in zip(column.effects, change_L, strict=True)]
        if kept_L is not None and not column.no_retention:
            with_retention += 1
            kept_hits_L += [
                holds(effect.retention, truth) for effect, truth in zip(column.effects, kept_L, strict=True)
            ]
    shares = [{"change": hits / data_sets} for hits in changes_L.tolist()]
    if with_retention:
        shares = [
            hit | {"retention": kept / with_retention} for hit, kept in zip(shares, kept_hits_L.tolist(), strict=True)
        ]
    return shares


def planted_report(data_sets: int) -> list[dict[str, Any]]:
    """What the report's intervals and tests promise, and how often they keep it: `share` between `low` and `high`."""
    rows = []
    for shared in (True, False):
        for n in (100, 400):
            name = f"gap of protocols, {'the same' if shared else 'other'} items"
            rows.append(_row(name, n, data_sets, gap_hits(n, data_sets, shared=shared)))
    for n in (10, 20, 60):
        rows.append(_row("mean of nats", n, data_sets, mean_hits(n, data_sets)))
        rows.append(_row("mean of nats, unequal windows", n, data_sets, mean_hits(n, data_sets, unequal=True)))
        rows.append(_row("change of length", n, data_sets, rate_hits(n, data_sets, "mean_tokens")))
    for n in (40, 200):
        rows.append(_row("retention of scores between 0 and 1", n, data_sets, soft_retention_hits(n, data_sets)))
        rows.append(_row("change of malformed answers", n, data_sets, rate_hits(n, data_sets, "malformed")))
    for n in (8, 20, 60):
        rows.append(_row("no change found in nats", n, data_sets, false_alarms(n, data_sets), high=1.0))
    return rows


def _row(name: str, n: int, data_sets: int, hits: int, *, high: float = 0.98) -> dict[str, Any]:
    luck = 3 * (0.95 * 0.05 / data_sets) ** 0.5
    return {"interval": name, "items": n, "share": hits / data_sets, "low": 0.93 - luck, "high": high + luck}


def gap_hits(n: int, data_sets: int, *, shared: bool) -> int:
    """Of two protocols, one gentle and one hard, whose luck per item is the same by half where items are shared."""
    rng = np.random.default_rng(11)
    right, lost, won, chance = (0.85, 0.6), (0.1, 0.4), (0.05, 0.02), (0.25, 0.0)
    kept = [
        (p * (1 - loss) + (1 - p) * gain - c) / (p - c)
        for p, loss, gain, c in zip(right, lost, won, chance, strict=True)
    ]
    hits = 0
    for number in range(data_sets):
        luck = rng.normal(size=(2, n))  # of the item, for the intact model and for the change
        pairs = []
        for protocol in range(2):
            own = rng.normal(size=(2, n))
            draws = stats.norm.cdf((luck + own) / np.sqrt(2) if shared else own)
            before = draws[0] < right[protocol]
            after = np.where(before, draws[1] >= lost[protocol], draws[1] < won[protocol])
            name = f"{number}" if shared else f"{number}-{protocol}"
            pairs.append(tuple(_task(s.astype(float), chance[protocol], True, name) for s in (before, after)))
        gap = retention_gap(*pairs)
        hits += gap is not None and gap[1] <= kept[0] - kept[1] <= gap[2]
    return hits


def mean_hits(n: int, data_sets: int, *, unequal: bool = False) -> int:
    """Of a role's nats per token, skewed."""
    rng = np.random.default_rng(12)
    weights = rng.integers(100, 512, size=n).astype(float) if unequal else np.ones(n)
    limits = (bootstrap_mean(rng.gamma(4.0, 0.5, size=n).tolist(), weights.tolist()) for _ in range(data_sets))
    return sum(low <= 2.0 <= high for low, high in limits)


def soft_retention_hits(n: int, data_sets: int) -> int:
    """Of scores like F1: teacher's mean 2/3, of which 3/4 stay."""
    rng = np.random.default_rng(13)
    hits = 0
    for _ in range(data_sets):
        before = rng.beta(2.0, 1.0, size=n)
        kept = retention(*(_task(scores, 0.0, True) for scores in (before, before * rng.beta(3.0, 1.0, size=n))))
        hits += kept.ci_low is not None and kept.ci_high is not None and kept.ci_low <= 0.75 <= kept.ci_high
    return hits


def rate_hits(n: int, data_sets: int, name: str) -> int:
    """Of the change of a rate of written text: 10 % to 30 % malformed, or 8 tokens more of about 20."""
    rng = np.random.default_rng(14)
    truth = 8.0 if name == "mean_tokens" else 0.2
    hits = 0
    for _ in range(data_sets):
        broken = rng.random(n) < 0.1
        later = broken | (rng.random(n) < 0.2 / 0.9)
        length = rng.poisson(20, size=n)
        longer = length + rng.poisson(8.0, size=n)
        before, after = (_written(bad, tokens) for bad, tokens in ((broken, length), (later, longer)))
        change = rate_difference(before, after, name)
        hits += change.ci_low - 1e-9 <= truth <= change.ci_high + 1e-9
    return hits


def false_alarms(n: int, data_sets: int) -> int:
    """How many data sets without a change a test at 5 % leaves alone."""
    rng = np.random.default_rng(15)
    alone = 0
    for _ in range(data_sets):
        before = rng.gamma(4.0, 0.5, size=n)
        after = before + rng.normal(0.0, 0.3, size=n)
        alone += paired(_task(before, 0.0, False), _task(after, 0.0, False)).p_value >= 0.05
    return alone


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
