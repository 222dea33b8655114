"""Columns of importance.json by name, as one score per layer: metrics, greedy orders and swept tasks; and what a set of
layers is expected to cost on swept tasks, from the removals of single layers."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import numpy as np
from scipy import stats

from shoal.artifacts.importance import Estimate, Importance, Removal, SweepColumn
from shoal.errors import UserError
from shoal.formatting import layers_text, signed
from shoal.recipe.measure import METRICS, no_metric, not_measured
from shoal.stats.intervals import Array, combined


def layer_scores(name: str, importance: Importance, *, setting: str) -> tuple[float, ...]:
    """One score per layer, higher = keep: a metric, an order of layers, a task, an ability, or `ability/protocol`.

    A metric of runs counts by its runs of one layer, an order by position, with what it never removes last.

    Raises:
        UserError: no such column, several that ``name`` could mean, or an order that is not of layers.
    """
    if name in importance.layers:
        return importance.layers[name]
    if name in importance.runs:
        return importance.runs[name][0]
    if name in importance.orders:
        return _positions(name, importance.orders[name], importance.num_layers, setting)
    columns = swept_columns(name, importance)
    if len(columns) > 1:
        raise UserError(
            f"{setting}: {name} is ambiguous: importance.json has "
            f"{' and '.join(column.task for column in columns)}; name one, or mix them: a mapping of metrics to "
            "weights"
        )
    if not columns:
        raise unknown(name, importance, setting)
    return columns[0].importances


def rankings(importance: Importance) -> dict[str, tuple[float, ...]]:
    """Every metric and order that ranks layers, higher = keep."""
    of_layers = [
        name for name, order in importance.orders.items() if all(removal.unit.part == "layer" for removal in order)
    ]
    names = (*importance.layers, *importance.runs, *of_layers)
    return {name: layer_scores(name, importance, setting="measure.metrics") for name in names}


def swept_columns(name: str, importance: Importance) -> tuple[SweepColumn, ...]:
    """All columns of the atlas that belong to a task, an ability, or `ability/protocol`; a task's name goes first."""
    columns = tuple(importance.atlas.of(name)) if importance.atlas else ()
    return tuple(column for column in columns if column.task == name) or columns


def unknown(name: str, importance: Importance, setting: str, *, swept_only: bool = False) -> UserError:
    """The refusal of a name that is not in importance.json, or chooses nothing, with the closest one that is there."""
    if not (swept_only or importance.atlas or name in METRICS):
        return no_metric(name, setting)
    metrics = [] if swept_only else [*importance.layers, *importance.runs, *importance.orders]
    columns = importance.atlas.columns if importance.atlas else ()
    names = list(dict.fromkeys([*metrics, *(name for c in columns for name in (c.task, c.ability, c.label))]))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    listed = sorted([*metrics, *(column.task for column in columns)])
    hint = f"did you mean {close[0]}?" if close else f"it has {' or '.join(listed) or 'none'}."
    where = "measure.sweep.tasks" if swept_only else "measure.metrics (a task: in measure.sweep.tasks)"
    return not_measured(setting, hint, where)


def ranks(scores: Sequence[float]) -> tuple[float, ...]:
    """Ranks from 0 (lowest) to 1 (highest), averaged over equal scores: the scale on which columns are mixed.

    Shares, nats and cosines have no unit in common, and one catastrophic layer would squeeze all others together on any
    scale that keeps distances.
    """
    return tuple(((stats.rankdata(scores) - 1) / max(1, len(scores) - 1)).tolist())


def _positions(name: str, order: Sequence[Removal], num_layers: int, setting: str) -> tuple[float, ...]:
    scores = [float(len(order))] * num_layers
    for position, removal in enumerate(order):
        if removal.unit.part != "layer":
            raise UserError(
                f"{setting}: {name} is an order of {removal.unit.part} units, which has no scores of layers; name "
                "another metric"
            )
        for layer in removal.unit.layers:
            scores[layer] = float(position)
    return tuple(scores)


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
        return ("expected loss: unknown, because importance.json holds no ablation (measure.sweep.tasks)",)
    if not drop:
        return ()
    head = (
        "expected loss before distillation, added up over single removals (a rough guess, usually too low, because "
        "layers that replace each other each look free):"
    )
    return (head, *(_line(column, drop) for column in importance.atlas.columns))


def _line(column: SweepColumn, drop: Sequence[int]) -> str:
    change = joint_change(column, drop)
    text = f"  {column.task} ({column.protocol}): {_text(column, change)}"
    critical = sorted(set(column.critical) & set(drop))
    if critical:
        text += f"; critical here: layer{'s' if len(critical) > 1 else ''} {layers_text(critical)}"
    if column.higher_is_better and column.no_share:
        return f"{text}; no signal: {column.no_share}"
    return text if is_loss(column, change) or critical else f"{text}; no significant loss"


def _text(column: SweepColumn, change: Estimate) -> str:
    """`62.0 % -> 50.0 %, -12.0 points [-18.1, -6.2]`, never below nothing or above everything."""
    intact, after = column.baseline.value, column.baseline.value + change.value
    if column.higher_is_better and column.baseline.low >= 0 and column.baseline.high <= 1:
        after = min(1.0, max(0.0, after))
        limits = f"[{signed(100 * change.low, 1)}, {signed(100 * change.high, 1)}]"
        points = f"{signed(100 * change.value, 1)} points {limits}"
        return f"{100 * intact:.1f} % -> {100 * after:.1f} %, {points}, n = {column.n}"
    limits = f"[{signed(change.low, 3)}, {signed(change.high, 3)}]"
    return f"{intact:.3f} -> {after:.3f} {column.metric}, {signed(change.value, 3)} {limits}, n = {column.n}"
