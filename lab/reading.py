"""Reading against writing: what a layer does for other tokens of the prompt, and what where an answer is predicted.

Every quantity is INFERRED. ShortX (icip-cas) shows that layers which reading a prompt hardly needs are indispensable
for writing the answer; it has no number per layer. The tasks are those of measure.sweep. N items, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from shoal.artifacts.artifact import Artifact, Provenance
from shoal.artifacts.importance import Estimate, ProtocolGap, Sweep
from shoal.compress.sweeps.atlas import protocol_gaps
from shoal.compress.sweeps.table import Measured
from shoal.figures.atlas import band, fitting
from shoal.figures.style import INK, SERIES_COLOURS, SERIES_STYLE, figure_style, legend_above, panels
from shoal.formatting import layers_text
from shoal.launch.verbs.run import Run

from .part import in_interval, made, model_of, told
from .settings import Reading as Settings
from .sweeps import sweeps_identity, tables_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OF_LAYERS = ("layer", "skip_prompt", "skip_written")
"""Operators that have one component for every layer, in their order."""


@dataclass(frozen=True)
class ColumnReadWrite:
    """How much of what each layer's removal costs a column is reading, and how much is writing; one entry per layer.

    Losses are intact score - score, or nats added: in the metric's unit, above 0 = worse, never clipped.
    """

    task: str
    reading: tuple[Estimate, ...]
    """Loss where the layer writes nothing before the prompt's last token (skip_prompt)."""
    writing: tuple[Estimate, ...]
    """Loss where it writes nothing from there on (skip_written)."""
    reads: tuple[int, ...]
    """Layers whose reading is needed: significantly worse without it, after Holm's correction over the layers."""
    writes: tuple[int, ...]
    """Layers whose writing is needed."""


@dataclass(frozen=True)
class ReadWrite(Artifact):
    """reading.json: what layers do for other tokens of the prompt, and what they do where an answer is predicted."""

    FILE: ClassVar[str] = "reading.json"

    sweep: Sweep
    """The sweep of single layers, as in the atlas."""
    columns: tuple[ColumnReadWrite, ...]
    """In the order of the sweep."""
    hidden_writing: tuple[ProtocolGap, ...]
    """Protocol gaps of skip_written: what likelihood hides of the writing that generation needs, one number per
    layer."""
    hidden_reading: tuple[ProtocolGap, ...]
    """Protocol gaps of skip_prompt."""

    def in_words(self) -> str:
        """Sentences on every column and every pair with hidden writing."""

        def named(layers: Sequence[int]) -> str:
            return f"in layer{'s' if len(layers) > 1 else ''} {layers_text(layers)}" if layers else "in no layer"

        lines = []
        for column, own in zip(self.columns, self.sweep.columns, strict=True):
            needed = f"reading is needed {named(column.reads)}, writing {named(column.writes)}"
            lines.append(f"{self.sweep.title(own)}: {needed}")
        for gap, reading in zip(self.hidden_writing, self.hidden_reading, strict=True):
            most = max(range(len(gap.gaps)), key=lambda layer: gap.gaps[layer].value)
            mean, largest, read = (in_interval(share, "+.2f") for share in (gap.mean, gap.gaps[most], reading.mean))
            lines.append(
                f"hidden writing, {gap.likelihood} against {gap.generation}: {mean} of the score above chance in the "
                f"mean of all layers, most in layer {most}: {largest}; hidden reading {read}"
            )
        return "\n".join(lines)


def work(run: Run, settings: Settings) -> str:
    """Which layers read and which write, by task, in words.

    Raises:
        UserError: no swept tasks in the recipe, or a family in which single positions cannot be skipped.
    """

    def told_apart(provenance: Provenance) -> ReadWrite:
        return read_write_of(tables_of(run, model_of(run), OF_LAYERS), provenance)

    return told(run, made(run, ReadWrite, sweeps_identity(run, settings), told_apart, read_write_figure))


def read_write_of(tables: Mapping[str, tuple[Sweep, tuple[Measured, ...]]], provenance: Provenance) -> ReadWrite:
    """What every layer reads and writes, from what table_of gives for each of OF_LAYERS over the same tasks.

    Hidden writing of a layer is the share of the score above chance that is kept by likelihood less the share kept in
    generated text, while the layer writes nothing from the prompt's last token on: the protocol gap of skip_written.
    """
    (sweep, layers), (read, prompt), (wrote, written) = (tables[operator] for operator in OF_LAYERS)
    assert [c.ids for c in layers] == [c.ids for c in prompt] == [c.ids for c in written], "swept over different items"
    both = zip(read.columns, wrote.columns, strict=True)
    return ReadWrite(
        provenance,
        sweep,
        tuple(ColumnReadWrite(r.task, r.losses, w.losses, reads=r.critical, writes=w.critical) for r, w in both),
        hidden_writing=protocol_gaps(written)[0],
        hidden_reading=protocol_gaps(prompt)[0],
    )


def read_write_figure(parts: ReadWrite) -> Figure:
    """What every column loses by reading and by writing, layer by layer, and what likelihood hides of both."""
    layers = range(len(parts.sweep.units))
    hidden = list(zip(parts.hidden_writing, parts.hidden_reading, strict=True))
    figure, axes = panels([1.7] * (len(parts.columns) + len(hidden)))
    with figure_style():
        for ax, column, own in zip(axes, parts.columns, parts.sweep.columns, strict=False):
            unit = own.metric if own.higher_is_better else f"{own.metric} added"
            _draw_parts(ax, {"reading": column.reading, "writing": column.writing}, layers)
            ax.plot(layers, [loss.value for loss in own.losses], "_", color=INK, ms=9, label="without the layer")
            direction = "lost" if own.higher_is_better else ""
            ax.set_title(
                f"{fitting(parts.sweep.title(own))}: {fitting(unit)} {direction} (n = {own.n})".replace("  ", " ")
            )
        for ax, (writing, reading) in zip(axes[len(parts.columns) :], hidden, strict=True):
            _draw_parts(ax, {"hidden reading": reading.gaps, "hidden writing": writing.gaps}, layers)
            names = f"{fitting(writing.likelihood)} − {fitting(writing.generation)}"
            ax.set_title(f"Share kept, likelihood minus generation\n{names} (n = {writing.n})", fontsize=9)
        for ax in axes:
            ax.axhline(0, color=INK, lw=1)
            ax.grid(axis="y")
        legend_above(figure, axes)
        axes[-1].set_xlabel("layer")
    return figure


def _draw_parts(ax: Axes, parts: Mapping[str, Sequence[Estimate]], layers: Sequence[int]) -> None:
    for index, (name, values) in enumerate(parts.items()):
        place = index + 2 * name.startswith("hidden")
        band(ax, layers, values, SERIES_COLOURS[place], SERIES_STYLE[place], label=name)
