"""The figures of a run: what layers are worth, how training went, what was lost and came back.

Colours keep a contrast of 3:1 or more on white and on near-black and differ for every common kind of colour blindness;
marks differ in shape too, so that nothing is said by colour alone. Text stays text in SVG; equal input, equal bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.artifacts.artifact import Evaluation, Importance, TaskScore, Training
from shoal.atomic_files import written_file
from shoal.errors import UserError
from shoal.recipe.losses import KINDS
from shoal.task_words import task_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1f2430"
"""Text and axes; becomes the reader's own text colour in inline SVG."""
FAINT = "#8a919e"
ROLE_STYLE = {"teacher": ("#7d8590", "s"), "pruned": ("#d55e00", "v"), "distilled": ("#1f86c8", "o")}
"""Role -> colour and marker."""
SERIES_COLOURS = ("#1f86c8", "#d55e00", "#0f9d75", "#b4699a", "#b08900")
KEPT, DROPPED = "#1f86c8", "#d55e00"
MAX_TASKS = 30
"""In the figure of scores, which would grow without end."""
WATCHED, HELD_OUT = "watch/", "perplexity"
"""Prefix of what training's history says of scores on the way, and which of them is in nats."""
WIDTH_INCHES = 5.2
"""A phone shows this width nearly unscaled, so that the text below stays readable."""
STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial", "sans-serif"],
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.labelsize": 11,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": FAINT,
    "grid.alpha": 0.35,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "shoal",
    "savefig.dpi": 200,
}
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def clean(text: str) -> str:
    """Text without the characters that neither XML nor UTF-8 can carry; each becomes the replacement mark."""
    return _CONTROL.sub("\ufffd", text)


