"""Scores before and after, with their intervals, one panel per ability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from shoal.artifacts.evaluation import Evaluation, TaskScore
from shoal.errors import UserError
from shoal.figures.style import INK, ROLE_STYLE, clean, figure_style, heading, legend_above, panels, short
from shoal.task_words import COLUMNS, task_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_TASKS = 30
"""In the figure of scores, which would grow without end."""
COLUMN_ORDER = (*COLUMNS, "")


def before_after_figure(evaluations: Sequence[Evaluation]) -> Figure:
    """Scores with 95 % intervals for each role, one panel per ability, chance as a dashed tick; MAX_TASKS at most.

    In each panel twins stand first and the trained form last: what is learnt of a form is no ability regained.

    Raises:
        UserError: no role has a task.
    """
    keys = list(dict.fromkeys(task.key for evaluation in evaluations for task in evaluation.tasks))
    if not keys:
        raise UserError("eval: no evaluated task to draw; name some in eval.tasks")
    by_ability: dict[tuple[str, str], list[TaskScore]] = {}
    tasks = [next(t for e in evaluations for t in e.tasks if t.key == key) for key in keys]
    for task in sorted(tasks, key=lambda task: COLUMN_ORDER.index(task.column))[:MAX_TASKS]:
        by_ability.setdefault((task.ability, "" if task.higher_is_better else task.metric), []).append(task)
    ordered = sorted(by_ability.items(), key=lambda item: bool(item[0][1]))
    figure, axes = panels([0.75 + 0.62 * len(rows) for _, rows in ordered])
    with figure_style():
        for ax, ((ability, unit), rows) in zip(axes, ordered, strict=True):
            _draw_ability(ax, ability, unit, [task.key for task in rows], evaluations)
        legend_above(figure, axes)
    return figure


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
            y = row + 0.1 + min(0.2, 0.45 / max(1, count - 1)) * (position - (count - 1) / 2)
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
        ax.set_title(short(heading(ability)), weight="bold")
    else:
        ax.set_title(
            short(f"{heading(ability)}: {lower_is_better_unit.replace('_', ' ')}, lower is better"), weight="bold"
        )


def _row_label(task: TaskScore) -> str:
    """The task in words, without the ability that stands above its panel."""
    first, *others = task_words(task.task, ability=task.ability, protocol=task.protocol, metric=task.metric)
    words = others if others and first == task.ability else [first, *others]
    return ", ".join([*words, *([COLUMNS["in"]] if task.column == "in" else [])])
