"""What may be concluded from a run's scores: every task with paired differences, protocol and wording gaps, rates.

Only numbers here; how they are worded and shown is for wording.py, tables.py and the templates.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from shoal.artifacts.evaluation import LIKELIHOOD_PROTOCOLS, Interval, ItemScore, TaskScore
from shoal.errors import UserError
from shoal.stats.intervals import Limits
from shoal.stats.paired import (
    FEW_CHANGED,
    SIGNIFICANT,
    PairedDifference,
    Retention,
    holm,
    is_binary,
    paired,
    require_same_measurement,
    retention,
    retention_gap,
    verdict,
    wording_gap,
    wording_gap_change,
    z_above_chance,
)

from ..harness.rates import CALIBRATION_ERROR, NAMES, rate, rate_difference
from .run import Run, read_run

PAIRS = {
    ("teacher", "pruned"): "Lost by pruning: pruned minus teacher",
    ("pruned", "distilled"): "Recovered by distillation: distilled minus pruned",
    ("teacher", "distilled"): "Against the teacher: distilled minus teacher",
    ("teacher", "control"): "Learnt from the text: control (the teacher after the same training) minus teacher",
    ("control", "distilled"): "Still lost: distilled minus control",
}
"""(before, after) of roles that are compared -> caption of their table. The control is trained as the student is."""
SIGNAL_SIGMAS = 3.0
"""A task on which the teacher is not this many standard errors above chance cannot show what was lost."""
FEW_ITEMS_MEAN = "the intervals are wide and contain the true value in 92 to 100 % of cases, not in 95 %"
FEW_CHANGED_MEAN = (
    f"“Few changed”: fewer than {FEW_CHANGED} answers changed, so the intervals of the change and of the share kept "
    "are wider than necessary: they contain the true value in at least 97 % of cases."
)
SCORE_FIELDS = (
    *("task", "ability", "protocol", "metric", "score", "ci_low", "ci_high", "n", "chance", "higher_is_better"),
    *("num_fewshot", "version", "family", "level", "column"),
)
"""What score_rows tells of a score."""
ABOUT = ("task", "ability", "protocol", "metric", "version", "num_fewshot", "column", "n", "chance", "higher_is_better")
"""What results.json says of a task."""
SIZES = ("num_layers", "num_parameters", "num_bytes")
K = TypeVar("K")
Key = tuple[str, str, str]
"""Task, protocol and metric of a score."""


@dataclass(frozen=True)
class Form:
    """The wording gap of every role on one task: its score in the trained wording minus its score when reworded."""

    gaps: dict[str, PairedDifference]
    growth: dict[str, Interval]
    """Role -> its gap minus the teacher's."""
    higher_is_better: bool
    adjusted_p: dict[str, float] = field(default_factory=dict)
    """p-values of the gaps after Holm's correction over all reworded tasks."""

    def is_learnt(self, role: str) -> bool:
        """Whether the gap of ``role`` is significant, favours the trained wording, and is larger than the teacher's."""
        if role not in self.growth or self.adjusted_p[role] >= SIGNIFICANT:
            return False
        sign = 1 if self.higher_is_better else -1
        growth = self.growth[role]
        return sign * self.gaps[role].difference > 0 and min(sign * growth.ci_low, sign * growth.ci_high) > 0


