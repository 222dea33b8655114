"""How plans rank before and after a heal, with what their differences may claim.

What ranks plans is a weighted mean over tasks of the share that is kept of the teacher's score above chance. The
teacher's scores are taken as they were measured: they only set the weights with which the plans' own scores add up, and
all differences between plans are paired by item.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from shoal.artifacts.evaluation import LIKELIHOOD_PROTOCOLS, Evaluation, TaskScore
from shoal.artifacts.search import PERPLEXITY, Column, Correlation, Interval, PlanScore, PlanStanding, Ranking, Standing
from shoal.errors import UserError
from shoal.stats.paired import Retention, no_retention, retention

from ..harness.samples import protocol_of
from .means import Scores, by_task, columns_that_rank, even_weights, summed_change, weighted_sum

Labels = tuple[str, str, str]
"""Task, ability and protocol of a score."""


@dataclass(frozen=True)
class RankedBy:
    """The quantity that plans are ranked by: a weighted sum of scores."""

    unit: Literal["retention", "nats"]
    weights: dict[str, float]
    """Weight by task; all add up to 1."""


def check_columns(tasks: Mapping[str, Any], rank_by: Sequence[str]) -> None:
    """Refuse, before anything is scored, columns that none of the lm-eval ``tasks`` will give.

    Raises:
        UserError: such a column, or, where the recipe does not say what to rank by, no task that writes text.
    """
    described = {name: task.config.metadata or {} for name, task in tasks.items()}
    labels = [
        (name, str(about.get("ability") or name), str(about.get("protocol") or _protocol(tasks[name])))
        for name, about in described.items()
    ]
    columns = {name: about.get("column", "public") for name, about in described.items()}
    labels = [label for label in labels if columns[label[0]] != "disputed"]
    for name in rank_by:
        if columns.get(name) == "disputed":
            raise UserError(f"search.rank_by: {name} asks items on which people do not agree, which rank nothing")
        _tasks_of(name, [*labels, (PERPLEXITY, "language", "rolling")])
    that_rank = columns_that_rank(columns.values())
    ranking = [(name, protocol) for name, _, protocol in labels if columns[name] in that_rank]
    if not rank_by and not any(protocol == "generation" for _, protocol in ranking):
        outside = "" if len(ranking) == len(labels) else ", which are outside the form of training text,"
        raise UserError(
            f"search.tasks: none of {', '.join(name for name, _ in ranking) or 'them'}{outside} writes text, and "
            "likelihood hides what a cut does to that; add one such as retrieval_twin_generation, or say in "
            "search.rank_by what to rank by"
        )


def measure_by(teacher: Evaluation, rank_by: Sequence[str]) -> RankedBy:
    """What ranks plans, once the teacher is known.

    Raises:
        UserError: a column of ``rank_by`` that says nothing here, columns without a unit in common, or nothing left.
    """
    scores = by_task(teacher)
    labels = [(task.task, task.ability, task.protocol) for task in teacher.tasks if task.column != "disputed"]
    if not rank_by:
        return RankedBy("retention", _by_protocol(scores))
    weights: dict[str, float] = {}
    for name in rank_by:
        meant = _tasks_of(name, labels)
        for task in meant:
            weights[task] = weights.get(task, 0.0) + 1 / (len(rank_by) * len(meant))
    silent = {task: no_retention(scores[task]) for task in weights}
    in_nats = [task for task in weights if not scores[task].higher_is_better]
    if in_nats and len(in_nats) < len(weights):
        other = next(task for task in weights if task not in in_nats)
        raise UserError(
            f"search.rank_by: {in_nats[0]} is in {scores[in_nats[0]].metric} and {other} a share above chance, which "
            "have no mean; name columns of one kind"
        )
    units = sorted({scores[task].metric for task in in_nats})
    if len(units) > 1:
        raise UserError(f"search.rank_by: {units[0]} and {units[1]} have no mean; name columns of one unit")
    if single := next((task for task in in_nats if scores[task].n == 1), None):
        raise UserError(
            f"search.rank_by: {single} ranks nothing: a single item says nothing of the spread; ask more "
            "(search.limit, for the perplexity eval.perplexity_tokens), or name another column"
        )
    if not in_nats and any(silent.values()):
        task = next(task for task, reason in silent.items() if reason)
        raise UserError(f"search.rank_by: {task} ranks nothing: {silent[task]}; name another column")
    return RankedBy("nats" if in_nats else "retention", weights)


def rank_plans(
    teacher: Evaluation, plans: Mapping[str, tuple[Evaluation, Evaluation]], *, rank_by: Sequence[str] = ()
) -> Ranking:
    """The ranking of ``plans``, each with its scores before and after the heal.

    Raises:
        UserError: as measure_by does, and scores that were measured with different settings.
    """
    measure = measure_by(teacher, rank_by)
    intact = by_task(teacher)
    before = {name: by_task(pair[0]) for name, pair in plans.items()}
    after = {name: by_task(pair[1]) for name, pair in plans.items()}
    standings = [_standings(measure, intact, scores) for scores in (before, after)]
    order = sorted(plans, key=lambda name: standings[1][name].rank)
    winner_after = order[0]
    winner_before = min(order, key=lambda name: standings[0][name].rank)  # of several the one that is best later
    used = [intact[task] for task in measure.weights]
    return Ranking(
        unit=measure.unit,
        columns=tuple(_column(task, measure, before, after) for task in teacher.tasks),
        plans=tuple(
            PlanStanding(
                name,
                standings[0][name],
                standings[1][name],
                tuple(_plan_score(task, before[name], after[name]) for task in teacher.tasks),
            )
            for name in order
        ),
        agreement={
            "overall": _overall_agreement(standings, lambda standing: standing.value),
            "likelihood": _overall_agreement(standings, lambda standing: standing.likelihood),
            "generation": _overall_agreement(standings, lambda standing: standing.generation),
        },
        num_items=len({(task.ability, item.id) for task in used for item in task.items}),
        winner_before=winner_before,
        winner_after=winner_after,
        difference=_difference(measure, intact, after[winner_before], after[winner_after]),
    )


def correlation(first: Sequence[float], other: Sequence[float]) -> Correlation:
    """Rank correlations of two lists of scores; None where one of them holds a single value only."""
    if len(set(first)) < 2 or len(set(other)) < 2:
        return Correlation(None, None)
    ranks = [stats.rankdata(values) for values in (first, other)]
    tau = float(stats.kendalltau(*ranks).statistic)  # pyright: ignore[reportAttributeAccessIssue]
    return Correlation(tau, float(np.corrcoef(*ranks)[0, 1].clip(-1, 1)))


def _standings(measure: RankedBy, teacher: Scores, plans: Mapping[str, Scores]) -> dict[str, Standing]:
    """Where every plan stands, before or after the heal."""
    values = {name: _value(measure, teacher, scores) for name, scores in plans.items()}
    sign = -1 if measure.unit == "retention" else 1
    best = min(plans, key=lambda name: sign * values[name].value)
    return {
        name: Standing(
            value=values[name],
            rank=1 + sum(sign * other.value < sign * values[name].value for other in values.values()),
            likelihood=_kept(teacher, scores, written=False),
            generation=_kept(teacher, scores, written=True),
            behind=_difference(measure, teacher, plans[best], scores),
        )
        for name, scores in plans.items()
    }


def _value(measure: RankedBy, teacher: Scores, scores: Scores) -> Interval:
    if measure.unit == "nats":
        parts = [scores[task] for task in measure.weights]
        limits = [(score.score, score.ci_low, score.ci_high) for score in parts]
        return weighted_sum(list(measure.weights.values()), limits, np.eye(len(parts)))
    lost = _difference(measure, teacher, teacher, scores)
    return Interval(1 + lost.value, 1 + lost.ci_low, 1 + lost.ci_high)


def _kept(teacher: Scores, scores: Scores, *, written: bool) -> Interval | None:
    """The mean share kept of generated text or of likelihood, each column the same; None where no such task ranks."""
    tasks = [task for task in _that_rank(teacher) if _is_written(task) == written]
    return _value(RankedBy("retention", even_weights(tasks, _column_of)), teacher, scores) if tasks else None


def _difference(measure: RankedBy, teacher: Scores, before: Scores, after: Scores) -> Interval:
    """The value of ``after`` less that of ``before``, paired by item."""
    return summed_change({task: _scale(measure, teacher[task]) for task in measure.weights}, before, after)


def _scale(measure: RankedBy, teacher: TaskScore) -> float:
    weight = measure.weights[teacher.task]
    return weight / (teacher.score - teacher.chance) if measure.unit == "retention" else weight


def _column(task: TaskScore, measure: RankedBy, before: Mapping[str, Scores], after: Mapping[str, Scores]) -> Column:
    values = [[round(scores[task.task].score, 12) for scores in plans.values()] for plans in (before, after)]
    return Column(
        task=task.task,
        ability=task.ability,
        protocol=task.protocol,
        metric=task.metric,
        n=task.n,
        chance=task.chance,
        higher_is_better=task.higher_is_better,
        teacher=Interval(task.score, task.ci_low, task.ci_high),
        weight=measure.weights.get(task.task, 0.0),
        no_retention=no_retention(task),
        agreement=correlation(*values),
        column=task.column,
    )


def _plan_score(teacher: TaskScore, before: Scores, after: Scores) -> PlanScore:
    scores = [before[teacher.task], after[teacher.task]]
    intervals = [Interval(score.score, score.ci_low, score.ci_high) for score in scores]
    return PlanScore(teacher.task, *intervals, *(_share(retention(teacher, score)) for score in scores))


def _share(kept: Retention) -> Interval | None:
    if kept.value is None or kept.ci_low is None or kept.ci_high is None:
        return None
    return Interval(kept.value, kept.ci_low, kept.ci_high)


def _overall_agreement(
    standings: Sequence[Mapping[str, Standing]], of: Callable[[Standing], Interval | None]
) -> Correlation:
    values = [[of(standing) for standing in of_plans.values()] for of_plans in standings]
    before, after = ([estimate.value for estimate in side if estimate is not None] for side in values)
    return correlation(before, after)


def _by_protocol(scores: Scores) -> dict[str, float]:
    """Columns count the same, in each likelihood and generated text half each, whatever the number of their tasks."""
    usable = _that_rank(scores)
    if not usable:
        raise UserError(
            "search.tasks: the teacher is above chance on none of them, so they rank nothing; name others, or rank by "
            f"text alone with search.rank_by: [{PERPLEXITY}]"
        )
    return even_weights(usable, _column_of, _is_written)


def _that_rank(teacher: Scores) -> list[TaskScore]:
    """The tasks of which a share can be kept, outside the form of training text where there are such."""
    protocols = (*LIKELIHOOD_PROTOCOLS, "generation")
    usable = [task for task in teacher.values() if not no_retention(task) and task.protocol in protocols]
    columns = columns_that_rank(task.column for task in usable)
    return [task for task in usable if task.column in columns]


def _is_written(task: TaskScore) -> bool:
    return task.protocol == "generation"


def _column_of(task: TaskScore) -> str:
    return task.column


def _tasks_of(name: str, labels: Sequence[Labels]) -> list[str]:
    """The tasks that ``name`` means: a task's own name goes before an ability, or `ability/protocol`."""
    exact = [task for task, *_ in labels if task == name]
    meant = exact or [task for task, ability, protocol in labels if name in (ability, f"{ability}/{protocol}")]
    if not meant:
        known = dict.fromkeys(label for task, ability, protocol in labels for label in (task, f"{ability}/{protocol}"))
        raise UserError(f"search.rank_by: no task gives {name!r}; there is {', '.join(known)}")
    return meant


def _protocol(task: Any) -> str:
    return protocol_of(task, [{"doc": task.eval_docs[0]}])
