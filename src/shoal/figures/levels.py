"""Score against level: how many steps, pairs or digits a model still masters, before and after."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shoal.artifacts.evaluation import Evaluation, TaskScore
from shoal.errors import UserError
from shoal.figures.style import INK, ROLE_STYLE, clean, figure_style, legend_above, panels
from shoal.task_words import PROTOCOLS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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


def ladders(evaluations: Sequence[Evaluation]) -> tuple[Ladder, ...]:
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
    """One panel per family and protocol: score with its 95 % interval against the level, chance dashed.

    Raises:
        UserError: there is none.
    """
    if not families:
        raise UserError("eval: no family of tasks was scored at several levels; name them in eval.tasks")
    figure, axes = panels([2.3] * len(families))
    with figure_style():
        for ax, ladder in zip(axes, families, strict=True):
            _draw(ax, ladder)
        legend_above(figure, axes)
    return figure


def _draw(ax: Axes, ladder: Ladder) -> None:
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
