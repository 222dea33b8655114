"""What a set of layers is expected to cost on every swept task, from the removals of single layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shoal.artifacts.importance import Estimate, Importance, SweepColumn
from shoal.formatting import layers_text, signed
from shoal.stats.intervals import Array, combined


def joint_change(column: SweepColumn, drop: Sequence[int]) -> Estimate:
    """The sum of the single removals' changes with its 95 % interval (square-and-add over correlated changes).

    INFERRED, and a guess by nature: removals interact, and two layers that can stand in for each other each look free.
    """
    layers = sorted(drop)
    changes = [column.effects[layer].change for layer in layers]
    correlation = np.eye(len(layers))
    for i, layer in enumerate(layers):
        for j, other in enumerate(layers[:i]):
            correlation[i, j] = correlation[j, i] = column.correlation[layer][other]
    return summed(changes, correlation)


def summed(parts: Sequence[Estimate], correlation: Array) -> Estimate:
    """The sum of ``parts``, with an interval by square-and-add over their correlation."""
    limits = ([part.value for part in parts], [part.low for part in parts], [part.high for part in parts])
    low, value, high = combined(*limits, correlation)
    return Estimate(float(value), float(low), float(high))


def is_loss(column: SweepColumn, change: Estimate) -> bool:
    """Whether the change is for the worse with its whole interval."""
    return change.high < 0 if column.higher_is_better else change.low > 0


def expected_sacrifice(importance: Importance, drop: Sequence[int]) -> tuple[str, ...]:
    """Lines for a reader: what dropping these layers is expected to cost on every swept task."""
    if importance.atlas is None:
        return ("what this costs is not known: importance.json holds no swept task (measure.sweep.tasks)",)
    if not drop:
        return ()
    head = (
        "expected sacrifice before any distillation, added up over removals of single layers (a rough guess and rather "
        "too low, since layers that stand in for each other each look free):"
    )
    return (head, *(_line(column, drop) for column in importance.atlas.columns))


def _line(column: SweepColumn, drop: Sequence[int]) -> str:
    change = joint_change(column, drop)
    text = f"  {column.task} ({column.protocol}): {_text(column, change)}"
    critical = sorted(set(column.critical) & set(drop))
    if critical:
        text += f"; critical here: layer{'s' if len(critical) > 1 else ''} {layers_text(critical)}"
    if column.higher_is_better and column.no_retention:
        return f"{text}; no signal: {column.no_retention}"
    return text if is_loss(column, change) or critical else f"{text}; no significant loss"


def _text(column: SweepColumn, change: Estimate) -> str:
    """`62.0 % -> 50.0 %, -12.0 points [-18.1, -6.2]`, never below nothing or above everything."""
    intact, after = column.intact.value, column.intact.value + change.value
    if column.higher_is_better and column.intact.low >= 0 and column.intact.high <= 1:
        after = min(1.0, max(0.0, after))
        limits = f"[{signed(100 * change.low, 1)}, {signed(100 * change.high, 1)}]"
        points = f"{signed(100 * change.value, 1)} points {limits}"
        return f"{100 * intact:.1f} % -> {100 * after:.1f} %, {points}, n = {column.n}"
    limits = f"[{signed(change.low, 3)}, {signed(change.high, 3)}]"
    return f"{intact:.3f} -> {after:.3f} {column.metric}, {signed(change.value, 3)} {limits}, n = {column.n}"
