"""The ranking of models: shares kept by column, the mean that ranks, the wording gap, and the effects of a control.

Means are over shares kept of the teacher's score above chance, in which tasks of any metric are of one unit; each
column counts the same. A model recovers in the trained wording first, so only reworded questions, abilities
that no text trains and public benchmarks rank. If there are none of these, everything ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shoal.artifacts.evaluation import Interval, Scores, TaskScore
from shoal.stats.means import TaskScores, correlations, mean_change, weighted_sum
from shoal.stats.paired import share_items, wording_gap, wording_influences
from shoal.task_words import COLUMNS, OUTSIDE, PROTOCOLS

from .compare import Cell, Model, RunComparison, teacher_of

CONTROLLED = {"learnt from the text": ("teacher", "control"), "still lost": ("control", "distilled")}
"""Effect that a control shows -> roles before and after."""


@dataclass(frozen=True)
class Groups:
    """The tasks on which the teacher is clear of chance, as means are taken over them."""

    tasks: dict[str, tuple[TaskScore, ...]]
    """Title -> tasks: a group for every column, or for every ability and protocol where no column is recorded."""
    that_rank: tuple[str, ...]
    """Titles of the groups whose mean ranks."""

    @property
    def columns(self) -> set[str]:
        """Columns of the tasks that rank."""
        return {task.column for title in self.that_rank for task in self.tasks[title]}

    @property
    def outside(self) -> bool:
        """Whether the tasks that rank are outside the trained wording."""
        return self.columns <= set(OUTSIDE)

    @property
    def weights(self) -> dict[str, float]:
        """Weight by task in the mean that ranks: groups count the same, and in each its tasks."""
        groups = [self.tasks[title] for title in self.that_rank]
        return {task: weight / len(groups) for own in groups for task, weight in even_weights(own).items()}


@dataclass(frozen=True)
class Standing:
    """What one model keeps."""

    model: Model
    mean: Interval | None
    """Mean over the groups that rank; None = on one of their tasks there is no share to keep."""
    against: Interval | None
    """That mean less the first run's for the same role, over the same items; None = nothing to compare with."""
    kept: dict[str, Interval | None]
    """Mean over the tasks of each group."""
    form: Interval | None
    """Score in the trained wording minus score when reworded, mean over the reworded tasks; None if there are none."""


def task_groups(comparison: RunComparison) -> Groups:
    """The groups of a table's tasks, those that rank first."""
    usable = [task for task in comparison.tasks if task.higher_is_better and task.task not in comparison.silent]
    columns = {task.column for task in usable}
    ranking = columns & set(OUTSIDE) or columns
    tasks: dict[str, tuple[TaskScore, ...]] = {}
    for task in usable:
        tasks[group_title(task)] = (*tasks.get(group_title(task), ()), task)
    return Groups(tasks, tuple(title for title, own in tasks.items() if own[0].column in ranking))


def group_title(task: TaskScore) -> str:
    """`Reworded questions`; `Retrieval, generated` where the column is not recorded."""
    own = f"{task.ability}, {PROTOCOLS.get(task.protocol, task.protocol)}"
    title = COLUMNS.get(task.column, own)
    return title[:1].upper() + title[1:]


def standings(comparison: RunComparison, groups: Groups) -> list[Standing]:
    """The teachers, then every other model, those that keep the most first."""
    per_model = [_standing(comparison, model, groups) for model in comparison.models if model.role != "control"]
    return sorted(
        per_model,
        key=lambda standing: (standing.model.role != "teacher", -standing.mean.value if standing.mean else np.inf),
    )


def controls(comparison: RunComparison, groups: Groups) -> dict[tuple[str, str], dict[str, Interval | None]]:
    """(letter, what its control tells) -> change of the share kept by group, of the runs that have a control."""
    told: dict[tuple[str, str], dict[str, Interval | None]] = {}
    for contender in comparison.contenders:
        evaluations = contender.run.evaluations | {"teacher": teacher_of(contender, comparison.contenders)}
        scores = {role: by_task(evaluation) for role, evaluation in evaluations.items() if evaluation}
        for effect, (before, after) in CONTROLLED.items():
            if {"control", "teacher", before, after} <= scores.keys():
                told[contender.letter, effect] = {
                    title: mean_change(scores["teacher"], scores[before], scores[after], even_weights(tasks))
                    for title, tasks in groups.tasks.items()
                }
    return told


def mean_kept(cells: Sequence[Cell], weights: Mapping[str, float]) -> Interval | None:
    """The mean share kept by ``weights`` of tasks, with the interval that theirs add up to; None where one has none."""
    cells = [cell for cell in cells if cell.score.task in weights]
    kept = [cell.kept for cell in cells if cell.kept is not None and cell.kept.value is not None]
    if not cells or len(kept) < len(cells):
        return None
    limits = np.array(
        [(retention.value, retention.ci_low, retention.ci_high) for retention in kept], dtype=np.float64
    ).tolist()
    together = correlations([cell.score for cell in cells], [cell.influences for cell in cells])
    return weighted_sum([weights[cell.score.task] for cell in cells], limits, together)


def _standing(comparison: RunComparison, model: Model, groups: Groups) -> Standing:
    scores, against, first = by_task(model.evaluation), None, comparison.contenders[0]
    teacher, of_first = (teacher_of(own, comparison.contenders) for own in (model.contender, first))
    same = teacher and of_first and teacher.provenance.inputs.get("model") == of_first.provenance.inputs.get("model")
    if teacher and same and model.rival and any(cell.difference for cell in model.cells):
        before = by_task(first.run.evaluations[model.rival])
        against = mean_change(by_task(teacher), before, scores, groups.weights)
    kept = {title: mean_kept(model.cells, even_weights(tasks)) for title, tasks in groups.tasks.items()}
    return Standing(model, mean_kept(model.cells, groups.weights), against, kept, mean_wording_gap(scores, groups))


def mean_wording_gap(scores: TaskScores, groups: Groups) -> Interval | None:
    """The mean wording gap over the reworded tasks of ``groups``; None where there are none."""
    usable = {task.task: task for tasks in groups.tasks.values() for task in tasks}
    reworded = [scores[name] for name, task in usable.items() if task.reworded_of in usable]
    reworded = [score for score in reworded if share_items(scores[score.reworded_of], score)]
    pairs = [(scores[score.reworded_of], score) for score in reworded]
    gaps = [wording_gap(*pair) for pair in pairs]
    if not gaps:
        return None
    limits = [(gap.difference, gap.ci_low, gap.ci_high) for gap in gaps]
    together = correlations(reworded, [wording_influences(*pair) for pair in pairs])
    return weighted_sum([1 / len(gaps)] * len(gaps), limits, together)


def by_task(evaluation: Scores) -> TaskScores:
    """The scores of an evaluation by task name."""
    return {task.task: task for task in evaluation.tasks}


def even_weights(tasks: Sequence[TaskScore]) -> dict[str, float]:
    """Weight by task, 1 in all."""
    return {task.task: 1 / len(tasks) for task in tasks}
