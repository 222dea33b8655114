"""What runs keep of the teacher against what they cost: one row of panels per group of tasks, one column per cost.

A run is the letter in its mark and a role the mark's shape, so the figure reads in grey as well. The staircase joins
the models that no other one beats in both directions, by their point estimates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from shoal.artifacts.evaluation import Interval
from shoal.errors import UserError
from shoal.figures.style import FAINT, INK, ROLE_STYLE, clean, figure_style, panel_grid, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Cost = Literal["parameters", "bytes", "decode"]
COSTS: dict[Cost, str] = {
    "parameters": "parameters",
    "bytes": "weights on disk",
    "decode": "decoding speed",
}
FULL_WIDTH_INCHES = 7.4
ROW_INCHES = 2.1
MARK_WIDTH = 0.07
"""Share of the range of costs: marks that are closer than this are drawn side by side."""


@dataclass(frozen=True)
class ParetoPoint:
    """One model in one panel."""

    label: str
    """Letter of the run, or of all runs that share the model: `A, B`; empty for a teacher."""
    role: str
    cost: float
    kept: Interval
    """Share of the teacher's score above chance."""


@dataclass(frozen=True)
class ParetoPanel:
    """One group of tasks against one cost."""

    title: str
    cost: Cost
    points: tuple[ParetoPoint, ...]
    form: str = ""
    """How the tasks relate to the form of training text, as a line of the axis."""

    @property
    def less_is_better(self) -> bool:
        return self.cost != "decode"


def frontier(panel: ParetoPanel) -> list[ParetoPoint]:
    """The points that no other one beats: none keeps as much for less, or more for as much. By rising cost."""

    def beats(first: ParetoPoint, other: ParetoPoint) -> bool:
        gain = (other.cost - first.cost) * (1 if panel.less_is_better else -1)
        more = first.kept.value - other.kept.value
        return gain >= 0 and more >= 0 and (gain > 0 or more > 0)

    best = [point for point in panel.points if not any(beats(other, point) for other in panel.points)]
    return sorted(best, key=lambda point: (point.cost, point.kept.value))


def pareto_figure(rows: Sequence[Sequence[ParetoPanel]], names: Mapping[str, str]) -> Figure:
    """Every panel in a grid, ``rows`` of equal length, and a key of the runs' letters.

    Raises:
        UserError: there is no panel with a point.
    """
    if not any(panel.points for row in rows for panel in row):
        raise UserError("compare: there is no retention to draw; evaluate the teacher and a task it is above chance on")
    from matplotlib.lines import Line2D

    width = FULL_WIDTH_INCHES if len(rows[0]) > 1 else FULL_WIDTH_INCHES * 0.72
    height = sum([ROW_INCHES] * len(rows) + [0.4 + 0.2 * len(names)]) + 0.4
    figure, grid = panel_grid((len(rows), len(rows[0])), (width, height), sharex="col", sharey="row")
    with figure_style():
        for axes, row in zip(grid, rows, strict=True):
            low, high = _range([point for panel in row for point in panel.points])
            for ax, panel in zip(axes, row, strict=True):
                _draw(ax, panel)
                ax.set_ylim(low, high)
            axes[0].set_ylabel(",\n".join(filter(None, ("kept of the teacher", row[0].form))))
            axes[0].set_title(short(row[0].title, 56), weight="bold", fontsize=10)
        for ax, panel in zip(grid[-1], rows[-1], strict=True):
            better = "less" if panel.less_is_better else "more"
            ax.set_xlabel(f"{COSTS[panel.cost]}{_unit(panel)[1]}\n({better} is better)")
        roles = dict.fromkeys(point.role for row in rows for panel in row for point in panel.points)
        handles = [
            Line2D([], [], ls="", marker=ROLE_STYLE[role][1], color=ROLE_STYLE[role][0], ms=9, label=role)
            for role in sorted(roles, key=list(ROLE_STYLE).index)
        ]
        handles.append(Line2D([], [], color=INK, lw=1.1, ls=(0, (4, 2)), label="frontier"))
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), columnspacing=1.3)
        keys = [Line2D([], [], ls="", label=f"{letter} = {short(name, 60)}") for letter, name in names.items()]
        figure.legend(handles=keys, loc="outside lower left", handlelength=0, handletextpad=0, labelspacing=0.3)
    return figure


