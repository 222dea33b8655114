"""What models that descend from each other use their layers for: a curve per model, over the teacher's numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal.artifacts.depth import DepthUse, TaskUse
from shoal.figures.style import FAINT, INK, ROLE_STYLE, clean, figure_style, heading, legend_above, panels
from shoal.task_words import task_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_TASKS = 6
"""Tasks that are drawn; depth_use.json holds all."""
OTHER = ("#0f9d75", "^")
"""Colour and marker of a model beside the teacher."""


def depth_use_figure(use: DepthUse) -> Figure:
    """One panel per task: what is left without each layer, with 95 % intervals, and the centroids above the curves."""
    tasks = use.tasks[:MAX_TASKS]
    figure, axes = panels([2.1] * len(tasks))
    with figure_style():
        for ax, task in zip(axes, tasks, strict=True):
            _draw(ax, use, task)
        axes[-1].set_xlabel("layer, by the teacher's numbers")
        legend_above(figure, axes)
    return figure


def _draw(ax: Axes, use: DepthUse, task: TaskUse) -> None:
    told = {role: own for role, own in task.roles.items() if own.left}
    for role, own in told.items():
        colour, marker = ROLE_STYLE.get(role, OTHER)
        layers = use.kept[role]
        ax.plot(layers, [left.value for left in own.left], color=colour, marker=marker, ms=4, lw=1.3, label=clean(role))
        ax.fill_between(
            layers, [left.low for left in own.left], [left.high for left in own.left], color=colour, alpha=0.15, lw=0
        )
        if own.centroid is not None:
            place = own.centroid.value * (use.num_layers - 1)
            ax.plot([place], [1.04], marker, color=colour, ms=7, transform=ax.get_xaxis_transform(), clip_on=False)
    if told:
        ax.axhline(1.0 if task.higher_is_better else 0.0, color=FAINT, lw=1)
    else:
        ax.text(0.5, 0.5, next(iter(task.roles.values())).reason, transform=ax.transAxes, ha="center", color=INK)
    quantity = "share left" if task.higher_is_better else f"{task.metric} added"
    words = task_words(task.task, ability=task.ability, protocol=task.protocol, metric=task.metric)
    ax.set_title(f"{heading(', '.join(words))}: {quantity.replace('_', ' ')} (n = {task.n})", pad=12)
    ax.grid(axis="y")