@dataclass(frozen=True)
class Row:
    """One task under one protocol, over the roles that were evaluated on it with equal settings."""

    key: Key
    ability: str
    scores: dict[str, TaskScore]
    differences: dict[tuple[str, str], PairedDifference]
    """(before role, after role) -> paired difference."""
    retained: dict[str, Retention]
    """Role -> share of the teacher's score above chance that it keeps."""
    teacher_sigmas: float | None
    """Standard errors of the teacher above chance; None where chance means nothing or there is no teacher."""
    adjusted_p: dict[tuple[str, str], float]
    """p-values of the differences after Holm's correction over all tasks."""
    form: Form | None = None
    """The scores of the same items in the trained wording, if this row asks them reworded."""

    @property
    def any_score(self) -> TaskScore:
        return next(iter(self.scores.values()))

    @property
    def column(self) -> str:
        """How the items relate to training text, see TaskScore.column."""
        return self.any_score.column

    @property
    def higher_is_better(self) -> bool:
        return self.any_score.higher_is_better

    @property
    def has_signal(self) -> bool:
        """False if the teacher is not clearly above chance (lower-is-better metrics have none)."""
        return self.teacher_sigmas is None or self.teacher_sigmas > SIGNAL_SIGMAS

    def verdict(self, before: str, after: str) -> str | None:
        """`better`, `worse` or `unclear`, after Holm's correction; None = not both evaluated."""
        pair = (before, after)
        return verdict(self.differences.get(pair), self.adjusted_p.get(pair), higher_is_better=self.higher_is_better)


@dataclass(frozen=True)
class Writing:
    """One rate on one task: how often written answers are unreadable, loop or are cut off, how long they are, or by how
    much a model is surer of its options than right."""

    row: Row
    name: str
    """Name of the rate, one of rates.NAMES."""
    rates: dict[str, Interval]
    """Rate by role."""
    differences: dict[tuple[str, str], PairedDifference]
    """(before role, after role) -> change, item by item; lower is better."""
    adjusted_p: dict[tuple[str, str], float]
    """p-values of these after Holm's correction over the tasks that have this rate."""


@dataclass(frozen=True)
class Comparison:
    """Every task with the scores of all roles that can be compared, and what had to be left out."""

    rows: tuple[Row, ...]
    refused: tuple[str, ...]
    """Reasons why a role's score was left out of a row: it was measured with other settings."""
    formless: tuple[str, ...] = ()
    """Reasons why a reworded task has no wording gap."""


def compare(run: Run) -> Comparison:
    """Every task with its paired differences; a role measured with other settings is left out."""
    rows, refused = list[Row](), list[str]()
    for key in dict.fromkeys(task.key for evaluation in run.evaluations.values() for task in evaluation.tasks):
        scores: dict[str, TaskScore] = {}
        for role, evaluation in run.evaluations.items():
            task = next((task for task in evaluation.tasks if task.key == key), None)
            if task is None:
                continue
            try:
                if scores:
                    require_same_measurement(next(iter(scores.values())), task)
            except UserError as error:
                refused.append(f"{role}: {error}")
            else:
                scores[role] = task
        rows.append(_row(key, scores))
    adjusted = _adjusted([row.differences for row in rows])
    corrected = [replace(row, adjusted_p=p_values) for row, p_values in zip(rows, adjusted, strict=True)]
    rows, unpaired = _with_forms(corrected)
    return Comparison(tuple(rows), tuple(refused), tuple(unpaired))


def with_comparable_scores(run: Run, comparison: Comparison) -> Run:
    """The run without the scores that were refused a place beside the others: for figures and curves."""
    scores = {row.key: row.scores for row in comparison.rows}
    evaluations = {
        role: replace(evaluation, tasks=tuple(task for task in evaluation.tasks if role in scores.get(task.key, {})))
        for role, evaluation in run.evaluations.items()
    }
    return replace(run, evaluations={role: evaluation for role, evaluation in evaluations.items() if evaluation.tasks})


