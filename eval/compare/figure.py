"""The figure of a comparison: the mean that ranks against what models cost."""

from __future__ import annotations

from pathlib import Path

from shoal.artifacts.evaluation import Interval
from shoal.figures.pareto import Cost, ParetoPoint, pareto_figure

from ..report.document import Picture, picture
from .compare import Model, RunComparison, same_models
from .standings import mean_kept, task_groups

FIGURE = "pareto"
PROPORTIONAL = 0.05
"""Bytes per parameter that differ by more than this share make disk space a cost of its own."""
_LEGEND = (
    "Every mark is a model, its letter the run (letters beside it: the runs that share it) and its bar the 95 % "
    "interval of the share of the teacher's score above chance that it keeps, in the mean that ranks. The dashed line "
    "of steps joins the models that no other one beats in both directions; it goes by the marks alone, and where bars "
    "overlap the order is not settled."
)


def pareto_panels(comparison: RunComparison) -> dict[Cost, list[ParetoPoint]]:
    """Cost -> the models, but for controls; runs that share one share the point. Empty where no retention is known."""
    weights, shared = task_groups(comparison).weights, same_models(comparison)
    letters = {id(group[0]): ", ".join(own.contender.letter for own in group) for group in shared}
    again = {id(own) for group in shared for own in group[1:]}
    kept: list[tuple[Model, Interval]] = []
    for model in comparison.models:
        value = Interval(1.0, 1.0, 1.0) if model.role == "teacher" else mean_kept(model.cells, weights)
        if value is not None and model.role != "control" and id(model) not in again:
            kept.append((model, value))
    if all(model.role == "teacher" for model, _ in kept):
        return {}
    return {
        cost: [
            ParetoPoint(_label(model, letters), model.role, amount, value)
            for model, value in kept
            if (amount := _cost(model, cost)) is not None
        ]
        for cost in _costs(comparison)
    }


def _label(model: Model, letters: dict[int, str]) -> str:
    return "" if model.role == "teacher" else letters.get(id(model), model.contender.letter)


def _cost(model: Model, cost: Cost) -> float | None:
    if cost == "decode":
        return model.speed_ratio.value if model.speed_ratio else None
    return (model.evaluation.num_parameters if cost == "parameters" else model.evaluation.num_bytes) / 1e6


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
    panels = pareto_panels(comparison)
    if not panels:
        return None
    title = "Retention against size" + (" and speed" if "decode" in panels else "")
    names = {contender.letter: contender.name for contender in comparison.contenders}
    ranked = " and ".join(task_groups(comparison).that_rank)
    return picture(folder, FIGURE, pareto_figure(panels, names, f"Mean of {ranked}"), title, _LEGEND)


def no_figure(comparison: RunComparison) -> str:
    """Why there is none."""
    why = "no run has an evaluation of its teacher"
    if any(model.role == "teacher" for model in comparison.models):
        why = "the teacher is clear of chance on none of these tasks"
    return f"There is no figure, because retention is a share of what the teacher can do, and {why}."
