"""Columns of importance.json by name: metrics, greedy orders and swept tasks, as one score per layer."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from scipy import stats

from shoal.artifacts.importance import Importance, Removal, SweepColumn
from shoal.errors import UserError


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
            f"{setting}: {name} could be {' or '.join(column.task for column in columns)} (importance.json has them "
            "all); name one, or mix them with prune.weights"
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
    metrics = [] if swept_only else [*importance.layers, *importance.runs, *importance.orders]
    columns = importance.atlas.columns if importance.atlas else ()
    names = list(dict.fromkeys([*metrics, *(name for c in columns for name in (c.task, c.ability, c.label))]))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    listed = sorted([*metrics, *(column.task for column in columns)])
    hint = f"did you mean {close[0]}?" if close else f"it has {' or '.join(listed) or 'none'}."
    where = "measure.sweep.tasks" if swept_only else "measure.metrics (a task: in measure.sweep.tasks)"
    return UserError(f"{setting}: is not in importance.json; {hint} To add it, name it in {where} and measure again")


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
                "another column"
            )
        for layer in removal.unit.layers:
            scores[layer] = float(position)
    return tuple(scores)
