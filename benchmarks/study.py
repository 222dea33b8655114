"""What a measured run says about the claims of arXiv 2510.02091, claim by claim, as Markdown.

    python benchmarks/study.py runs/study [runs/study-heads ...]

Every statistic comes from importance.json. How a claim was made testable is this project's choice; the study's own
numbers are not public. A claim holds or fails where an interval says so, and is open otherwise.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from shoal.artifacts.artifact import Importance
from shoal.artifacts.importance import Estimate, Sweep, SweepColumn

Row = tuple[str, str, str]
"""Claim, verdict, statistic."""

LIKELIHOOD = ("loglikelihood", "continuation")


def claims(importance: Importance) -> Iterator[Row]:
    atlas = importance.atlas
    if atlas is None:
        return
    num_layers = importance.num_layers
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
    yield from depth_order(importance)
    for column in atlas.columns:
        yield first_layer(column)
    for profile in atlas.depth:
        if profile.gini is not None:
            critical = next(column.critical for column in atlas.columns if column.task == profile.task)
            yield (
                f"a few isolated layers carry it: {profile.task}",
                "described",
                f"critical after Holm: {', '.join(map(str, critical)) or 'none'}; Gini {profile.gini:.2f}, "
                f"entropy {profile.entropy:.2f}",
            )
    yield from agreement(importance)


def initial_layers(column: SweepColumn, num_layers: int) -> Row:
    """Under likelihood only the first layers matter: how many critical layers lie behind the first quarter."""
    late = [layer for layer in column.critical if layer >= num_layers / 4]
    middle = range(num_layers // 3, 2 * num_layers // 3)
    kept = [effect.retention.value for layer in middle if (effect := column.effects[layer]).retention is not None]
    return (
        f"only the first layers matter to likelihood: {column.task}",
        verdict(not late and bool(column.critical), bool(late)),
        f"critical behind the first quarter: {', '.join(map(str, late)) or 'none'}; in the middle third "
        f"{sum(value > 0.9 for value in kept)} of {len(kept)} keep more than 0.9",
    )


def depth_order(importance: Importance) -> Iterator[Row]:
    """Retrieval lies below knowledge, knowledge below reasoning."""
    assert importance.atlas is not None
    by_task = {column.task: column for column in importance.atlas.columns}
    centroids = [
        (by_task[depth.task], depth.centroid) for depth in importance.atlas.depth if depth.centroid is not None
    ]
    order = ("retrieval", "knowledge", "reasoning")
    for (lower, low), (upper, high) in itertools.permutations(centroids, 2):
        abilities = (lower.ability, upper.ability)
        if abilities not in list(itertools.pairwise(order)) or lower.protocol != upper.protocol:
            continue
        yield (
            f"{lower.ability} lies below {upper.ability} ({lower.protocol})",
            verdict(low.high < high.low, low.low > high.high),
            f"centroids {interval(low)} and {interval(high)}",
        )


def first_layer(column: SweepColumn) -> Row:
    effect = column.effects[0]
    retention = effect.retention
    if retention is None:
        change = interval(effect.change)
        return (
            f"without layer 0 everything breaks: {column.task}",
            verdict(effect.critical, False),
            f"change {change}",
        )
    return (
        f"without layer 0 everything breaks: {column.task}",
        verdict(retention.high < 0.5, retention.low > 0.5),
        f"retention {interval(retention)}",
    )


def agreement(importance: Importance) -> Iterator[Row]:
    """Importance by one measure says little about importance by another."""
    assert importance.atlas is not None
    correlations = importance.atlas.agreement
    written = [column.task for column in importance.atlas.columns if column.protocol == "generation"]
    for task in written:
        place = correlations.columns.index(task)
        others = [
            (name, correlations.spearman[place][other], correlations.ceiling[place][other])
            for other, name in enumerate(correlations.columns)
            if other != place
        ]
        told = ", ".join(f"{name} {value:.2f}" for name, value, _ in others if value is not None)
        yield (f"rank correlation with what generation needs: {task}", "described", told)


def heads(table: Sweep, num_layers: int) -> Iterator[Row]:
    for column in table.columns:
        critical = [table.units[position] for position in column.critical]
        upper = [unit for unit in critical if unit.layers[0] >= 2 * num_layers / 3]
        yield (
            f"heads that matter lie shallow to mid: {column.task} ({table.operator})",
            verdict(bool(critical) and not upper, bool(upper)),
            f"{len(critical)} of {len(table.units)} critical after Holm: "
            + (", ".join(unit.name for unit in critical) or "none"),
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


def table(importance: Importance) -> list[Row]:
    rows = list(claims(importance))
    for operator, sweep in importance.sweeps.items():
        if operator in ("head", "kv_group"):
            rows += heads(sweep, importance.num_layers)
        elif operator == "cumulative":
            rows += cumulative(sweep)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What a measured run says about the study's claims")
    parser.add_argument("runs", nargs="+", type=Path)
    for folder in parser.parse_args(arguments).runs:
        importance = Importance.read(folder / Importance.FILE)
        print(f"\n### {folder.name}\n\n| claim | verdict | statistic |\n| --- | --- | --- |")
        for row in table(importance):
            print("| " + " | ".join(row) + " |")
        if importance.atlas is not None:
            print("\n| column | n | intact | critical layers |\n| --- | --- | --- | --- |")
            for column in importance.atlas.columns:
                critical = ", ".join(map(str, column.critical)) or "none"
                print(f"| {column.task} | {column.n} | {interval(column.intact)} | {critical} |")


if __name__ == "__main__":
    main()