def short(text: str, limit: int = 52) -> str:
    """``text`` in one line of at most ``limit`` characters."""
    text = " ".join(clean(text).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def importance_figure(importance: Importance, drop: Sequence[int] = ()) -> Figure:
    """One panel of bars per layer metric and one heat map (start by length) per run metric, the dropped layers marked.

    Raises:
        UserError: the artifact holds no metric, or a dropped layer is none of its layers.
    """
    if not importance.layers and not importance.runs:
        raise UserError("importance.json: holds no metric to draw; run `shoal measure` again")
    refuse_foreign(drop, importance.num_layers)
    heights = [1.9] * len(importance.layers) + [3.6] * len(importance.runs)
    figure, axes = panels(heights)
    with figure_style():
        for ax, (metric, scores) in zip(axes, importance.layers.items(), strict=False):
            _draw_layers(ax, metric, scores, drop)
        for ax, (metric, rows) in zip(axes[len(importance.layers) :], importance.runs.items(), strict=True):
            _draw_runs(figure, ax, metric, rows, drop)
    return figure


def refuse_foreign(drop: Sequence[int], num_layers: int) -> None:
    """Refuse dropped layers that are none of the ``num_layers`` that importance.json speaks of.

    Raises:
        UserError: there is one.
    """
    outside = [layer for layer in drop if not 0 <= layer < num_layers]
    if outside:
        raise UserError(
            f"importance.json: has {num_layers} layers, so layer {outside[0]} cannot be dropped; run `shoal measure` "
            "again for this model"
        )


def training_figure(training: Training) -> Figure:
    """Training loss with each of its terms, what was scored on the way, and the learning rate, all by optimizer step.

    Raises:
        UserError: the history holds no loss.
    """
    series = loss_series(training)
    if not series:
        raise UserError("distill.json: its history holds no loss to draw; run `shoal distill` again")
    watched = watched_series(training)
    held_out = {name: watched.pop(name) for name in (HELD_OUT,) if name in watched}
    rate = _series(training, "learning_rate")
    parts = [(2.8, series), *((2.2, part) for part in (held_out, watched) if part), *([(1.5, rate)] if rate[0] else [])]
    figure, axes = panels([height for height, _ in parts])
    with figure_style():
        places = iter(axes)
        _draw_losses(next(places), series)
        if held_out:
            _draw_curves(next(places), held_out, "Held-out text while training, nats per token")
        if watched:
            _draw_curves(next(places), watched, "Tasks while training, score")
        if rate[0]:
            ax = next(places)
            ax.plot(*rate, color=FAINT, marker="." if len(rate[0]) < 3 else "")
            ax.set_title("Learning rate")
            ax.set_ylim(bottom=0)
            ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
            ax.grid(axis="y")
        axes[-1].set_xlabel("optimizer step")
    return figure


def before_after_figure(evaluations: Sequence[Evaluation]) -> Figure:
    """Scores with 95 % intervals for each role, one panel per ability, chance as a dashed tick; MAX_TASKS at most.

    Raises:
        UserError: no role has a task.
    """
    keys = list(dict.fromkeys(task.key for evaluation in evaluations for task in evaluation.tasks))
    if not keys:
        raise UserError("eval: no evaluated task to draw; name some in eval.tasks")
    by_ability: dict[tuple[str, str], list[tuple[str, str, str]]] = {}
    for key in keys[:MAX_TASKS]:
        task = next(t for e in evaluations for t in e.tasks if t.key == key)
        by_ability.setdefault((task.ability, "" if task.higher_is_better else task.metric), []).append(key)
    ordered = sorted(by_ability.items(), key=lambda item: bool(item[0][1]))
    figure, axes = panels([0.75 + 0.62 * len(rows) for _, rows in ordered])
    with figure_style():
        for ax, ((ability, unit), rows) in zip(axes, ordered, strict=True):
            _draw_ability(ax, ability, unit, rows, evaluations)
        handles = {label: line for ax in axes for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        if "chance" in handles:
            handles["chance"] = handles.pop("chance")
        figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=len(handles), columnspacing=1.2)
    return figure


def loss_series(training: Training) -> dict[str, tuple[list[float], list[float]]]:
    """Name -> steps and finite values of the total loss and of every loss term in the history."""
    names = dict.fromkeys(name for row in training.history for name in row)
    wanted = [name for name in names if name == "loss" or any(kind in name for kind in KINDS)]
    series = {name: _series(training, name) for name in wanted}
    return {name: points for name, points in series.items() if points[0]}


def watched_series(training: Training) -> dict[str, tuple[list[float], list[float]]]:
    """Name -> steps and values of everything that was scored while training: held-out text and tasks."""
    names = dict.fromkeys(name for row in training.history for name in row if name.startswith(WATCHED))
    series = {name.removeprefix(WATCHED): _series(training, name) for name in names}
    return {name: points for name, points in series.items() if points[0]}


def save_figure(figure: Figure, path: Path) -> bytes:
    """Write the figure as SVG or PNG (by suffix) on white; readers see the old or the new file, never half.

    Gives what was written, so that nobody has to draw it again for a page.

    Raises:
        UserError: another suffix, or a full or read-only disk.
    """
    suffix = path.suffix.lower()
    if suffix not in (".svg", ".png"):
        raise UserError(f"{path}: figures are written as .svg or .png; choose one of these suffixes")
    content = _rendered(figure, suffix[1:])
    with written_file(path) as temporary:
        temporary.write_bytes(content)
    return content


def inline_svg(svg: bytes, name: str, *, title: str, description: str) -> str:
    """An SVG file of save_figure as an <svg> element for a page: transparent, in the page's text colour, described.

    Matplotlib numbers ids from one in every figure, so all ids get ``name`` in front: several figures share one page.
    """
    markup = svg.decode()
    markup = markup[markup.index("<svg") :]
    markup, num_backgrounds = re.subn(
        r'(<g id="patch_1">\s*<path [^>]*style="fill: )#ffffff', r"\g<1>none", markup, count=1
    )
    assert num_backgrounds == 1
    markup = re.sub(r'\bid="', f'id="{name}-', markup)
    markup = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", markup)
    markup = markup.replace(INK, "currentColor")
    # Matplotlib's style sheet says `*`, which would reach out of the picture into the page.
    markup = re.sub(r"<style.*?</style>", "", markup, flags=re.DOTALL)
    opening, rest = markup.split(">", 1)
    view = re.search(r'viewBox="[^"]+"', opening)
    assert view is not None
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    label = f'role="img" aria-labelledby="{name}-title {name}-desc"'
    heading = f'<title id="{name}-title">{escape(clean(title))}</title>'
    body = f'<desc id="{name}-desc">{escape(clean(description))}</desc>{rest}'
    return f'<svg {spaces} {view.group()} stroke-linejoin="round" {label}>{heading}{body}'


def _rendered(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type")) if kind == "svg" else {"Software": None}
    with figure_style():
        figure.savefig(buffer, format=kind, facecolor="white", metadata=metadata)
    return buffer.getvalue()


def figure_style() -> Any:
    """A context in which figures are made and drawn as all of ours."""
    import matplotlib

    return matplotlib.rc_context(STYLE)  # pyright: ignore[reportArgumentType]


def panels(heights: Sequence[float], *, width: float = WIDTH_INCHES) -> tuple[Figure, list[Axes]]:
    """A figure of stacked panels, made without pyplot: no display, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with figure_style():
        figure = Figure(figsize=(width, sum(heights) + 0.4), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)
    return figure, list(grid[:, 0])


def _draw_layers(ax: Axes, metric: str, scores: Sequence[float], drop: Sequence[int]) -> None:
    dropped = set(drop)
    for layer, score in enumerate(scores):
        out = layer in dropped
        ax.bar(
            layer, score, width=0.72, color=DROPPED if out else KEPT, hatch="////" if out else None, ec="white", lw=0
        )
    if drop:
        # A tick under the axis shows dropped layers even where the score is too small for a visible bar.
        low = ax.get_xaxis_transform()
        ax.plot(list(drop), [-0.045] * len(drop), "^", color=DROPPED, ms=5, transform=low, clip_on=False)
        ax.text(1, 1.0, "▨ dropped", color=DROPPED, transform=ax.transAxes, ha="right", va="bottom", fontsize=10)
    ax.tick_params(axis="x", pad=7)
    ax.set_title(_words(metric))
    ax.set_xlabel("layer")
    ax.set_ylabel("importance")
    ax.set_xlim(-0.8, len(scores) - 0.2)
    ax.grid(axis="y")
    ax.set_axisbelow(True)
    if scores and max(scores) > 12 * sorted(scores)[len(scores) // 2] > 0 and min(scores) > 0:
        ax.set_yscale("log")  # one outlying layer would flatten all others


def _draw_runs(figure: Figure, ax: Axes, metric: str, rows: Sequence[Sequence[float]], drop: Sequence[int]) -> None:
    import numpy as np
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
    bar = figure.colorbar(image, ax=ax, label="importance of the run", pad=0.02)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    if drop and list(drop) == list(range(drop[0], drop[-1] + 1)) and len(drop) <= len(rows):
        ax.add_patch(Rectangle((drop[0] - 0.5, len(drop) - 0.5), 1, 1, fill=False, ec=DROPPED, lw=2.5))
        ax.annotate(
            "the cut",
            (drop[0], len(drop)),
            xytext=(0.97, 0.95),
            textcoords="axes fraction",
            ha="right",
            va="top",
            color=DROPPED,
            arrowprops={"arrowstyle": "-", "color": DROPPED},
        )
    ax.set_title(_words(metric))
    ax.set_xlabel("first layer of the run")
    ax.set_ylabel("layers in the run")


def _draw_losses(ax: Axes, series: dict[str, tuple[list[float], list[float]]]) -> None:
    names = [name for name in series if name != "loss"]
    if "loss" in series and len(names) != 1:  # with one term the total says the same twice, unless weighted
        names.insert(0, "loss")
    for index, name in enumerate(names):
        steps, values = series[name]
        style = ("-", "--", "-.", ":")[index % 4]
        marker = "o" if len(steps) < 3 else ""
        ax.plot(steps, values, style, color=SERIES_COLOURS[index % 5], marker=marker, lw=1.6, label=_words(name))
    ax.set_title("Training loss, nats per token")
    ax.grid(axis="y")
    ax.legend(loc="upper right")


def _draw_curves(ax: Axes, series: dict[str, tuple[list[float], list[float]]], title: str) -> None:
    for index, (name, (steps, values)) in enumerate(series.items()):
        style = ("-", "--", "-.", ":")[index % 4]
        label = ", ".join(task_words(name))
        ax.plot(
            steps, values, style, color=SERIES_COLOURS[index % 5], marker="osv^D"[index % 5], ms=4, label=short(label)
        )
    ax.set_title(title)
    ax.grid(axis="y")
    if len(series) > 1:
        ax.legend(loc="best", fontsize=9)
    if all(0 <= value <= 1 for _, values in series.values() for value in values):
        ax.set_ylim(-0.03, 1.03)


def _draw_ability(
    ax: Axes,
    ability: str,
    lower_is_better_unit: str,
    keys: Sequence[tuple[str, str, str]],
    evaluations: Sequence[Evaluation],
) -> None:
    count, higher = len(evaluations), not lower_is_better_unit
    for row, key in enumerate(keys):
        label = ""
        for position, evaluation in enumerate(evaluations):
            task = next((task for task in evaluation.tasks if task.key == key), None)
            if task is None:
                continue
            label = label or _row_label(task)
            colour, marker = ROLE_STYLE.get(evaluation.role, (INK, "D"))
            y = row + 0.1 + 0.2 * (position - (count - 1) / 2)
            ax.plot([task.ci_low, task.ci_high], [y, y], color=colour, lw=2, alpha=0.75, solid_capstyle="round")
            ax.plot([task.score], [y], marker, color=colour, ms=6, label=clean(evaluation.role), ls="")
            if higher and position == 0:
                line = ([task.chance] * 2, [row - 0.14, row + 0.42])
                ax.plot(*line, color=INK, lw=1.2, ls=(0, (3, 2)), label="chance")
        ax.text(0, row - 0.3, short(label), transform=ax.get_yaxis_transform(), fontsize=10, va="center")
    ax.set_ylim(len(keys) - 0.45, -0.55)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x")
    if higher:
        low, high = ax.get_xlim()
        if low > -0.5 and high < 1.5:  # shares; other scores keep the range of their data
            ax.set_xlim(-0.02, 1.02)
        ax.set_title(short(_words(ability)), weight="bold")
    else:
        ax.set_title(
            short(f"{_words(ability)}: {lower_is_better_unit.replace('_', ' ')}, lower is better"), weight="bold"
        )


def _row_label(task: TaskScore) -> str:
    """The task in words, without the ability that stands above its panel."""
    first, *others = task_words(task.task, ability=task.ability, protocol=task.protocol, metric=task.metric)
    return ", ".join(others if others and first == task.ability else (first, *others))


def _series(training: Training, name: str) -> tuple[list[float], list[float]]:
    points = [(row["step"], row[name]) for row in training.history if name in row and "step" in row]
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    return [step for step, _ in finite], [value for _, value in finite]


def _words(name: str) -> str:
    text = clean(name).replace("_", " ").strip()
    return text[:1].upper() + text[1:]
