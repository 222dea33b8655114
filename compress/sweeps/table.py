"""From scores per item, with every component of an operator taken out in turn, to a table with intervals and tests; and
these scores on disk: <task>.json in the sweep's folder.

N items, U components, K = 1 + U columns of which the first is the intact model.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from shoal.artifacts.evaluation import TaskScore
from shoal.artifacts.importance import Effect, Estimate, Sweep, SweepColumn
from shoal.atomic_files import write_json
from shoal.components import Component
from shoal.errors import UserError
from shoal.recipe.section import LEAST_ITEMS
from shoal.stats import intervals
from shoal.stats.paired import (
    holm,
    interval,
    is_binary,
    mcnemar,
    paired_table,
    require_same_measurement,
    z_above_chance,
)

ALPHA = 0.05
SIGNAL_SIGMAS = 3.0
"""Standard errors above chance that the intact model needs before a share of its score can be kept or lost."""


@dataclass(frozen=True)
class Measured:
    """One column's scores per item, the intact model first."""

    task: TaskScore
    """Scores of the intact model."""
    ids: tuple[str, ...]
    scores_NK: intervals.Array
    weights_N: intervals.Array
    is_binary: bool

    @property
    def mean_K(self) -> intervals.Array:
        """The score of every column."""
        return np.average(self.scores_NK, axis=0, weights=self.weights_N)

    @property
    def left_out_NK(self) -> intervals.Array:
        """The same without each of the items."""
        return intervals.left_out_means(self.scores_NK, self.weights_N)

    @property
    def effective_n(self) -> float:
        """How many items of equal weight these are worth."""
        return intervals.effective_n(self.weights_N)


def needed_items(num_components: int) -> int:
    """How many items a column needs, so that a component whose removal loses every item can be told from chance at all.

    Losing n of n items has the exact p-value 2 / 2**n, and Holm's correction multiplies the smallest by the number of
    components.
    """
    return max(LEAST_ITEMS, math.ceil(math.log2(2 * num_components / ALPHA)))


def require_items(task: str, n: int, num_components: int, *, weights: Sequence[float] | None = None) -> None:
    """Refuse a column of too few items, or of items so unequal that few of them count; worth asking before a run."""
    need, effective = (
        needed_items(num_components),
        intervals.effective_n(np.asarray(weights or [1.0] * n, dtype=np.float64)),
    )
    if n < need:
        problem = (
            f"has {n} items, but for {num_components} removals an interval or a test needs at least {need} to show "
            "an effect; raise measure.sweep.limit"
        )
    elif effective < LEAST_ITEMS:
        problem = (
            f"its {n} items differ so much in weight that they are worth {effective:.1f} equal ones, but an interval "
            f"needs {LEAST_ITEMS}; raise measure.sweep.limit"
        )
    else:
        return
    raise UserError(f"task {task!r}: {problem}, or remove the task")


def table_of(
    operator: str, components: Sequence[Component], intact: Sequence[TaskScore], removed: Sequence[Sequence[TaskScore]]
) -> tuple[Sweep, tuple[Measured, ...]]:
    """The table of one operator, and what it was computed from: every column's scores in one matrix, checked.

    ``removed[i]`` are the scores without ``components[i]``, of the tasks of ``intact``.

    Raises:
        UserError: too few items, or scores of other items or settings.
    """
    by_key = [{score.key: score for score in scores} for scores in removed]
    columns: list[tuple[Measured, Sequence[TaskScore]]] = []
    for task in intact:
        require_items(task.task, len(task.items), len(components), weights=[item.weight for item in task.items])
        variants = [scores[task.key] for scores in by_key]
        for variant in variants:
            require_same_measurement(task, variant)
        columns.append((_measured(task, variants), variants))
    swept = tuple(_column(column, variants, keep=operator == "layer") for column, variants in columns)
    return Sweep(operator, tuple(components), swept), tuple(column for column, _ in columns)


