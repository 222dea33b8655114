"""The figure of a comparison: what models keep of their teacher, in the mean that ranks, against what they cost.

A run is the letter beside its mark and a role the mark's shape, so the figure reads in grey as well. The staircase
joins the models that no other one beats in both directions, by their point estimates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from shoal.artifacts.evaluation import Interval
from shoal.figures.style import FAINT, INK, ROLE_STYLE, clean, figure_style, panel_grid, short

from ..report.page import Picture, picture
from .compare import Model, RunComparison, same_models
from .standings import mean_kept, task_groups

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURE = "pareto"
Cost = Literal["parameters", "bytes", "decode"]
COSTS: dict[Cost, str] = {
    "parameters": "parameters, millions\n(less is better)",
    "bytes": "weights on disk, MB\n(less is better)",
    "decode": "decoding speed, × the teacher\n(more is better)",
}
PANEL_INCHES = (3.7, 3.2)
PROPORTIONAL = 0.05
"""Bytes per parameter that differ by more than this share make disk space a cost of its own."""


@dataclass(frozen=True)
class ParetoPoint:
    """One model in one panel."""

    label: str
    """Letter of the run, or of all runs that share the model: `A, B`; empty for a teacher."""
    role: str
    cost: float
    kept: Interval
    """Share of the teacher's score above chance."""


def pareto_panels(comparison: RunComparison) -> dict[Cost, list[ParetoPoint]]:
    """Cost -> the models, but for controls; runs that share one share the point. Empty if no share kept is known."""
    weights, shared = task_groups(comparison).weights, same_models(comparison)
    labels = {id(own): "" if own.role == "teacher" else own.contender.letter for own in comparison.models}
    labels |= {id(group[0]): ", ".join(own.contender.letter for own in group) for group in shared}
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
            ParetoPoint(labels[id(model)], model.role, amount, value)
            for model, value in kept
            if (amount := _cost(model, cost)) is not None
        ]
        for cost in _costs(comparison)
    }


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
    """The figure, written to ``folder`` as SVG and PNG; None if no share kept is known. Raises as picture does."""
    panels = pareto_panels(comparison)
    if not panels:
        return None
    names = {contender.letter: contender.name for contender in comparison.contenders}
    ranked = " and ".join(task_groups(comparison).that_rank)
    return picture(folder, FIGURE, pareto_figure(panels, names, f"Mean of {ranked}"))


def frontier(points: Sequence[ParetoPoint], cost: Cost) -> list[ParetoPoint]:
    """The points that no other one beats: none keeps as much for less, or more for as much. By rising cost."""
    sign = -1 if cost == "decode" else 1

    def beats(first: ParetoPoint, other: ParetoPoint) -> bool:
        gain, more = sign * (other.cost - first.cost), first.kept.value - other.kept.value
        return gain >= 0 and more >= 0 and (gain > 0 or more > 0)

    best = [point for point in points if not any(beats(other, point) for other in points)]
    return sorted(best, key=lambda point: (point.cost, point.kept.value))


def pareto_figure(panels: Mapping[Cost, Sequence[ParetoPoint]], names: Mapping[str, str], title: str) -> Figure:
    """A panel for every cost, and a key of the runs' letters."""
    width, height = PANEL_INCHES
    figure, [axes] = panel_grid((1, len(panels)), (width * len(panels), height + 0.2 * len(names)), sharey="row")
    with figure_style():
        for ax, (cost, points) in zip(axes, panels.items(), strict=True):
            _draw_panel(ax, cost, points)
        axes[0].set_ylabel("share kept")
        axes[0].set_title(short(title, 56), weight="bold", fontsize=10)
        handles, labels = axes[0].get_legend_handles_labels()
        shown = dict(zip(labels, handles, strict=True))
        figure.legend(shown.values(), shown.keys(), loc="outside upper left", ncols=len(shown), columnspacing=1.3)
        told = "\n".join(f"{letter} = {short(name, 60)}" for letter, name in names.items())
        figure.supxlabel(told, x=0.02, ha="left", fontsize=9)
    return figure


def _draw_panel(ax: Axes, cost: Cost, points: Sequence[ParetoPoint]) -> None:
    ax.axhline(1, color=FAINT, lw=1, zorder=0)
    ax.axhline(0, color=FAINT, lw=1, ls=":", zorder=0)
    best = frontier(points, cost)
    stairs = "steps-pre" if cost == "decode" else "steps-post"
    places = [point.cost for point in best], [point.kept.value for point in best]
    ax.plot(*places, color=INK, lw=1.1, ls=(0, (4, 2)), drawstyle=stairs, zorder=1, label="frontier")
    for point in points:
        colour, marker = ROLE_STYLE[point.role]
        x, y = point.cost, point.kept.value
        if point.role != "teacher":  # it keeps all of itself, by definition
            ax.plot([x, x], [point.kept.ci_low, point.kept.ci_high], color=colour, lw=1.7, alpha=0.8, zorder=2)
        ax.plot([x], [y], marker, color=colour, ms=9, mec="white", mew=0.6, zorder=3, label=point.role)
        ax.annotate(clean(point.label), (x, y), (7, 0), textcoords="offset points", va="center", fontsize=8)
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %".replace("-", "\N{MINUS SIGN}"))
    ax.set_xlabel(COSTS[cost])
    ax.margins(x=0.15)
    ax.grid(axis="y")
    ax.set_axisbelow(True)