def score_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Every score of a run that may stand in one table, with its 95 % interval and the share of the teacher's it keeps.

    The row of a reworded task has its wording gap: the score of the same items in the trained wording, minus its own.

    Raises:
        UserError: there is nothing in the run directory, or it cannot be read.
    """
    rows = []
    for row in compare(read_run(run_dir)).rows:
        for role, score in row.scores.items():
            kept, gap = row.retained.get(role), row.form.gaps.get(role) if row.form else None
            share = (kept.value, kept.ci_low, kept.ci_high) if kept else (None, None, None)
            form = (gap.difference, gap.ci_low, gap.ci_high) if gap else (None, None, None)
            rows.append(
                {
                    "role": role,
                    **{field: getattr(score, field) for field in SCORE_FIELDS},
                    **{name: score.rates.get(name) for name in (*NAMES, CALIBRATION_ERROR)},
                    **dict(zip(("share_kept", "share_kept_low", "share_kept_high"), share, strict=True)),
                    **dict(zip(("wording_gap", "wording_gap_low", "wording_gap_high"), form, strict=True)),
                }
            )
    return rows


def flipped(before: TaskScore, after: TaskScore) -> tuple[list[tuple[ItemScore, ItemScore]], ...]:
    """Items won and items lost from ``before`` to ``after``; empty for scores that are not right or wrong."""
    if not (is_binary(before) and is_binary(after)):
        return [], []
    later = {item.id: item for item in after.items}
    pairs = [(item, later[item.id]) for item in before.items if item.id in later]
    return [p for p in pairs if p[0].score < p[1].score], [p for p in pairs if p[0].score > p[1].score]


def protocol_gaps(rows: Iterable[Row], role: str) -> list[tuple[Row, Row, Limits]]:
    """(likelihood row, generation row, share kept by ``role`` by likelihood minus that in generation) by ability.

    Only between tasks that ask the same: on the same items where an ability has such a pair, else at the same level of
    the same family.
    """
    usable = [row for row in rows if row.has_signal and role in row.retained and row.retained[role].value is not None]
    pairs = [
        (likely, written)
        for likely in usable
        for written in usable
        if likely.key[1] in LIKELIHOOD_PROTOCOLS and written.key[1] == "generation"
        if likely.ability == written.ability
    ]
    shared = {likely.ability for likely, written in pairs if shares_items(likely, written)}
    fair = [
        (likely, written)
        for likely, written in pairs
        if (shares_items(likely, written) if likely.ability in shared else _dial(likely) == _dial(written))
    ]
    gaps = [(*pair, retention_gap(*((row.scores["teacher"], row.scores[role]) for row in pair))) for pair in fair]
    return [(likely, written, gap) for likely, written, gap in gaps if gap is not None]


def shares_items(first: Row, other: Row) -> bool:
    """Whether two tasks ask the same items."""
    return {item.id for item in first.any_score.items} == {item.id for item in other.any_score.items}


def _dial(row: Row) -> tuple[str | None, float | None]:
    return row.any_score.family, row.any_score.level


def writing(rows: Iterable[Row]) -> tuple[Writing, ...]:
    """The rates of every task that has some, with their changes between roles; those of a task together."""
    writings = [
        Writing(
            row,
            name,
            {role: rate(score, name) for role, score in counted.items()},
            {pair: rate_difference(counted[pair[0]], counted[pair[1]], name) for pair in _pairs(counted)},
            {},
        )
        for row in rows
        if (counted := {role: score for role, score in row.scores.items() if score.rates})
        for name in NAMES
        if all(name in score.rates for score in counted.values())
    ]
    adjusted = {name: _adjusted([entry.differences for entry in writings if entry.name == name]) for name in NAMES}
    return tuple(replace(entry, adjusted_p=adjusted[entry.name].pop(0)) for entry in writings)


def measured_in_nats(score: TaskScore) -> bool:
    """Whether exp(score) is a perplexity: a mean negative log-likelihood in nats."""
    return not score.higher_is_better and score.metric.startswith("nats")


def is_share(score: TaskScore) -> bool:
    """Whether the score is a share of items, to be written in percent."""
    return score.higher_is_better and score.ci_low >= 0 and score.ci_high <= 1


def _row(key: Key, scores: dict[str, TaskScore]) -> Row:
    teacher = scores.get("teacher")
    return Row(
        key=key,
        ability=next(iter(scores.values())).ability,
        scores=scores,
        differences={pair: paired(scores[pair[0]], scores[pair[1]]) for pair in _pairs(scores)},
        retained={role: retention(teacher, score) for role, score in scores.items() if teacher and role != "teacher"},
        teacher_sigmas=z_above_chance(teacher) if teacher else None,
        adjusted_p={},
    )


def _with_forms(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """The rows, those of reworded tasks with their wording gaps, and why one has none."""
    by_task, forms, formless = {row.any_score.task: row for row in rows}, dict[Key, Form](), list[str]()
    for row in rows:
        if own := by_task.get(row.any_score.reworded_of):
            try:
                forms[row.key] = _form_of(own.scores, row.scores)
            except UserError as error:
                formless.append(str(error))
    adjusted = _adjusted([form.gaps for form in forms.values()])
    corrected = {
        key: replace(form, adjusted_p=values) for (key, form), values in zip(forms.items(), adjusted, strict=True)
    }
    return [replace(row, form=corrected.get(row.key)) for row in rows], formless


def _pairs(roles: Collection[str]) -> list[tuple[str, str]]:
    """The pairs of which both roles are there."""
    return [pair for pair in PAIRS if set(pair) <= set(roles)]


def _adjusted(tasks: Sequence[dict[K, PairedDifference]]) -> list[dict[K, float]]:
    """By task and pair of roles, or role: the p-value after Holm's correction over the tasks."""
    adjusted: list[dict[K, float]] = [{} for _ in tasks]
    for pair in dict.fromkeys(pair for changes in tasks for pair in changes):
        holders = [index for index, changes in enumerate(tasks) if pair in changes]
        values = holm([tasks[index][pair].p_value for index in holders])
        for index, value in zip(holders, values, strict=True):
            adjusted[index][pair] = value
    return adjusted