def _draw(ax: Axes, panel: ParetoPanel) -> None:
    from matplotlib.ticker import MultipleLocator

    scale, _ = _unit(panel)
    drawn_at = dict(zip(map(id, panel.points), _side_by_side(panel.points), strict=True))
    ax.axhline(1, color=FAINT, lw=1, zorder=0)
    ax.axhline(0, color=FAINT, lw=1, ls=":", zorder=0)
    best = frontier(panel)
    if len(best) > 1:
        stairs = "steps-post" if panel.less_is_better else "steps-pre"
        costs, kept = [drawn_at[id(point)] / scale for point in best], [point.kept.value for point in best]
        ax.plot(costs, kept, color=INK, lw=1.1, ls=(0, (4, 2)), drawstyle=stairs, zorder=1)
    for point in panel.points:
        colour, marker = ROLE_STYLE[point.role]
        x, y = drawn_at[id(point)] / scale, point.kept.value
        if point.role != "teacher":  # it keeps all of itself, by definition
            ax.plot([x, x], [point.kept.ci_low, point.kept.ci_high], color=colour, lw=1.7, alpha=0.8, zorder=2)
        triangle = marker == "v"
        ax.plot([x], [y], marker, color=colour, ms=15 if triangle else 12, mec="white", mew=0.6, zorder=3)
        lift = 1.8 if triangle else 0.0  # where it is widest
        style: dict[str, Any] = {"textcoords": "offset points", "va": "center_baseline", "weight": "bold", "zorder": 4}
        if len(point.label) > 1:
            ax.annotate(clean(point.label), (x, y), (-9, lift), ha="right", color=INK, fontsize=8, **style)
        else:
            ax.annotate(clean(point.label), (x, y), (0, lift), ha="center", color="white", fontsize=7.5, **style)
    ax.yaxis.set_major_locator(MultipleLocator(0.25))
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %".replace("-", "\N{MINUS SIGN}"))
    ax.margins(x=0.2 if any(len(point.label) > 1 for point in panel.points) else 0.09)
    ax.grid(axis="y")
    ax.set_axisbelow(True)


def _side_by_side(points: Sequence[ParetoPoint]) -> list[float]:
    """The cost at which each point is drawn: marks of nearly equal cost would hide each other."""
    costs = [point.cost for point in points]
    span = max(costs) - min(costs) or 0.2 * max(costs) or 1.0
    order = sorted(range(len(points)), key=lambda i: (costs[i], points[i].role != "pruned", points[i].label))
    groups: list[list[int]] = []
    for index in order:
        if groups and costs[index] - costs[groups[-1][-1]] < MARK_WIDTH * span:
            groups[-1].append(index)
        else:
            groups.append([index])
    drawn = list(costs)
    for group in groups:
        middle = (costs[group[0]] + costs[group[-1]]) / 2
        for place, index in enumerate(group):
            drawn[index] = middle + (place - (len(group) - 1) / 2) * MARK_WIDTH * span
    return drawn


def _unit(panel: ParetoPanel) -> tuple[float, str]:
    """What costs are divided by, and how that is said."""
    if panel.cost == "decode":
        return 1.0, ", × the teacher"
    largest = max(point.cost for point in panel.points)
    words = {1e9: "billions", 1e6: "millions"} if panel.cost == "parameters" else {1e9: "GB", 1e6: "MB", 1e3: "kB"}
    scale = next((size for size in words if largest >= size), 1.0)
    return scale, f", {words[scale]}" if scale > 1 else ""


def _range(points: Sequence[ParetoPoint]) -> tuple[float, float]:
    """Limits of the shares: from chance to the teacher, and as far beyond as values go and intervals reach a little."""
    values = [point.kept.value for point in points]
    low = max(min(point.kept.ci_low for point in points), min([*values, 0.0]) - 0.2)
    high = min(max(point.kept.ci_high for point in points), max([*values, 1.0]) + 0.25)
    return min(low, 0.0) - 0.1, max(high, 1.0) + 0.08
