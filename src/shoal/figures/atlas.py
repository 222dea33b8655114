"""The figures of a sweep: the atlas of single layers, agreement of its columns, and curves over layers.

Nothing is said by colour alone: numbers stand in the cells, critical layers have a frame and bold numbers, dropped ones
a mark beside their name. Intervals are drawn wherever there is one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shoal.artifacts.evaluation import FEW_ITEMS
from shoal.artifacts.importance import Agreement, Atlas, Estimate, Importance, ProtocolGap, Sweep, SweepColumn
from shoal.figures.style import (
    DROPPED,
    FAINT,
    INK,
    SERIES_COLOURS,
    SERIES_STYLE,
    WIDTH_INCHES,
    clean,
    figure_style,
    panels,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELL_INCHES = (0.56, 0.2)
COLOURS = "cividis_r"
"""Dark = costly. Even in lightness and equal for every kind of colour blindness."""
DARK_TEXT, LIGHT_TEXT = "#101418", "#ffffff"
"""On cells. Not INK, which becomes the page's text colour in inline SVG while cells keep theirs."""


def atlas_figure(importance: Importance, drop: Sequence[int] = ()) -> Figure:
    """Layers by metrics and by tasks under their protocols, then every column with its intervals, and protocol gaps."""
    atlas = importance.atlas
    assert atlas is not None
    metrics = {name: tuple(scores) for name, scores in importance.layers.items()}
    metrics |= {name: runs[0] for name, runs in importance.runs.items()}
    columns = [(atlas.sweep.title(column), column) for column in atlas.columns]
    cells = len(metrics) + len(columns) + bool(metrics)
    width = max(WIDTH_INCHES, 1.1 + CELL_INCHES[0] * cells)
    heights = [1.9 + CELL_INCHES[1] * importance.num_layers, *[1.45] * len(atlas.columns), *[1.45] * len(atlas.gaps)]
    heights.append(0.8 + 0.26 * len(atlas.columns))
    figure, axes = panels(heights, width=width)
    with figure_style():
        _draw_heat(axes[0], metrics, columns, drop, importance.num_layers)
        for index, column in enumerate(atlas.columns):
            colour, name = SERIES_COLOURS[index % 5], atlas.sweep.title(column)
            draw_column(axes[1 + index], column, name, colour, drop, range(importance.num_layers))
        for index, gap in enumerate(atlas.gaps):
            _draw_gap(axes[1 + len(atlas.columns) + index], gap, drop)
        _draw_centroids(axes[-1], atlas)
    return figure


def agreement_figure(agreement: Agreement) -> Figure:
    """Rank correlation of every two columns; below it the most that their items' noise leaves room for."""
    names, count = [fitting(column) for column in agreement.columns], len(agreement.columns)
    figure, (ax,) = panels([1.6 + 0.42 * count], width=max(WIDTH_INCHES, 2.0 + 0.62 * count))
    with figure_style():
        values = [[math.nan if value is None else value for value in row] for row in agreement.spearman]
        ax.imshow(values, cmap="cividis", vmin=-1, vmax=1, aspect="auto", interpolation="none")
        for row in range(count):
            for place in range(count):
                value, most = agreement.spearman[row][place], agreement.ceiling[row][place]
                text = "–" if value is None else f"{value:.2f}".replace("-", "−")
                if row != place and most is not None:
                    text += f"\n≤ {most:.2f}"
                colour = DARK_TEXT if value is not None and value > 0.2 else LIGHT_TEXT
                ax.text(place, row, text, ha="center", va="center", fontsize=7, color=colour if value else INK)
        _name_cells(ax, names, names)
        ax.set_title("Rank correlation between columns\n≤: upper limit from the noise of both columns' items")
    return figure


def curves_figure(sweep: Sweep, over: str = "") -> Figure:
    """Every column over the layers, for operators with one component of each; ``over``: what they are, in words."""
    places = [component.layers[0] for component in sweep.units]
    figure, axes = panels([1.6] * len(sweep.columns))
    with figure_style():
        for index, (ax, column) in enumerate(zip(axes, sweep.columns, strict=True)):
            draw_column(ax, column, sweep.title(column), SERIES_COLOURS[index % 5], (), places)
        axes[-1].set_xlabel(over or f"{sweep.operator} of layer")
    return figure


