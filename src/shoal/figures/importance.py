"""What every layer and every run of layers is worth: bars by layer, heat maps of runs, the dropped layers marked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from shoal.artifacts.importance import Importance
from shoal.errors import UserError
from shoal.figures.style import DROPPED, KEPT, figure_style, heading, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def importance_figure(importance: Importance, drop: Sequence[int] = ()) -> Figure:
    """One panel of bars per layer metric and one heat map (start by length) per run metric, the dropped layers marked.

    Raises:
        UserError: the artifact holds no metric, or a dropped layer is none of its layers.
    """
    if not importance.layers and not importance.runs:
        raise UserError("importance.json: holds no metric to draw; run `shoal measure` again")
    refuse_foreign(drop, importance)
    heights = [1.9] * len(importance.layers) + [3.6] * len(importance.runs)
    figure, axes = panels(heights)
    with figure_style():
        for ax, (metric, scores) in zip(axes, importance.layers.items(), strict=False):
            _draw_layers(ax, metric, scores, drop)
        for ax, (metric, rows) in zip(axes[len(importance.layers) :], importance.runs.items(), strict=True):
            _draw_runs(figure, ax, metric, rows, drop)
    return figure


def refuse_foreign(drop: Sequence[int], importance: Importance) -> None:
    """Refuse dropped layers that are none of those that importance.json speaks of.

    Raises:
        UserError: there is one.
    """
    outside = [layer for layer in drop if not 0 <= layer < importance.num_layers]
    if outside:
        raise UserError(
            f"importance.json: has {importance.num_layers} layers, so layer {outside[0]} cannot be dropped; run "
            "`shoal measure` again for this model"
        )


def _draw_layers(ax: Axes, metric: str, scores: Sequence[float], drop: Sequence[int]) -> None:
    dropped = set(drop)
    for layer, score in enumerate(scores):
        out = layer in dropped
        ax.bar(
            layer, score, width=0.72, color=DROPPED if out else KEPT, hatch="////" if out else None, ec="white", lw=0
        )
    if drop:
        # A tick under the axis shows dropped layers even where the score is too small for a visible bar.
        low = ax.get_xaxis_transform()
        ax.plot(list(drop), [-0.045] * len(drop), "^", color=DROPPED, ms=5, transform=low, clip_on=False)
        ax.text(1, 1.0, "▨ dropped", color=DROPPED, transform=ax.transAxes, ha="right", va="bottom", fontsize=10)
    ax.tick_params(axis="x", pad=7)
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
