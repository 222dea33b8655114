"""The figure of a comparison: what models keep against what they cost, by group of tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from shoal.artifacts.evaluation import Interval
from shoal.figures.pareto import COSTS, Cost, ParetoPanel, ParetoPoint, frontier, pareto_figure
from shoal.formatting import listed

from ..report.document import Picture, picture
from .compare import Model, RunComparison, same_models
from .means import even_weights
from .standings import mean_kept, task_groups

FIGURE = "pareto"
PROPORTIONAL = 0.05
"""Bytes per parameter that differ by more than this share make disk space a cost of its own."""


def pareto_panels(comparison: RunComparison) -> list[list[ParetoPanel]]:
    """A row for the mean that ranks and one per group of tasks, a panel per cost; empty where no retention is known."""
    groups = task_groups(comparison)
    weights = {title: even_weights(tasks) for title, tasks in groups.tasks.items()}
    if len(groups.that_rank) > 1:
        weights = {f"Mean of the {len(groups.that_rank)} rows below": groups.weights, **weights}
    columns = {task.task: task.column for task in comparison.tasks}
    rows = []
    for title, own in weights.items():
        mean = f", mean of {len(own)} tasks" if title in groups.tasks and len(own) > 1 else ""
        form = {"in": "trained form", "": ""}.get(columns[next(iter(own))], "untrained form")
        kept = [
            Interval(1.0, 1.0, 1.0) if model.role == "teacher" else mean_kept(model.cells, own)
            for model in comparison.models
        ]
        points = [tuple(_points(comparison, kept, cost)) for cost in _costs(comparison)]
        if any(point.role != "teacher" for panel in points for point in panel):
            costs = zip(_costs(comparison), points, strict=True)
            rows.append([ParetoPanel(f"{title}{mean}", cost, panel, form) for cost, panel in costs])
    return rows


def _points(comparison: RunComparison, kept: Sequence[Interval | None], cost: Cost) -> Iterator[ParetoPoint]:
    """One point per model, but for controls; runs that share one share the point."""
    letters = {id(group[0]): ", ".join(own.contender.letter for own in group) for group in same_models(comparison)}
    again = {id(own) for group in same_models(comparison) for own in group[1:]}
    for model, value in zip(comparison.models, kept, strict=True):
        if model.role == "control":
            continue
        amount = _cost(model, cost)
        if value is not None and amount is not None and id(model) not in again:
            label = "" if model.role == "teacher" else letters.get(id(model), model.contender.letter)
            yield ParetoPoint(label, model.role, amount, value)


def _cost(model: Model, cost: Cost) -> float | None:
    if cost == "decode":
        return model.speed_ratio.value if model.speed_ratio else None
    return float(model.evaluation.num_parameters if cost == "parameters" else model.evaluation.num_bytes)


def _costs(comparison: RunComparison) -> list[Cost]:
    """Costs that say something of their own: bytes only where they do not follow the parameters."""
    density = [model.evaluation.num_bytes / model.evaluation.num_parameters for model in comparison.models]
    costs: list[Cost] = ["parameters"]
    if max(density) > (1 + PROPORTIONAL) * min(density):
        costs.append("bytes")
    if any(model.role != "teacher" and model.speed_ratio is not None for model in comparison.models):
        costs.append("decode")
    return costs


def draw(comparison: RunComparison, folder: Path) -> Picture | None:
    """The figure, written to ``folder`` as SVG and PNG; None where no retention is known. Raises as picture does."""
    rows = pareto_panels(comparison)
    if not rows:
        return None
    title = "Retention against size" + (" and speed" if rows[0][-1].cost == "decode" else "")
    description = " ".join([_FIGURE_LEGEND, *_frontier_lines(rows)])
    figure = pareto_figure(rows, {c.letter: c.name for c in comparison.contenders})
    return picture(folder, FIGURE, figure, title, description)


_FIGURE_LEGEND = (
    "Every mark is a model, its letter the run (letters beside it: the runs that share it) and its bar the 95 % "
    "interval of the share of the teacher's score above chance that it keeps. Marks of equal cost stand side by side. "
    "The dashed line of steps joins the models that no other one beats in both directions; it goes by the marks alone, "
    "and where bars overlap the order is not settled."
)


def _frontier_lines(rows: Sequence[Sequence[ParetoPanel]]) -> Iterator[str]:
    for panel in (panel for row in rows for panel in row):
        names = [f"{point.label} {point.role}".strip() for point in frontier(panel)]
        yield f"{panel.title}, by {COSTS[panel.cost]}: {listed(names)}."


def no_figure(comparison: RunComparison) -> str:
    """Why there is none."""
    why = "no run has an evaluation of its teacher"
    if any(model.role == "teacher" for model in comparison.models):
        why = "the teacher is clear of chance on none of these tasks"
    return f"There is no figure, because retention is a share of what the teacher can do, and {why}."
