"""Figure of a vision tower's states: how alike they are, and what answers lose where another one is read.

Numbers are told by lightness; what is read differs in marker, not by colour alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal.artifacts.vision_states import VisionStates
from shoal.figures.style import DROPPED, FAINT, INK, KEPT, figure_style, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MATRIX_INCHES, CURVE_INCHES = 4.2, 2.3


def vision_states_figure(states: VisionStates) -> Figure:
    """Cosines of all pairs of states, and losses of answers by the state that is read, with 95 % intervals."""
    figure, (similar, losses) = panels([MATRIX_INCHES, CURVE_INCHES])
    with figure_style():
        _draw_similarity(figure, similar, states)
        _draw_losses(losses, states)
    return figure


def _draw_similarity(figure: Figure, ax: Axes, states: VisionStates) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    lowest = min(0.0, *(value for row in states.similarity for value in row))
    picture = ax.imshow(states.similarity, cmap="cividis", vmin=lowest, vmax=1, origin="lower", interpolation="none")
    bar = figure.colorbar(picture, ax=ax, shrink=0.8)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    for state in states.states_read:
        ax.add_patch(Rectangle((state - 0.5, state - 0.5), 1, 1, fill=False, ec=INK, lw=1.6))
    ax.set_title("Cosine of the tower's states; framed: read")
    ax.set_xlabel("state after so many blocks")
    ax.set_ylabel("state after so many blocks")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))


def _draw_losses(ax: Axes, states: VisionStates) -> None:
    from matplotlib.ticker import MaxNLocator

    read = states.deepest_read
    others = [state for state in range(len(states.losses)) if state != read]
    ax.errorbar(
        others,
        [states.losses[state] for state in others],
        [1.96 * (states.errors[state] or 0.0) for state in others],
        fmt="o",
        ms=4,
        lw=1.2,
        color=KEPT,
    )
    ax.plot([read], [0.0], "s", ms=6, color=DROPPED)
    ax.axhline(0, color=FAINT, linewidth=1)
    ax.set_title(f"Answer's loss by the state read in place of {read}; the projector as it is")
    ax.set_xlabel("state after so many blocks")
    ax.set_ylabel("nats per token")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(axis="y")