def _draw_heat(
    ax: Axes,
    metrics: dict[str, tuple[float, ...]],
    columns: Sequence[tuple[str, SweepColumn]],
    drop: Sequence[int],
    num_layers: int,
) -> None:
    every = range(num_layers)
    shown: list[tuple[str, list[float], list[str], tuple[int, ...]]] = []
    for name, scores in metrics.items():
        shown.append((fitting(name), _rank_shades(scores), [_short_number(score) for score in scores], ()))
    if metrics:
        shown.append(("", [math.nan] * num_layers, [""] * num_layers, ()))
    for name, column in columns:
        shades, texts = [_loss_shade(column, layer) for layer in every], [_cell_text(column, layer) for layer in every]
        shown.append((fitting(name.replace("/", "\n")), shades, texts, column.critical))
    grid = [[shades[layer] for _, shades, *_ in shown] for layer in every]
    image = ax.imshow(grid, cmap=COLOURS, vmin=0, vmax=1, aspect="auto", interpolation="none")
    for place, (_, shades, texts, critical) in enumerate(shown):
        for layer in every:
            _write_cell(ax, place, layer, texts[layer], shades[layer], framed=layer in critical)
    rows = [f"{'× ' if layer in set(drop) else ''}{layer}" for layer in range(num_layers)]
    _name_cells(ax, [name for name, *_ in shown], rows)
    for layer in drop:
        ax.get_yticklabels()[layer].set(color=DROPPED, weight="bold")
    ax.set_ylabel("layer" + (" (× dropped)" if drop else ""))
    head = "Without each layer: % of the score above chance kept,\nor added loss (nats per token); framed: critical"
    if metrics:
        head += ". Metrics: darker = higher rank"
    ax.set_title(head, fontsize=10)
    image.set_rasterized(False)


def _write_cell(ax: Axes, place: int, layer: int, text: str, shade: float, *, framed: bool) -> None:
    from matplotlib.patches import Rectangle

    colour = DARK_TEXT if not shade > 0.45 else LIGHT_TEXT
    weight = "bold" if framed else "normal"
    ax.text(place, layer, text, ha="center", va="center", fontsize=8, color=colour, weight=weight)
    if framed:
        ax.add_patch(Rectangle((place - 0.46, layer - 0.44), 0.92, 0.88, fill=False, ec=DROPPED, lw=1.4))


def draw_column(
    ax: Axes, column: SweepColumn, name: str, colour: str, drop: Sequence[int], layers: Sequence[int]
) -> None:
    """One column: what is left of the score without each of ``layers``, or nats added; the dropped ones marked."""
    kept = [effect.share_kept for effect in column.effects]
    if column.higher_is_better and all(share is not None for share in kept):
        values, quantity, intact = [share for share in kept if share is not None], "share kept", 1.0
    elif column.higher_is_better:
        values, quantity, intact = [effect.score for effect in column.effects], column.metric, column.baseline.value
    else:
        values, quantity, intact = [effect.change for effect in column.effects], f"{column.metric} added", 0.0
    band(ax, layers, values, colour, ("-", ""))
    ax.axhline(intact, color=FAINT, lw=1)
    critical = column.critical
    if critical:
        points = [layers[place] for place in critical], [values[place].value for place in critical]
        ax.plot(*points, "D", color=DROPPED, ms=4.5, label="critical")
    for part, dashes in (("malformed", (0, (4, 2))), ("repetition", (0, (1, 1)))):
        shares = [getattr(effect, part) for effect in column.effects]
        if any(shares):
            ax.plot(layers, shares, color=INK, lw=1.1, ls=dashes, label=part)
    if len(ax.get_legend_handles_labels()[0]) > bool(critical):
        ax.legend(loc="center right", fontsize=8)
    _mark_dropped(ax, drop)
    few = ", too few for narrow intervals" * (column.n < FEW_ITEMS)
    ax.set_title(f"{fitting(name)}: {fitting(quantity)} (n = {column.n}{few})")
    ax.grid(axis="y")