def _measured(task: TaskScore, variants: Sequence[TaskScore]) -> Measured:
    columns = [{item.id: item.score for item in score.items} for score in (task, *variants)]
    ids = tuple(item.id for item in task.items)
    scores_NK = np.array([[column[identity] for column in columns] for identity in ids], dtype=np.float64)
    if not np.isfinite(scores_NK).all():
        row, place = np.argwhere(~np.isfinite(scores_NK))[0]
        raise UserError(
            f"task {task.task!r}: item {ids[row]!r} has the score {scores_NK[row, place]} "
            f"{f'in variant {place - 1}' if place else 'on the baseline'}; measure in another dtype (dtype: "
            "float32), or remove the task"
        )
    weights_N = np.array([item.weight for item in task.items], dtype=np.float64)
    binary = is_binary(task) and all(is_binary(variant) for variant in variants)
    return Measured(task, ids, scores_NK, weights_N, binary)


def _column(column: Measured, variants: Sequence[TaskScore], *, keep: bool) -> SweepColumn:
    task = column.task
    scores, changes, p_values = _effects(column)
    kept = retentions(column)
    adjusted = holm(p_values)
    sign = 1.0 if task.higher_is_better else -1.0
    effects = tuple(
        Effect(
            score=scores[position],
            change=changes[position],
            share_kept=None if isinstance(kept, str) else kept[position],
            p_value=p_values[position],
            adjusted_p=adjusted[position],
            critical=adjusted[position] < ALPHA and sign * changes[position].value < 0,
            **_text_shares(variant),
        )
        for position, variant in enumerate(variants)
    )
    return SweepColumn(
        task=task.task,
        ability=task.ability,
        protocol=task.protocol,
        metric=task.metric,
        chance=task.chance,
        higher_is_better=task.higher_is_better,
        n=task.n,
        version=task.version,
        num_fewshot=task.num_fewshot,
        baseline=Estimate(task.score, task.ci_low, task.ci_high),
        test="mcnemar-exact" if column.is_binary else "paired-t",
        effects=effects,
        no_share=kept if isinstance(kept, str) else "",
        correlation=_correlation_rows(column) if keep else (),
        **_text_shares(task),
    )


def _effects(column: Measured) -> tuple[Sequence[Estimate], Sequence[Estimate], list[float]]:
    """Scores, changes and their p-values by component."""
    if not column.is_binary:
        n, mean_K, left_out_NK = column.effective_n, column.mean_K, column.left_out_NK
        change_U, changes_NU = mean_K[1:] - mean_K[0], left_out_NK[:, 1:] - left_out_NK[:, :1]
        means = estimates(left_out_NK[:, 1:], mean_K[1:], n)
        return means, estimates(changes_NU, change_U, n), intervals.t_test(changes_NU, change_U, n).tolist()
    scores, changes, p_values = [], [], []
    for table in _tables(column):
        n, right, won, lost = sum(table.values()), table["both"] + table["won"], table["won"], table["lost"]
        scores.append(Estimate(right / n, *intervals.wilson(right, n)))
        limits = intervals.newcombe_paired(**table)
        changes.append(Estimate((won - lost) / n, *limits))
        p_values.append(mcnemar(won, lost))
    return scores, changes, p_values


def _retentions(column: Measured) -> list[Estimate | None]:
    """Of a task whose intact score stands clear of chance."""
    task, moves_NK = column.task, column.mean_K - column.left_out_NK
    value, low, high = (limit - task.chance for limit in (task.score, task.ci_low, task.ci_high))
    if column.is_binary:
        together = [intervals.paired_correlation(**table) for table in _tables(column)]
    else:
        together = [intervals.correlation(moves_NK[:, 0], moves_N) for moves_N in moves_NK[:, 1:].T]
    kept = []
    for score, shared in zip(_effects(column)[0], together, strict=True):
        part = (score.value - task.chance, score.low - task.chance, score.high - task.chance)
        limits = intervals.ratio(part, (value, low, high), shared)
        kept.append(None if limits is None else Estimate(part[0] / value, *limits))
    return kept


def left_out_retentions(column: Measured) -> intervals.Array:
    """(N, U): retention without each of the items."""
    above_NK = column.left_out_NK - column.task.chance
    return above_NK[:, 1:] / above_NK[:, :1]


def _tables(column: Measured) -> list[dict[str, int]]:
    """Per component: items right both times, only without the component, only with it, never."""
    before_N, *others = column.scores_NK.T
    return [paired_table(before_N, after_N) for after_N in others]