def _form_of(own: Mapping[str, TaskScore], reworded: Mapping[str, TaskScore]) -> Form:
    """The wording gaps between a task (role -> score) and its reworded one, without corrected p-values."""
    pairs = {role: (own[role], score) for role, score in reworded.items() if role in own}
    before = pairs.get("teacher")
    return Form(
        gaps={role: wording_gap(*pair) for role, pair in pairs.items()},
        growth={
            role: Interval(*wording_gap_change(before, pair))
            for role, pair in pairs.items()
            if before is not None and role != "teacher"
        },
        higher_is_better=next(iter(reworded.values())).higher_is_better,
    )


def results(run: Run, comparison: Comparison, headline: Sequence[str]) -> dict[str, Any]:
    """results.json: what the first screen of the report says, for a script."""
    evaluations = run.evaluations.items()
    return {
        "schema": "shoal/results/1",
        "made": {file: {"fingerprint": made.provenance.fingerprint} for file, made in run.results.items()},
        "model": run.model,
        "drop": list(run.plan.drop) if run.plan else None,
        "roles": {role: {size: getattr(own, size) for size in SIZES} for role, own in evaluations},
        "headline": list(headline),
        "decision": headline[-1].partition(":")[0].lower() if {"teacher", "pruned"} <= run.evaluations.keys() else None,
        "tasks": [task_result(row, has_signal=row.has_signal) for row in comparison.rows],
    }


def task_result(row: Row, *, has_signal: bool) -> dict[str, Any]:
    """A task of results.json, and of compare.json, where the roles of ``row`` are models of runs (`A pruned`)."""
    return {
        **{field: getattr(row.any_score, field) for field in ABOUT},
        "has_signal": has_signal,
        "scores": {role: _limits(score.score, score) for role, score in row.scores.items()},
        "rates": {role: score.rates for role, score in row.scores.items()},
        "changes": [
            {"before": pair[0], "after": pair[1]}
            | _limits(change.difference, change)
            | {"adjusted_p": row.adjusted_p.get(pair), "verdict": row.verdict(*pair)}
            for pair, change in row.differences.items()
        ],
        "share_kept": {role: _limits(own.value, own) | {"reason": own.reason} for role, own in row.retained.items()},
    }


def _limits(value: float | None, limits: TaskScore | PairedDifference | Retention) -> dict[str, Any]:
    """The three numbers as JSON can hold them."""
    told = {"value": value, "ci_low": limits.ci_low, "ci_high": limits.ci_high}
    return {name: own if own is not None and math.isfinite(own) else None for name, own in told.items()}