def _draw_gap(ax: Axes, gap: ProtocolGap, drop: Sequence[int]) -> None:
    band(ax, list(range(len(gap.gaps))), gap.gaps, SERIES_COLOURS[3], ("-", "."))
    ax.axhline(0, color=INK, lw=1)
    mean = f"mean {gap.mean.value:+.2f} [{gap.mean.low:+.2f}, {gap.mean.high:+.2f}]".replace("-", "−")
    _mark_dropped(ax, drop)
    names = f"{fitting(gap.likelihood)} − {fitting(gap.generation)}"
    ax.set_title(f"Protocol gap, share kept: {mean}\n{names} (n = {gap.n})", fontsize=9)
    ax.grid(axis="y")


def _draw_centroids(ax: Axes, atlas: Atlas) -> None:
    for row, profile in enumerate(atlas.depth):
        label = atlas.sweep.title(atlas.columns[row])
        if profile.centroid is None:
            label += f" ({profile.reason})"
        else:
            point = profile.centroid
            ax.plot([point.low, point.high], [row, row], color=SERIES_COLOURS[row % 5], lw=2, solid_capstyle="round")
            ax.plot([point.value], [row], SERIES_STYLE[row % 5][1], color=SERIES_COLOURS[row % 5], ms=6)
        ax.text(0, row - 0.3, fitting(label, 60), transform=ax.get_yaxis_transform(), fontsize=9, va="center")
    ax.set_ylim(len(atlas.depth) - 0.4, -0.6)
    ax.set_xlim(-0.02, 1.02)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x")
    ax.set_title("Depth centroid of the lost score")
    ax.set_xlabel("0 = first layer, 1 = last")


def band(
    ax: Axes, places: Sequence[int], values: Sequence[Estimate], colour: str, style: tuple[str, str], label: str = ""
) -> None:
    """``values`` over ``places`` with their intervals, in a colour and a style of line and marker."""
    lows, highs = [value.low for value in values], [value.high for value in values]
    ax.fill_between(places, lows, highs, color=colour, alpha=0.25, lw=0)
    heights = [value.value for value in values]
    ax.plot(places, heights, style[0], marker=style[1], color=colour, lw=1.5, ms=4, label=label or None)
    ax.set_xlim(min(places) - 0.5, max(places) + 0.5)


def _mark_dropped(ax: Axes, drop: Sequence[int]) -> None:
    if drop:
        low = ax.get_xaxis_transform()
        ax.plot(list(drop), [-0.05] * len(drop), "^", color=DROPPED, ms=5, transform=low, clip_on=False)
    ax.tick_params(axis="x", pad=7)


def _loss_shade(column: SweepColumn, layer: int) -> float:
    """Share of the score above chance that is lost, or of a token's probability for nats, in 0..1."""
    effect = column.effects[layer]
    if column.higher_is_better:
        if effect.share_kept is None:
            return math.nan
        return min(1.0, max(0.0, 1 - effect.share_kept.value))
    return 1 - math.exp(-max(0.0, effect.change.value))


def _cell_text(column: SweepColumn, layer: int) -> str:
    effect = column.effects[layer]
    if not column.higher_is_better:
        return _short_number(effect.change.value, sign=True)
    return "–" if effect.share_kept is None else f"{100 * effect.share_kept.value:.0f}".replace("-", "−")


def _rank_shades(scores: Sequence[float]) -> list[float]:
    ordered = sorted(scores)
    count = max(1, len(scores) - 1)
    return [(ordered.index(score) + len(ordered) - 1 - ordered[::-1].index(score)) / 2 / count for score in scores]


def _short_number(value: float, *, sign: bool = False) -> str:
    """At most six characters."""
    size = abs(value)
    digits = 3 if size < 1 else 2 if size < 10 else 1 if size < 100 else 0
    text = f"{value:{'+' if sign else ''}.{digits}f}" if 1e-3 <= size < 1e4 or value == 0 else f"{value:.0e}"
    return text.replace("-", "−")


def _name_cells(ax: Axes, columns: Sequence[str], rows: Sequence[str]) -> None:
    ax.set_xticks(range(len(columns)), columns, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    ax.set_yticks(range(len(rows)), rows, fontsize=8)
    ax.tick_params(length=0)
    ax.spines[["left", "bottom"]].set_visible(False)


def fitting(text: str, limit: int = 30) -> str:
    """A name from data as one that fits: lines apart, without control characters, cut where it is long."""
    lines = [clean(line).replace("_", " ").strip() for line in text.split("\n")]
    return "\n".join(line if len(line) <= limit else line[: limit - 1] + "…" for line in lines)