def _correlation_rows(column: Measured) -> tuple[tuple[float, ...], ...]:
    """Lower triangle of the changes' correlations over items; 0 beside a component that changes nothing."""
    change_NU = column.scores_NK[:, 1:] - column.scores_NK[:, :1]
    influence_NU = (change_NU - np.average(change_NU, axis=0, weights=column.weights_N)) * column.weights_N[:, None]
    covariance_UU = influence_NU.T @ influence_NU
    spread_U = np.sqrt(np.diag(covariance_UU))
    scale_UU = np.outer(spread_U, spread_U)
    correlation_UU = np.divide(covariance_UU, scale_UU, out=np.zeros_like(scale_UU), where=scale_UU > 0)
    np.fill_diagonal(correlation_UU, 1.0)
    return tuple(tuple(round(value, 4) for value in row[: i + 1].tolist()) for i, row in enumerate(correlation_UU))


def _text_shares(score: TaskScore) -> dict[str, float]:
    return {name: score.rates[name] for name in ("malformed", "repetition") if name in score.rates}


def estimates(left_out_NK: intervals.Array, value_K: intervals.Array, n: float) -> tuple[Estimate, ...]:
    """``value_K`` with 95 % intervals, from what they are without each of the items, worth ``n`` equal ones."""
    limits = intervals.skewed_limits(left_out_NK, value_K, n)
    return tuple(Estimate(*row) for row in zip(*(values.tolist() for values in (value_K, *limits)), strict=True))


def restricted(column: Measured, ids: Sequence[str]) -> Measured:
    """The column over some of its items, in the order of ``ids``."""
    if tuple(ids) == column.ids:
        return column
    places = {identity: place for place, identity in enumerate(column.ids)}
    rows = np.array([places[identity] for identity in ids])
    scores_NK, weights_N = column.scores_NK[rows], column.weights_N[rows]
    items = {item.id: item for item in column.task.items}
    kept = tuple(items[identity] for identity in ids)
    score = float(np.average(scores_NK[:, 0], weights=weights_N))
    task = replace(column.task, items=kept, n=len(kept), score=score)
    low, high = interval(task)
    task = replace(task, ci_low=low, ci_high=high)
    return Measured(task, tuple(ids), scores_NK, weights_N, column.is_binary)


def retentions(column: Measured) -> list[Estimate] | str:
    """Retention without each component, or why there is none."""
    task = column.task
    if not task.higher_is_better:
        return f"{task.metric} has no chance level; read the change"
    if (sigmas := z_above_chance(task)) is None or sigmas <= SIGNAL_SIGMAS:
        return f"the baseline is not clearly above chance ({task.score:.2f} against {task.chance:.2f}, n = {task.n})"
    retained = [value for value in _retentions(column) if value is not None]
    if len(retained) < column.scores_NK.shape[1] - 1:
        return f"the baseline score ({task.score:.2f}) is too uncertain for a ratio to it, n = {task.n}"
    return retained


def write_items(
    folder: Path, names: Sequence[str], intact: Sequence[TaskScore], removed: Sequence[Sequence[TaskScore]]
) -> None:
    """A file for every task: weights and scores of its items, intact and without each unit, in the order of the ids."""
    for index, task in enumerate(intact):
        table = {
            "task": task.task,
            "metric": task.metric,
            "ids": [item.id for item in task.items],
            "weights": [item.weight for item in task.items],
            "baseline": [item.score for item in task.items],
            "without": {
                unit: [item.score for item in scores[index].items] for unit, scores in zip(names, removed, strict=True)
            },
        }
        write_json(_file(folder, task.task), table)


def read_items(folder: Path, task: str, *, num_units: int) -> dict[str, intervals.Array]:
    """Item -> (2 + U,): its weight, its score with everything, and without each unit.

    Raises:
        UserError: the file is missing, or of another number of units.
    """
    file = _file(folder, task)
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        rows = [table["weights"], table["baseline"], *table["without"].values()]
        rows_KN = np.array(rows, dtype=np.float64)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file}: cannot be read ({error}); delete importance.json and measure again") from error
    if len(rows_KN) != 2 + num_units:
        raise UserError(
            f"{file}: has {len(rows_KN) - 2} units, importance.json has {num_units}; delete it and measure again"
        )
    return dict(zip(table["ids"], rows_KN.T, strict=True))


def _file(folder: Path, task: str) -> Path:
    name = re.sub(r"[^\w.-]+", "-", task)
    return folder / f"{name}.json"
