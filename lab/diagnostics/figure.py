"""The figure of diagnostics: what layers write, what they already know, and who needs them later.

Lines differ in marker and stroke, not by colour alone; effective depths are marked in the curve that they come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from shoal.figures.style import INK, SERIES_COLOURS, SERIES_STYLE, figure_style, panels

from .diagnose import Diagnostics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = list[tuple[str, Sequence[float]]]


def diagnostics_figure(diagnostics: Diagnostics) -> Figure:
    """Directions and sizes of updates, the logit lens, effects on the output and on later layers, by layer.

    Panels of what could not be measured are left out.
    """
    own = diagnostics
    curves: list[tuple[str, Series, str]] = [
        ("Direction of updates: cosine with what was read", list(own.cosines.items()), "cosine"),
        ("Size of updates over the size of what was read", list(own.sizes.items()), ""),
        ("Logit lens on layer inputs: KL to the output, nats", [("KL", own.lens_kl)], "kl"),
        ("Logit lens: top-5 tokens in common with the output", [("share", own.lens_overlap)], "overlap"),
        (
            f"Largest change of later probabilities, {own.num_cuts} cuts",
            [("layer skipped before", own.skip_output), ("one state erased", own.erasure_output)],
            "",
        ),
    ]
    curves = [curve for curve in curves if curve[1][0][1]]
    matrix = len(own.skip_effect) > 1
    figure, axes = panels([2.1] * len(curves) + [4.2] * matrix)
    with figure_style():
        for ax, (title, series, rule) in zip(axes, curves, strict=False):
            for index, (name, values) in enumerate(series):
                stroke, marker = SERIES_STYLE[index]
                ax.plot(values, stroke, color=SERIES_COLOURS[index], marker=marker, markersize=3, label=name)
            ax.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.97), ncols=len(series), fontsize=9, borderaxespad=0)
            ax.set_title(title, pad=22)
            depth = own.effective_depth[rule] if rule else None
            if depth is not None and depth.layer is not None:
                mark(ax, depth.layer, f"effective depth {depth.ratio:.0%}", own.num_layers)
            layer_axis(ax, own.num_layers)
        if matrix:
            picture = axes[-1].imshow(own.skip_effect, cmap="cividis", vmin=0, origin="lower", interpolation="none")
            figure.colorbar(picture, ax=axes[-1], shrink=0.8)
            axes[-1].set_title("Change of later layers' updates")
            axes[-1].set_xlabel("later layer")
            axes[-1].set_ylabel("layer skipped at earlier tokens")
    return figure


def mark(ax: Axes, layer: int, text: str, num_layers: int) -> None:
    """A line at ``layer`` with words beside it."""
    ax.axvline(layer, color=INK, linewidth=1, linestyle=":")
    side = "right" if layer > num_layers / 2 else "left"
    ax.text(layer, 0.97, text, transform=ax.get_xaxis_transform(), ha=side, va="top", fontsize=8, color=INK)


def layer_axis(ax: Axes, count: int) -> None:
    """Whole numbers of layers below a panel."""
    from matplotlib.ticker import MaxNLocator

    ax.set_xlim(-0.5, count - 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("layer")
    ax.grid(axis="y")
