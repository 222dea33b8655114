"""Figures of retrieval heads: who copies, and what brings the answer of a twin back.

Numbers are told by lightness; lines differ in marker and stroke, not by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shoal.artifacts.heads import GROUPS, RETRIEVAL, Corruption, Heads, Patched
from shoal.figures.style import (
    INK,
    KEPT,
    SERIES_COLOURS,
    SERIES_STYLE,
    WIDTH_INCHES,
    figure_style,
    legend_above,
    panels,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVE_INCHES = 2.1
SITES = {"residual": "the layer's input", "attention": "the attention's output", "mlp": "the MLP's output"}


def heads_figure(heads: Heads) -> Figure:
    """Retrieval scores by layer and by head, then what patching of every site brings back by layer and by head."""
    sites: list[tuple[Corruption, str]] = [(twin, site) for twin in heads.num_twins for site in SITES]
    curves = [own for own in sites if any((patched.twin, patched.site) == own for patched in heads.patched)]
    maps = [
        patched
        for patched in heads.patched
        if (patched.site, patched.group) == ("head", "all") and any(patched.effects)
    ]
    most = max(len(row) for row in heads.scores)
    map_inches = 1.0 + 0.13 * heads.num_layers
    heights = [CURVE_INCHES, map_inches, *[CURVE_INCHES] * len(curves), *[map_inches] * len(maps)]
    figure, axes = panels(heights, width=max(WIDTH_INCHES, 1.6 + 0.2 * most))
    with figure_style():
        axes[0].bar(range(heads.num_layers), heads.layer_scores, color=KEPT, width=0.72)
        axes[0].set_title(f"Retrieval score: sum over heads with {RETRIEVAL} or more")
        axes[0].set_xlabel("layer")
        axes[0].grid(axis="y")
        axes[0].set_axisbelow(True)
        _draw_map(figure, axes[1], heads.scores, "Retrieval score of every head; framed: retrieval heads")
        _frame(axes[1], heads.retrieval_heads)
        for ax, (twin, site) in zip(axes[2:], curves, strict=False):
            _draw_curves(ax, [patched for patched in heads.patched if (patched.twin, patched.site) == (twin, site)])
            ax.set_title(f"Another {twin} (n = {heads.num_twins[twin]}): {SITES[site]}")
        if curves:
            legend_above(figure, axes[2 : 2 + len(curves)])
        for ax, patched in zip(axes[2 + len(curves) :], maps, strict=True):
            _draw_map(figure, ax, patched.effects, f"Another {patched.twin}: contexts of single heads")
    return figure


def _draw_curves(ax: Axes, patched: Sequence[Patched]) -> None:
    for curve in patched:
        place = GROUPS.index(curve.group)
        colour, (stroke, marker) = SERIES_COLOURS[place], SERIES_STYLE[place]
        values = [row[0] for row in curve.effects]
        ax.plot(values, stroke, marker=marker, ms=3.5, lw=1.3, color=colour, label=curve.group)
    ax.set_xlabel("layer")
    ax.set_ylabel("patching\nbrings back")
    ax.grid(axis="y")


def _draw_map(figure: Figure, ax: Axes, values: Sequence[Sequence[float]], title: str) -> None:
    width = max(len(row) for row in values)
    grid = [[*row, *[math.nan] * (width - len(row))] for row in values]
    image = ax.imshow(grid, cmap="cividis_r", aspect="auto", interpolation="none")
    bar = figure.colorbar(image, ax=ax, pad=0.02)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    ax.set_title(title)
    ax.set_xlabel("head")
    ax.set_ylabel("layer")


def _frame(ax: Axes, heads: Sequence[tuple[int, int]]) -> None:
    from matplotlib.patches import Rectangle

    for layer, head in heads:
        ax.add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, ec=INK, lw=1.2))
