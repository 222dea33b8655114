"""The figure of diagnostics: what layers write, what they already know, and who needs them later.

Lines differ in marker and stroke, not by colour alone; effective depths are marked in the curve that they come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from shoal.figures.style import FAINT, INK, SERIES_COLOURS, SERIES_STYLE, figure_style, panels

from .diagnose import Diagnostics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVE_INCHES = 2.1
MATRIX_INCHES = 4.2
WRITERS = ("layer", "attention", "mlp")
WRITER_NAMES = {"layer": "layer", "attention": "attention", "mlp": "MLP"}


def diagnostics_figure(diagnostics: Diagnostics) -> Figure:
    """Directions and sizes of updates, the logit lens, effects on the output and on later layers, by layer.

    Panels of what could not be measured are left out.
    """
    curves = [_draw_cosines, _draw_sizes]
    curves += [_draw_divergence, _draw_overlap] if diagnostics.lens_kl else []
    curves += [_draw_output_effects] if diagnostics.skip_output else []
    matrix = len(diagnostics.skip_effect) > 1
    figure, axes = panels([CURVE_INCHES] * len(curves) + [MATRIX_INCHES] * matrix)
    with figure_style():
        for ax, draw in zip(axes, curves, strict=False):
            draw(ax, diagnostics)
            layer_axis(ax, diagnostics.num_layers)
        if matrix:
            _draw_skip_effect(figure, axes[-1], diagnostics)
    return figure


def _draw_cosines(ax: Axes, diagnostics: Diagnostics) -> None:
    _draw_series(ax, [(WRITER_NAMES[name], values) for name, values in _by_writer(diagnostics.cosines)])
    ax.axhline(0, color=FAINT, linewidth=1)
    ax.set_title("Direction of updates: cosine with what was read", pad=22)
    _mark_depth(ax, diagnostics, "cosine")


def _draw_sizes(ax: Axes, diagnostics: Diagnostics) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    series = _by_writer(diagnostics.sizes)
    _draw_series(ax, [(WRITER_NAMES[name], values) for name, values in series])
    if all(value > 0 for _, values in series for value in values):
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.yaxis.set_minor_locator(NullLocator())
    ax.set_title("Size of updates over the size of what was read", pad=22)


def _draw_divergence(ax: Axes, diagnostics: Diagnostics) -> None:
    _draw_series(ax, [("", diagnostics.lens_kl)])
    ax.set_ylim(bottom=0)
    ax.set_title("Logit lens on layer inputs: KL to the output, nats")
    _mark_depth(ax, diagnostics, "kl")


def _draw_overlap(ax: Axes, diagnostics: Diagnostics) -> None:
    _draw_series(ax, [("", diagnostics.lens_overlap)])
    ax.set_ylim(0, 1.02)
    ax.set_title("Logit lens: top-5 tokens in common with the output")
    _mark_depth(ax, diagnostics, "overlap")


def _draw_output_effects(ax: Axes, diagnostics: Diagnostics) -> None:
    series = [("layer skipped before", diagnostics.skip_output), ("one state erased", diagnostics.erasure_output)]
    _draw_series(ax, series)
    ax.set_ylim(bottom=0)
    ax.set_title(f"Largest change of later probabilities, {diagnostics.num_cuts} cuts", pad=22)


def _draw_skip_effect(figure: Figure, ax: Axes, diagnostics: Diagnostics) -> None:
    from matplotlib.ticker import MaxNLocator
    from numpy import array, ma, tri

    values = array(diagnostics.skip_effect)
    # a layer cannot change itself or what comes before it: those cells stay empty
    shown = ma.masked_array(values, mask=tri(len(values), dtype=bool))
    picture = ax.imshow(
        shown, cmap="cividis", vmin=0, vmax=min(1.0, float(values.max())) or 1.0, origin="lower", interpolation="none"
    )
    bar = figure.colorbar(picture, ax=ax, shrink=0.8, extend="max" if values.max() > 1 else "neither")
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    ax.set_title("Change of later layers' updates")
    ax.set_xlabel("later layer")
    ax.set_ylabel("layer skipped at earlier tokens")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))


def _by_writer(curves: dict[str, tuple[float, ...]]) -> list[tuple[str, tuple[float, ...]]]:
    return [(name, curves[name]) for name in WRITERS if name in curves]


def _draw_series(ax: Axes, series: Sequence[tuple[str, Sequence[float]]]) -> None:
    for index, (name, values) in enumerate(series):
        stroke, marker = SERIES_STYLE[index]
        ax.plot(
            range(len(values)),
            values,
            color=SERIES_COLOURS[index],
            linestyle=stroke,
            marker=marker,
            markersize=3,
            label=name or None,
        )
    if len(series) > 1:
        # above the panel, where no line can run through it
        ax.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.97), ncols=len(series), fontsize=9, borderaxespad=0)


def _mark_depth(ax: Axes, diagnostics: Diagnostics, rule: str) -> None:
    depth = diagnostics.effective_depth[rule]
    if depth.layer is not None and depth.ratio is not None:
        mark(ax, depth.layer, f"effective depth {depth.ratio:.0%}", diagnostics.num_layers)


def mark(ax: Axes, layer: int, text: str, num_layers: int) -> None:
    """A line at ``layer`` with words beside it."""
    ax.axvline(layer, color=INK, linewidth=1, linestyle=":")
    left = layer > num_layers / 2
    ax.annotate(
        text,
        (layer, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-4 if left else 4, -4),
        textcoords="offset points",
        ha="right" if left else "left",
        va="top",
        fontsize=8,
        color=INK,
    )


def layer_axis(ax: Axes, count: int) -> None:
    """Whole numbers of layers below a panel."""
    from matplotlib.ticker import MaxNLocator

    ax.set_xlim(-0.5, count - 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("layer")
    ax.grid(axis="y")
