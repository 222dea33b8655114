"""What a measured run says about the claims of arXiv 2510.02091, claim by claim, as Markdown.

    python benchmarks/study.py runs/study [runs/study-heads ...]

Every statistic comes from importance.json. How a claim was made testable is this project's choice; the study's own
numbers are not public. A claim holds or fails where an interval says so, and is open otherwise.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from shoal.artifacts.importance import Atlas, Estimate, Importance, Sweep, SweepColumn

Row = tuple[str, str, str]
"""Claim, verdict, statistic."""

ORDER = (("retrieval", "knowledge"), ("knowledge", "reasoning"))
LIKELIHOOD = ("loglikelihood", "continuation")


def claims(atlas: Atlas, num_layers: int) -> Iterator[Row]:
    for gap in atlas.gaps:
        name = f"{gap.likelihood} - {gap.generation} (n {gap.n})"
        for part, estimate in zip(("middle", "last"), gap.thirds[1:], strict=True):
            yield (
                f"likelihood hides damage that generation shows, {part} third: {name}",
                verdict(estimate.low > 0, estimate.high < 0),
                f"mean gap {interval(estimate)}",
            )
    for column in atlas.columns:
        if column.protocol in LIKELIHOOD and not column.no_retention:
            yield initial_layers(column, num_layers)
    yield from depth_order(atlas)
    for column in atlas.columns:
        yield first_layer(column)
    for profile in atlas.depth:
        if profile.gini is not None:
            critical = next(column.critical for column in atlas.columns if column.task == profile.task)
            yield (
                f"a few isolated layers carry it: {profile.task}",
                "described",
                f"critical after Holm: {listed(critical)}; Gini {profile.gini:.2f}, entropy {profile.entropy:.2f}",
            )
    yield from agreement(atlas)


def initial_layers(column: SweepColumn, num_layers: int) -> Row:
    """Under likelihood only the first layers matter: how many critical layers lie behind the first quarter."""
    late = [layer for layer in column.critical if layer >= num_layers / 4]
    middle = range(num_layers // 3, 2 * num_layers // 3)
    kept = [effect.retention.value for layer in middle if (effect := column.effects[layer]).retention is not None]
    return (
        f"only the first layers matter to likelihood: {column.task}",
        verdict(not late and bool(column.critical), bool(late)),
        f"critical behind the first quarter: {listed(late)}; in the middle third "
        f"{sum(value > 0.9 for value in kept)} of {len(kept)} keep more than 0.9",
    )


def depth_order(atlas: Atlas) -> Iterator[Row]:
    """Retrieval lies below knowledge, knowledge below reasoning."""
    by_task = {column.task: column for column in atlas.columns}
    centroids = [(by_task[depth.task], depth.centroid) for depth in atlas.depth if depth.centroid is not None]
    for (lower, low), (upper, high) in itertools.permutations(centroids, 2):
        if (lower.ability, upper.ability) in ORDER and lower.protocol == upper.protocol:
            yield (
                f"{lower.ability} lies below {upper.ability} ({lower.protocol})",
                verdict(low.high < high.low, low.low > high.high),
                f"centroids {interval(low)} and {interval(high)}",
            )


def first_layer(column: SweepColumn) -> Row:
    effect, claim = column.effects[0], f"without layer 0 everything breaks: {column.task}"
    retention = effect.retention
    if retention is None:
        return claim, verdict(effect.critical, False), f"change {interval(effect.change)}"
    return claim, verdict(retention.high < 0.5, retention.low > 0.5), f"retention {interval(retention)}"


def agreement(atlas: Atlas) -> Iterator[Row]:
    """Importance by one measure says little about importance by another."""
    names, spearman = atlas.agreement.columns, atlas.agreement.spearman
    for task in (column.task for column in atlas.columns if column.protocol == "generation"):
        others = zip(names, spearman[names.index(task)], strict=True)
        told = ", ".join(f"{name} {value:.2f}" for name, value in others if name != task and value is not None)
        yield f"rank correlation with what generation needs: {task}", "described", told


def heads(table: Sweep, num_layers: int) -> Iterator[Row]:
    for column in table.columns:
        critical = [table.units[position] for position in column.critical]
        upper = [unit for unit in critical if unit.layers[0] >= 2 * num_layers / 3]
        yield (
            f"heads that matter lie shallow to mid: {column.task} ({table.operator})",
            verdict(bool(critical) and not upper, bool(upper)),
            f"{len(critical)} of {len(table.units)} critical after Holm: {listed(unit.name for unit in critical)}",
        )


def cumulative(table: Sweep) -> Iterator[Row]:
    for column in table.columns:
        first = next((len(table.units[position].layers) for position in column.critical), None)
        yield (
            f"how many layers may go by this order: {column.task}",
            "described",
            "never significantly worse" if first is None else f"significantly worse from {first} removed layers on",
        )


def verdict(holds: bool, fails: bool) -> str:
    return "holds" if holds else "does not hold" if fails else "open"


def interval(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values)) or "none"


def rows_of(importance: Importance) -> Iterator[Row]:
    if importance.atlas is not None:
        yield from claims(importance.atlas, importance.num_layers)
    for operator, sweep in importance.sweeps.items():
        if operator in ("head", "kv_group"):
            yield from heads(sweep, importance.num_layers)
        elif operator == "cumulative":
            yield from cumulative(sweep)


def print_table(names: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    for cells in (names, ["---"] * len(names), *rows):
        print(f"| {' | '.join(map(str, cells))} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="What a measured run says about the study's claims")
    parser.add_argument("runs", nargs="+", type=Path)
    for folder in parser.parse_args().runs:
        importance = Importance.read(folder / Importance.FILE)
        print(f"\n### {folder.name}\n")
        print_table(("claim", "verdict", "statistic"), rows_of(importance))
        if importance.atlas is not None:
            print()
            columns = importance.atlas.columns
            rows = ((c.task, c.n, interval(c.intact), listed(c.critical)) for c in columns)
            print_table(("column", "n", "intact", "critical layers"), rows)


if __name__ == "__main__":
    main()
