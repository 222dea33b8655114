"""What cuts are expected to keep against the size and the speed that they leave, and where the plan stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from shoal.figures.style import FAINT, INK, SERIES_COLOURS, SERIES_STYLE, figure_style, heading, panel_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE_INCHES = (7.4, 3.2)


def frontier_figure(
    sizes: Sequence[int],
    speedups: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    *,
    kept: bool,
    chosen: tuple[int, float] | None = None,
) -> Figure:
    """Two panels over the same cuts: bytes of weights on disk, and expected decoding speed over the teacher's.

    ``curves``: name -> a value per cut; with ``kept`` shares of the teacher's score above chance, else scores of which
    lower is better. ``chosen``: bytes and speed of the plan, drawn as lines.
    """
    scale, unit = next(
        (size, name) for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if max(sizes) >= size or size == 1e3
    )
    figure, [axes] = panel_grid((1, 2), SIZE_INCHES, sharey="row")
    with figure_style():
        costs = ([size / scale for size in sizes], list(speedups))
        marks = None if chosen is None else (chosen[0] / scale, chosen[1])
        for place, (ax, across) in enumerate(zip(axes, costs, strict=True)):
            for index, (name, values) in enumerate(curves.items()):
                stroke, marker = SERIES_STYLE[index % len(SERIES_STYLE)]
                colour = SERIES_COLOURS[index % len(SERIES_COLOURS)]
                ax.plot(across, values, stroke, marker=marker, ms=4, lw=1.5, color=colour, label=heading(name))
            if marks is not None:
                ax.axvline(marks[place], color=INK, lw=1.1, ls=(0, (4, 2)), label="this plan")
            if kept:
                ax.axhline(1, color=FAINT, lw=1, zorder=0)
                ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
            ax.grid(axis="y")
        axes[0].set_ylabel(
            "expected to be kept,\nbefore distillation" if kept else "score of the cut\n(lower is better)"
        )
        axes[0].set_xlabel(f"weights on disk, {unit}\n(less is better)")
        axes[1].set_xlabel("decoding speed, × the teacher\n(expected; more is better)")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=4, columnspacing=1.3)
    return figure
