"""Layers: what each of them and every run of them is worth, and the stack of layers with what was taken out of it.

In the stack what was cut leaves its place, is hatched and dashed, and its bars are hatched too: nothing is said by
colour alone.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from shoal.artifacts.importance import Importance
from shoal.artifacts.plan import Plan
from shoal.figures.style import (
    DROPPED,
    FAINT,
    INK,
    KEPT,
    WIDTH_INCHES,
    clean,
    figure_style,
    heading,
    panel_grid,
    panels,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_COLUMNS = 5
"""Columns that are drawn; more would be too narrow to read. The atlas and importance.json hold all of them."""
MAX_HEIGHT_INCHES, MAX_ROW_INCHES = 8.5, 0.2
FAR_OUT = 3.0
"""A bar this many times longer than nine of ten others is broken off, so that it does not flatten them."""


@dataclass(frozen=True)
class DepthColumn:
    """What every layer is worth by one metric or one task."""

    name: str
    scores: tuple[float | None, ...]
    """Scores by layer; None = the column says nothing of it."""
    decided: bool = False
    """Whether layers were chosen by this column."""
    critical: frozenset[int] = frozenset()
    """Layers without which the task is significantly worse."""


def depth_columns(importance: Importance, plan: Plan | None) -> tuple[DepthColumn, ...]:
    """Every column of the importance: first those that layers were chosen by, then swept tasks, then metrics."""
    columns = {column.name: column for column in _all_columns(importance, plan)}
    return tuple(sorted(columns.values(), key=lambda column: not column.decided))


def depth_figure(plan: Plan, importance: Importance | None) -> Figure:
    """The stack of layers, 0 on top where text comes in, and beside it up to five columns of importance."""
    columns = depth_columns(importance, plan)[:MAX_COLUMNS] if importance else ()
    row = min(MAX_ROW_INCHES, MAX_HEIGHT_INCHES / plan.num_layers)
    size = (WIDTH_INCHES if len(columns) > 2 else 1.9 + 1.1 * len(columns), 1.0 + row * plan.num_layers)
    ratios = [1.25, *[1.0] * len(columns)]
    figure, (axes,) = panel_grid((1, 1 + len(columns)), size, sharey=True, width_ratios=ratios)
    with figure_style():
        _draw_stack(axes[0], plan)
        for ax, column in zip(axes[1:], columns, strict=True):
            _draw_column(ax, column, set(plan.drop))
    return figure


def _all_columns(importance: Importance, plan: Plan | None) -> Iterator[DepthColumn]:
    chosen_by = set(_chosen_by(plan))
    if atlas := importance.atlas:
        for column in atlas.columns:
            decided = not chosen_by.isdisjoint((column.task, column.ability, column.label))
            single = [unit.layers[0] for unit in atlas.sweep.units]
            scores = dict(zip(single, column.importances, strict=True))
            critical = frozenset(single[place] for place in column.critical)
            every = tuple(scores.get(layer) for layer in range(importance.num_layers))
            yield DepthColumn(atlas.sweep.title(column), every, decided, critical)
    for name, scores in importance.layers.items():
        yield DepthColumn(name, tuple(scores), name in chosen_by)
    drop = plan.drop if plan else ()
    for name, rows in importance.runs.items():
        length = len(drop) if plan and name in chosen_by and _is_run(plan, drop) else 1
        scores = (*rows[length - 1], *[None] * (length - 1))
        yield DepthColumn(name if length == 1 else f"{name}, {length} from here", scores, name in chosen_by)


def _chosen_by(plan: Plan | None) -> Iterator[str]:
    """Names of the metrics and tasks that the plan's settings choose by; none where the recipe names the layers."""
    settings = plan.provenance.inputs if plan else {}
    if "prune.metric" not in settings:
        return
    usual = "angular" if settings.get("prune.contiguous") else "block_influence"
    metric = settings["prune.metric"] or usual
    yield from metric if isinstance(metric, dict) else (metric,)


def _is_run(plan: Plan, drop: Sequence[int]) -> bool:
    return bool(plan.provenance.inputs.get("prune.contiguous")) and list(drop) == list(range(drop[0], drop[-1] + 1))


def _draw_stack(ax: Axes, plan: Plan) -> None:
    from matplotlib.patches import FancyBboxPatch

    edited = plan.changed
    for layer in range(plan.num_layers):
        out = layer in plan.drop
        brick = FancyBboxPatch(
            (0.42 if out else 0.0, layer - 0.36),
            1.0,
            0.72,
            boxstyle="round,pad=0,rounding_size=0.12",
            fc="none" if out else KEPT,
            ec=DROPPED,
            lw=1.0 if out else 0.0,
            ls=(0, (3, 1.5)),
            hatch="////" if out else None,
        )
        ax.add_patch(brick)
        if layer in edited:
            ax.text(1.08, layer, "◆", color=INK, fontsize=8, va="center")
    every = 1 if plan.num_layers <= 40 else 5
    ax.set_yticks(range(0, plan.num_layers, every))
    ax.tick_params(axis="y", length=0, labelsize=8, pad=2)
    ax.set_ylim(plan.num_layers - 0.4, -0.6)
    ax.set_xlim(-0.04, 1.46)
    ax.set_xticks([])
    ax.spines[:].set_visible(False)
    ax.set_title("text in ↓", fontsize=8, loc="center")
    legend = [
        "■ kept",
        *(["▨ cut"] if plan.drop else []),
        *(["◆ edited"] if edited else []),
    ]
    ax.set_xlabel("\n".join(["↓ next word out", "  ".join(legend)]), fontsize=8)


