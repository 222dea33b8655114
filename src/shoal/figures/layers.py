"""Importance of layers and of blocks of layers; dropped layers are hatched or framed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from shoal.artifacts.importance import Importance
from shoal.figures.style import DROPPED, KEPT, figure_style, heading, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def importance_figure(importance: Importance, drop: Sequence[int] = ()) -> Figure:
    """One panel of bars per layer metric and one heat map (start by length) per run metric; the layers ``drop`` are
    hatched, and framed where they are one run."""
    heights = [1.9] * len(importance.layers) + [3.6] * len(importance.runs)
    figure, axes = panels(heights)
    with figure_style():
        for ax, (metric, scores) in zip(axes, importance.layers.items(), strict=False):
            _draw_layers(ax, metric, scores, drop)
        for ax, (metric, rows) in zip(axes[len(importance.layers) :], importance.runs.items(), strict=True):
            _draw_runs(figure, ax, metric, rows, drop)
    return figure


def _draw_layers(ax: Axes, metric: str, scores: Sequence[float], drop: Sequence[int]) -> None:
    for layer, bar in enumerate(ax.bar(range(len(scores)), scores, width=0.72, color=KEPT)):
        if layer in drop:
            bar.set(facecolor="none", edgecolor=DROPPED, hatch="////")
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
    bar = figure.colorbar(image, ax=ax, label="importance of the block", pad=0.02)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    if drop and list(drop) == list(range(drop[0], drop[-1] + 1)) and len(drop) <= len(rows):
        ax.add_patch(Rectangle((drop[0] - 0.5, len(drop) - 0.5), 1, 1, fill=False, ec=DROPPED, lw=2.5))
        ax.annotate(
            "dropped",
            (drop[0], len(drop)),
            xytext=(0.97, 0.95),
            textcoords="axes fraction",
            ha="right",
            va="top",
            color=DROPPED,
            arrowprops={"arrowstyle": "-", "color": DROPPED},
        )
    ax.set_title(heading(metric))
    ax.set_xlabel("first layer of the block")
    ax.set_ylabel("layers in the block")
