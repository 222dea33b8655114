"""Scores with their intervals: before and after, one panel per ability, and against the level of a task's family."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shoal.artifacts.evaluation import Scores, TaskScore
from shoal.figures.style import INK, ROLE_STYLE, clean, figure_style, heading, legend_above, panels, short
from shoal.task_words import COLUMNS, PROTOCOLS, task_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_TASKS = 30
"""In the figure of scores, which would grow without end."""


def before_after_figure(evaluations: Sequence[Scores]) -> Figure:
    """Scores with 95 % intervals for each role, one panel per ability, chance as a dashed tick; MAX_TASKS at most.

    In each panel reworded tasks stand first and the trained wording last: a learnt wording is not a recovered ability.
    """
    keys = list(dict.fromkeys(task.key for evaluation in evaluations for task in evaluation.tasks))
    by_ability: dict[tuple[str, str], list[TaskScore]] = {}
    tasks = [next(t for e in evaluations for t in e.tasks if t.key == key) for key in keys]
    for task in sorted(tasks, key=lambda task: [*COLUMNS, ""].index(task.column))[:MAX_TASKS]:
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
    evaluations: Sequence[Scores],
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


@dataclass(frozen=True)
class Ladder:
    """One family of tasks under one protocol: every role's scores, by rising level."""

    family: str
    protocol: str
    metric: str
    scores: dict[str, tuple[TaskScore, ...]]
    """Scores by role; all roles were scored at the same levels."""

    @property
    def levels(self) -> tuple[float, ...]:
        return tuple(score.level or 0.0 for score in next(iter(self.scores.values())))


def ladders(evaluations: Sequence[Scores]) -> tuple[Ladder, ...]:
    """Every family that was scored at two levels or more, at the levels that all roles share."""
    tasks = {e.role: [task for task in e.tasks if task.level is not None] for e in evaluations}
    keys = dict.fromkeys((t.family, t.protocol, t.metric) for own in tasks.values() for t in own if t.family)
    families = []
    for key in keys:
        by_role = {
            role: {t.level: t for t in own if (t.family, t.protocol, t.metric) == key and t.level is not None}
            for role, own in tasks.items()
        }
        by_role = {role: scores for role, scores in by_role.items() if scores}
        shared = sorted(set.intersection(*(set(scores) for scores in by_role.values())))
        if len(shared) > 1:
            scores = {role: tuple(own[level] for level in shared) for role, own in by_role.items()}
            families.append(Ladder(str(key[0]), key[1], key[2], scores))
    return tuple(families)


def level_figure(families: Sequence[Ladder]) -> Figure:
    """One panel per family and protocol: score with its 95 % interval against the level, chance dashed."""
    figure, axes = panels([2.3] * len(families))
    with figure_style():
        for ax, ladder in zip(axes, families, strict=True):
            _draw_ladder(ax, ladder)
        legend_above(figure, axes)
    return figure


def _draw_ladder(ax: Axes, ladder: Ladder) -> None:
    levels, count = ladder.levels, len(ladder.scores)
    step = min(after - before for before, after in itertools.pairwise(levels))
    for position, (role, scores) in enumerate(ladder.scores.items()):
        colour, marker = ROLE_STYLE.get(role, (INK, "D"))
        places = [level + 0.06 * step * (position - (count - 1) / 2) for level in levels]
        ax.plot(places, [score.score for score in scores], color=colour, marker=marker, ms=6, lw=1.6, label=clean(role))
        for place, score in zip(places, scores, strict=True):
            ax.plot([place, place], [score.ci_low, score.ci_high], color=colour, lw=2, alpha=0.6)
    first = next(iter(ladder.scores.values()))
    if first[0].higher_is_better:
        ax.plot(levels, [score.chance for score in first], color=INK, lw=1.2, ls=(0, (3, 2)), label="chance")
        if all(score.ci_low >= 0 and score.ci_high <= 1 for own in ladder.scores.values() for score in own):
            ax.set_ylim(-0.03, 1.03)
    ax.set_xticks(levels, [f"{level:g}" for level in levels])
    ax.set_xlabel("level")
    ax.set_ylabel(clean(ladder.metric).replace("_", " "))
    ax.grid(axis="y")
    title = f"{clean(ladder.family).replace('_', ' ')} · {PROTOCOLS.get(ladder.protocol, ladder.protocol)}"
    ax.set_title(title[:1].upper() + title[1:], weight="bold")