def _draw_column(ax: Axes, column: DepthColumn, dropped: set[int]) -> None:
    known = {layer: score for layer, score in enumerate(column.scores) if score is not None}
    low, high = min(0.0, *known.values()), _longest(list(known.values()))
    low = max(low, -high) if high > 0 else low
    for layer, score in known.items():
        out = layer in dropped
        ax.barh(
            layer,
            min(max(score, low), high),
            height=0.66,
            color="none" if out else KEPT,
            ec=DROPPED if out else INK if layer in column.critical else KEPT,
            hatch="////" if out else None,
            lw=1.0 if out or layer in column.critical else 0.0,
        )
        if not low <= score <= high:
            end, side = (high, "left") if score > high else (low, "right")
            ax.text(end, layer, "›" if score > high else "‹", color=INK, fontsize=8, va="center", ha=side)
    span = (high - low) or 1.0
    ax.set_xlim(low - 0.03 * span, high + 0.12 * span)
    ax.axvline(0, color=FAINT, lw=0.8)
    ax.set_xticks([])
    ax.tick_params(axis="y", length=0, labelleft=False)
    ax.spines[:].set_visible(False)
    parts = clean(column.name).replace("_", " ").split("/")
    lines = [line for part in parts for line in textwrap.wrap(part, 13, break_on_hyphens=False)][:3]
    weight = "bold" if column.decided else "normal"
    ax.set_title("\n".join(lines), fontsize=7.5, loc="left", weight=weight, x=-0.04)
    if column.decided:
        ax.set_xlabel("chosen\nby this", fontsize=8, color=DROPPED, loc="left")


def _longest(scores: Sequence[float]) -> float:
    """Where bars end: the largest score, or the largest that does not lie far out."""
    ordered = sorted(scores)
    usual = FAR_OUT * ordered[int(0.9 * (len(ordered) - 1))]
    return max((score for score in ordered if score <= usual), default=ordered[-1]) if usual > 0 else ordered[-1]


def importance_figure(importance: Importance, drop: Sequence[int] = ()) -> Figure:
    """One panel of bars per layer metric and one heat map (start by length) per run metric, the run ``drop`` framed."""
    heights = [1.9] * len(importance.layers) + [3.6] * len(importance.runs)
    figure, axes = panels(heights)
    with figure_style():
        for ax, (metric, scores) in zip(axes, importance.layers.items(), strict=False):
            _draw_layers(ax, metric, scores)
        for ax, (metric, rows) in zip(axes[len(importance.layers) :], importance.runs.items(), strict=True):
            _draw_runs(figure, ax, metric, rows, drop)
    return figure


def _draw_layers(ax: Axes, metric: str, scores: Sequence[float]) -> None:
    ax.bar(range(len(scores)), scores, width=0.72, color=KEPT)
    ax.set_title(heading(metric))
    ax.set_xlabel("layer")
    ax.set_ylabel("importance")
    ax.set_xlim(-0.8, len(scores) - 0.2)
    ax.grid(axis="y")
    ax.set_axisbelow(True)
    if scores and max(scores) > 12 * sorted(scores)[len(scores) // 2] > 0 and min(scores) > 0:
        ax.set_yscale("log")  # one outlying layer would flatten all others


def _draw_runs(figure: Figure, ax: Axes, metric: str, rows: Sequence[Sequence[float]], drop: Sequence[int]) -> None:
    from matplotlib.patches import Rectangle

    width = max(len(row) for row in rows)
    grid = np.full((len(rows), width), math.nan)
    for index, row in enumerate(rows):
        grid[index, : len(row)] = row
    # interpolation="none" keeps the raw cells in the SVG; any other choice stores a blurred picture
    image = ax.imshow(
        grid,
        origin="lower",
        aspect="auto",
        cmap="cividis",
        interpolation="none",
        extent=(-0.5, width - 0.5, 0.5, len(rows) + 0.5),
    )
    bar = figure.colorbar(image, ax=ax, label="importance of the run", pad=0.02)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    if drop and list(drop) == list(range(drop[0], drop[-1] + 1)) and len(drop) <= len(rows):
        ax.add_patch(Rectangle((drop[0] - 0.5, len(drop) - 0.5), 1, 1, fill=False, ec=DROPPED, lw=2.5))
        ax.annotate(
            "the cut",
            (drop[0], len(drop)),
            xytext=(0.97, 0.95),
            textcoords="axes fraction",
            ha="right",
            va="top",
            color=DROPPED,
            arrowprops={"arrowstyle": "-", "color": DROPPED},
        )
    ax.set_title(heading(metric))
    ax.set_xlabel("first layer of the run")
    ax.set_ylabel("layers in the run")
