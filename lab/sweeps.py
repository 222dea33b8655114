"""Sweeps of what a plan does not drop: heads, key-value groups, ever more layers, a donor's layers: sweeps.json.

The tasks are those of measure.sweep; scores of items go to sweep/ in the run directory, beside those of the layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import PreTrainedModel

from shoal.artifacts.artifact import Artifact, Provenance
from shoal.artifacts.importance import Sweep, SweepColumn
from shoal.components import Component, LayerEdits
from shoal.compress.edits.layer_edits import components_of
from shoal.compress.sweeps.columns import layer_scores
from shoal.compress.sweeps.table import Measured
from shoal.compress.variants.variants import Edited
from shoal.figures import style
from shoal.figures.atlas import band, curves_figure, fitting
from shoal.launch.verbs.measure import importance_of, sweep_inputs, sweep_tables
from shoal.launch.verbs.run import Run, resolved
from shoal.models.checkpoint_files import model_fingerprint
from shoal.models.load import load_model
from shoal.recipe.section import Section
from shoal.runtime import device

from .donor import swapped
from .heads import draw_by_head
from .part import FOLDER, identity, made, model_of, told
from .settings import Sweeps as Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OVER = {
    "donor": "layer of the donor",
    "skip_prompt": "layer that writes nothing before the answer",
    "skip_written": "layer that writes nothing where the answer is predicted",
}
"""Operator -> what its curves run over."""


@dataclass(frozen=True)
class SweptTables(Artifact):
    """sweeps.json: the table of every operator."""

    FILE: ClassVar[str] = "sweeps.json"

    num_layers: int
    tables: dict[str, Sweep]

    def in_words(self) -> str:
        """The units without which each column is significantly worse."""
        lines = []
        for name, sweep in self.tables.items():
            for column in sweep.columns:
                critical = [sweep.units[place].name for place in column.critical]
                shown = ", ".join(critical[:8]) + (", ..." if len(critical) > 8 else "")
                lines.append(
                    f"{name}, {sweep.title(column)}: {len(critical)} of {len(sweep.units)} critical {shown}".rstrip()
                )
        return "\n".join(lines)


@dataclass(frozen=True)
class WithDonor(Edited):
    """A model into which layers of ``donor`` can be put."""

    donor: PreTrainedModel

    @contextmanager
    def applied(self, edits: LayerEdits) -> Iterator[object]:
        """``edits`` in effect, those that take a donor's layer among them."""
        layers = [layer for layer, edit in edits if edit.part == "donor"]
        with swapped(self.model, self.donor, layers) if layers else nullcontext(), super().applied(edits):
            yield


def tables_of(
    run: Run, model: Any, operators: Sequence[str], settings: Settings | None = None
) -> dict[str, tuple[Sweep, tuple[Measured, ...]]]:
    """The table of every operator and what it was computed from.

    Raises:
        UserError: a model whose units cannot be taken out one by one.
    """
    order = _order(run, settings) if settings and "cumulative" in operators else ()
    units: Mapping[str, Sequence[Component]] = {name: components_of(name, model, order=order) for name in operators}
    if settings is None or settings.donor is None:
        return sweep_tables(run, Edited(model), units)
    folder = resolved(settings.donor, settings.donor_revision)
    edited = WithDonor(model, load_model(folder, device=device(), **run.load_args()))
    return sweep_tables(run, edited, units, donor=model_fingerprint(folder))


def sweeps_identity(run: Run, settings: Section, **content: Any) -> dict[str, Any]:
    """What identifies what is made of sweeps."""
    swept = run.swept
    return identity(run, settings, **({} if swept is None else sweep_inputs(run, swept)), **content)


