"""The curves of a training: losses, held-out text and tasks scored on the way, learning rate."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from shoal.artifacts.training import Training
from shoal.figures.style import FAINT, SERIES_COLOURS, figure_style, heading, panels, short
from shoal.recipe.losses import KINDS
from shoal.task_words import task_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = tuple[list[float], list[float]]
"""Steps and values of a curve."""
WATCHED, HELD_OUT = "watch/", "perplexity"
"""Prefix of the scores on the way in a training's history, and the one of them that is in nats."""


def training_figure(training: Training) -> Figure:
    """Training loss with each of its terms, what was scored on the way, and the learning rate, all by step."""
    series = loss_series(training)
    watched = watched_series(training)
    held_out = {name: watched.pop(name) for name in (HELD_OUT,) if name in watched}
    rate = _points(training, "learning_rate")
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


def loss_series(training: Training) -> dict[str, Points]:
    """Name -> steps and finite values of the total loss and of every loss term in the history."""
    names = dict.fromkeys(name for row in training.history for name in row)
    wanted = [name for name in names if name == "loss" or any(kind in name for kind in KINDS)]
    series = {name: _points(training, name) for name in wanted}
    return {name: points for name, points in series.items() if points[0]}


def watched_series(training: Training) -> dict[str, Points]:
    """Name -> steps and values of everything that was scored while training: held-out text and tasks."""
    names = dict.fromkeys(name for row in training.history for name in row if name.startswith(WATCHED))
    series = {name.removeprefix(WATCHED): _points(training, name) for name in names}
    return {name: points for name, points in series.items() if points[0]}


def _draw_losses(ax: Axes, series: dict[str, Points]) -> None:
    names = [name for name in series if name != "loss"]
    if "loss" in series and len(names) != 1:  # with one term the total says the same twice, unless weighted
        names.insert(0, "loss")
    for index, name in enumerate(names):
        steps, values = series[name]
        style = ("-", "--", "-.", ":")[index % 4]
        marker = "o" if len(steps) < 3 else ""
        ax.plot(steps, values, style, color=SERIES_COLOURS[index % 5], marker=marker, lw=1.6, label=heading(name))
    ax.set_title("Training loss, nats per token")
    ax.grid(axis="y")
    ax.legend(loc="upper right")


def _draw_curves(ax: Axes, series: dict[str, Points], title: str) -> None:
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


def _points(training: Training, name: str) -> Points:
    points = [(row["step"], row[name]) for row in training.history if name in row and "step" in row]
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    return [step for step, _ in finite], [value for _, value in finite]
