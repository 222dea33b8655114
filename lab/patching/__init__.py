"""Through which states an answer reaches the last token, by patching activations (arXiv:2504.07898): patching.json.

twins  look-ups with twins of one length and another answer
runs   clean, corrupted and patched runs
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from shoal.artifacts.artifact import Artifact, Provenance
from shoal.figures.style import SERIES_COLOURS, SERIES_STYLE, WIDTH_INCHES, figure_style, legend_above, panels
from shoal.launch.verbs.run import Run
from shoal.recipe.section import Positive, Section

from ..heads import draw_by_head
from ..results import identity, made, model_of, told
from .runs import GROUPS, Patched, patch_effects
from .twins import Corruption, copy_twins

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SITES = {"residual": "the layer's input", "attention": "the attention's output", "mlp": "the MLP's output"}


@dataclass(frozen=True)
class Settings(Section):
    """The prompts that are patched."""

    twins: Positive = 8
    """Look-ups of four pairs, each with three twins: another value, two keys exchanged, another key asked for."""


@dataclass(frozen=True)
class Patching(Artifact):
    """patching.json: what every part of every layer brings back of the clean run."""

    FILE: ClassVar[str] = "patching.json"

    num_layers: int
    num_twins: dict[Corruption, int]
    """Pairs of prompts that the model answers right both ways, on which ``patched`` is measured."""
    patched: tuple[Patched, ...]

    def in_words(self) -> str:
        """The head and the attention that bring back the most of every kind of twin."""
        lines = []
        for patched in self.patched:
            if patched.group == "all" and patched.site in ("head", "attention"):
                rows = enumerate(patched.effects)
                effect, layer, head = max((one, layer, head) for layer, row in rows for head, one in enumerate(row))
                place = f"head {layer}.{head}" if patched.site == "head" else f"the attention of layer {layer}"
                lines.append(f"of another {patched.twin} {place} brings back the most ({effect:.2f})")
        return "\n".join(lines)


def work(run: Run, settings: Settings) -> str:
    """What brings back the answer, in words."""

    def patched(provenance: Provenance) -> Patching:
        twins = copy_twins(settings.twins, run.tokenizer(), seed=run.recipe.seed)
        return Patching(provenance, run.num_layers, *patch_effects(model_of(run), twins))

    return told(run, made(run, Patching, identity(run, settings), patched, patching_figure))


def patching_figure(patching: Patching) -> Figure:
    """What patching of every site brings back, by layer and by head."""
    of = {(own.twin, own.site, own.group): own for own in patching.patched}
    curves: list[tuple[Corruption, str]] = [
        (twin, site) for twin in patching.num_twins for site in SITES if (twin, site, "all") in of
    ]
    maps = [own for own in patching.patched if (own.site, own.group) == ("head", "all") and any(own.effects)]
    most = max((len(row) for own in maps for row in own.effects), default=0)
    heights = [2.1] * len(curves) + [1.0 + 0.13 * patching.num_layers] * len(maps)
    figure, axes = panels(heights, width=max(WIDTH_INCHES, 1.6 + 0.2 * most))
    with figure_style():
        for ax, (twin, site) in zip(axes, curves, strict=False):
            _draw_curves(ax, [of[twin, site, group] for group in GROUPS if (twin, site, group) in of])
            ax.set_title(f"Another {twin} (n = {patching.num_twins[twin]}): {SITES[site]}")
        legend_above(figure, axes[: len(curves)])
        for ax, own in zip(axes[len(curves) :], maps, strict=True):
            draw_by_head(figure, ax, own.effects, f"Another {own.twin}: contexts of single heads")
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
