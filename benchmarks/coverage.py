"""Do 95 % intervals of the atlas hold the truth 95 times in 100? Item scores are drawn from known chances per layer.

    python benchmarks/coverage.py [--data-sets 2000] [--json FILE]

Three kinds of column are planted, each over layers that range from harmless to fatal: option text (0/1, chance 1/4),
generated text (0/1, chance 0) and nats per token (skewed, a few hard items). Every data set goes through the same
function as a sweep; a truth is the expected score of the drawn distribution, so luck in the intact score counts too.
0/1 changes are discrete: where only a few items of a data set change, no interval can be right in 95 % of data sets for
all truths, and these err to the safe side.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shoal.artifact import ItemScore, TaskScore, write_json
from shoal.compress.sweep_table import sweep_table
from shoal.eval.statistics import interval
from shoal.sweeps import Estimate, Unit

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
    for quantity in ("change", "retention"):
        found = [row for row in rows if quantity in row]
        mean = float(np.mean([row[quantity] for row in found]))
        often = [row[quantity] for row in found if row["changed"] >= 10]
        print(f"{quantity}: {mean:.3f} over all, {min(often):.3f} to {max(often):.3f} where 10 items or more change")
        print(f"  goal {GOAL[0]} to {GOAL[1]}; lowest of all {min(row[quantity] for row in found):.3f}")
    for row in rows:
        print(json.dumps(row))
    if arguments.json:
        write_json(arguments.json, {"data_sets": arguments.data_sets, "rows": rows})


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
        units = [Unit((layer,), "mlp") for layer in range(len(change_L))]
        (column,) = sweep_table("mlp", units, tasks[:1], [[task] for task in tasks[1:]]).columns
        changes_L += [holds(effect.change, truth) for effect, truth in zip(column.effects, change_L, strict=True)]
        if kept_L is not None and not column.no_retention:
            with_retention += 1
            kept_hits_L += [
                holds(effect.retention, truth) for effect, truth in zip(column.effects, kept_L, strict=True)
            ]
    found = [{"change": hits / data_sets} for hits in changes_L.tolist()]
    if with_retention:
        found = [
            hit | {"retention": kept / with_retention} for hit, kept in zip(found, kept_hits_L.tolist(), strict=True)
        ]
    return found


def holds(estimate: Estimate | None, truth: float) -> bool:
    """Whether the interval holds the truth, rounding aside."""
    return estimate is not None and estimate.low - 1e-9 <= truth <= estimate.high + 1e-9


def _task(scores_N: Array, chance: float, higher_is_better: bool) -> TaskScore:
    items = tuple(ItemScore(str(index), score) for index, score in enumerate(scores_N.tolist()))
    metric, mean = "acc" if higher_is_better else "nats_per_token", float(scores_N.mean())
    made = TaskScore(
        "planted", "planted", "planted", metric, mean, mean, mean, len(items), chance, higher_is_better, "1", 0, items
    )
    if not higher_is_better:
        return made  # its own interval, a bootstrap, is not looked at here
    low, high = interval(made)
    return replace(made, ci_low=low, ci_high=high)


if __name__ == "__main__":
    main()