def work(run: Run, settings: Settings) -> str:
    """The units that tasks need, in words."""
    donor = None if settings.donor is None else model_fingerprint(resolved(settings.donor, settings.donor_revision))

    def swept(provenance: Provenance) -> SweptTables:
        tables = tables_of(run, model_of(run), settings.operators, settings)
        return SweptTables(provenance, run.num_layers, {name: table for name, (table, _) in tables.items()})

    result = made(run, SweptTables, sweeps_identity(run, settings, donor_content=donor), swept)
    for name, table in result.tables.items():
        style.save_figure(sweep_figure(table), run.dir / FOLDER / f"sweep_{name}.svg")
    return told(run, result)


def _order(run: Run, settings: Settings) -> tuple[int, ...]:
    """The layers that cumulative removals take out, first one first; one layer always stays."""
    if isinstance(settings.order, str):
        importance = importance_of(run).require()
        if (removals := importance.orders.get(settings.order)) is not None:  # of what it never tried it says nothing
            order = tuple(removal.unit.layers[0] for removal in removals)
        else:
            scores = layer_scores(settings.order, importance, setting="shoal lab sweeps: order")
            order = tuple(sorted(range(run.num_layers), key=lambda layer: (scores[layer], layer))[:-1])
        return order[: settings.max_removed]
    return settings.order[: settings.max_removed]


def sweep_figure(table: Sweep) -> Figure:
    """A map of heads, the curve of cumulative removals, or a curve over layers."""
    if any(component.index is not None for component in table.units):
        return head_map_figure(table)
    return cumulative_figure(table) if table.operator == "cumulative" else curves_figure(table, OVER[table.operator])


def head_map_figure(sweep: Sweep) -> Figure:
    """Layer by head (or key-value group), one map per column: how much worse the score is without each."""
    layers = 1 + max(component.layers[0] for component in sweep.units)
    places = 1 + max(component.index or 0 for component in sweep.units)
    width = max(style.WIDTH_INCHES, 1.6 + 0.3 * places)
    figure, axes = style.panels([1.0 + 0.17 * layers] * len(sweep.columns), width=width)
    corners = [(component.layers[0], component.index or 0) for component in sweep.units]
    with style.figure_style():
        for ax, column in zip(axes, sweep.columns, strict=True):
            grid = [[math.nan] * places for _ in range(layers)]
            for (layer, place), score in zip(corners, column.importances, strict=True):
                grid[layer][place] = score
            reach = max(abs(score) for score in column.importances) or 1.0
            title = _titled(column, f"{column.metric} lost without it; framed: critical")
            framed = [corners[position] for position in column.critical]
            # white in the middle: both ends of this map differ in lightness and hue for every kind of colour blindness
            draw_by_head(figure, ax, grid, title, framed, cmap="PuOr_r", vmin=-reach, vmax=reach)
            ax.set_xlabel({"kv_group": "key-value group"}.get(sweep.operator, sweep.operator))
    return figure


def cumulative_figure(sweep: Sweep) -> Figure:
    """Every column's score as ever more layers go, with its interval, the intact score and chance."""
    figure, axes = style.panels([1.7] * len(sweep.columns))
    gone = [len(component.layers) for component in sweep.units]
    with style.figure_style():
        for index, (ax, column) in enumerate(zip(axes, sweep.columns, strict=True)):
            scores = [column.baseline, *(effect.score for effect in column.effects)]
            band(ax, [0, *gone], scores, style.SERIES_COLOURS[index % 5], style.SERIES_STYLE[index % 5])
            ax.axhline(column.baseline.value, color=style.FAINT, lw=1)
            if column.higher_is_better:
                ax.axhline(column.chance, color=style.INK, lw=1, ls=(0, (3, 2)))
                ax.text(
                    1, column.chance, "chance", transform=ax.get_yaxis_transform(), ha="right", va="bottom", fontsize=9
                )
            ax.set_title(_titled(column, column.metric))
            ax.grid(axis="y")
        axes[-1].set_xlabel("layers removed")
    return figure


def _titled(column: SweepColumn, quantity: str) -> str:
    return f"{fitting(column.ability)}, {fitting(column.protocol)}: {fitting(quantity)} (n = {column.n})"
