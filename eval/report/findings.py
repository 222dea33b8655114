"""What a run directory holds and what may be concluded from it: comparisons, flips, sentences for the headline.

Only numbers here; how they are worded in full and shown is sections.py.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from shoal.artifacts.artifact import Artifact, differences
from shoal.artifacts.evaluation import (
    LIKELIHOOD_PROTOCOLS,
    MODEL,
    ROLES,
    Evaluation,
    Interval,
    ItemScore,
    Speed,
    TaskScore,
)
from shoal.artifacts.importance import Importance
from shoal.artifacts.plan import PruningPlan
from shoal.artifacts.training import Training
from shoal.errors import UserError
from shoal.stats.paired import (
    PairedDifference,
    Retention,
    holm,
    is_binary,
    paired,
    require_same_measurement,
    retention,
    retention_gap,
    verdict,
    z_above_chance,
)

from ..harness.rates import NAMES, rate, rate_difference
from .forms import Form, form_of

OF_THE_STUDENT = ("student", "prune.", "control.")
"""Beginnings of inputs of a training in which a control differs from the student's."""
PAIRS = (
    ("teacher", "pruned"),
    ("pruned", "distilled"),
    ("teacher", "distilled"),
    ("teacher", "control"),
    ("control", "distilled"),
)
"""(before, after) of the roles that are compared. The control is the uncut teacher, trained as the cut model was."""
SIGNAL_SIGMAS = 3.0
"""A task on which the intact teacher is not this many standard errors above chance says nothing about damage."""
FEW_ITEMS = 50
"""Number of items below which the report says that intervals are wide."""

A = TypeVar("A", bound=Artifact)
K = TypeVar("K")
Key = tuple[str, str, str]
"""Task, protocol and metric of a score."""


@dataclass(frozen=True)
class Run:
    """Everything a run directory holds; None or absent = that stage has not run."""

    folder: Path
    recipe: dict[str, Any] | None
    stages: dict[str, Any]
    importance: Importance | None
    plan: PruningPlan | None
    training: Training | None
    evaluations: dict[str, Evaluation]
    speed: Speed | None
    numerics: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Precision of the numbers and the reason for it, as in run.json; empty = not recorded."""

    @property
    def model(self) -> str:
        """Name of the model in the recipe, else `the model`."""
        name = (self.recipe or {}).get("model")
        return name if isinstance(name, str) else "the model"


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
    """How the same items do in the form that training text may have, where this row is their twin."""

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
        """False where the intact teacher does not stand clear of chance (lower-is-better metrics have none)."""
        return self.teacher_sigmas is None or self.teacher_sigmas > SIGNAL_SIGMAS

    def verdict(self, before: str, after: str) -> str | None:
        """`better`, `worse` or `unclear`, after Holm's correction; None = not both evaluated."""
        pair = (before, after)
        return verdict(self.differences.get(pair), self.adjusted_p.get(pair), higher_is_better=self.higher_is_better)


@dataclass(frozen=True)
class Writing:
    """One rate of written text on one task: how often answers are unreadable, loop or are cut off, or how long."""

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
    """Reasons why a twin has no form gap."""


def read_run(folder: Path) -> Run:
    """The artifacts of a run directory, whichever exist.

    Raises:
        UserError: no such folder, nothing of a run in it, an artifact that cannot be read, or artifacts of another run
            among them.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run directory; run a stage of the recipe first")
    evaluations = {
        role: evaluation
        for role in (*ROLES, MODEL)
        if (evaluation := read_result(Evaluation, folder / "eval" / f"{role}.json")) is not None
    }
    run_file = _read_json(folder / "run.json")
    run = Run(
        folder=folder,
        recipe=run_file.get("recipe"),
        stages=run_file.get("stages") or {},
        importance=read_result(Importance, folder / Importance.FILE),
        plan=read_result(PruningPlan, folder / PruningPlan.FILE),
        training=read_result(Training, folder / Training.FILE),
        evaluations=evaluations,
        speed=read_result(Speed, folder / Speed.FILE),
        numerics=run_file.get("numerics") or {},
    )
    parts = (run.importance, run.plan, run.training, run.speed)
    if all(part is None for part in parts) and not evaluations:
        raise UserError(f"{folder}: holds no result to report; run `shoal measure`, `prune`, `distill` or `eval` first")
    _refuse_mixed_runs(run)
    _refuse_control_of_other_training(run)
    return run


def read_result(kind: type[A], path: Path) -> A | None:
    """The artifact at ``path``; None where it was not made. Raises as its ``read`` does."""
    return kind.read(path) if path.is_file() else None


def compare(run: Run) -> Comparison:
    """Every task with its paired differences; a role measured with other settings is refused, never shown beside."""
    refused: list[str] = []
    rows, unpaired = _with_forms(_rows(run.evaluations, refused))
    return Comparison(tuple(rows), tuple(refused), tuple(unpaired))


def _rows(evaluations: Mapping[str, Evaluation], refused: list[str]) -> list[Row]:
    rows = []
    for key in dict.fromkeys(task.key for evaluation in evaluations.values() for task in evaluation.tasks):
        scores: dict[str, TaskScore] = {}
        for role, evaluation in evaluations.items():
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
    return [replace(row, adjusted_p=p_values) for row, p_values in zip(rows, adjusted, strict=True)]


def with_comparable_scores(run: Run, comparison: Comparison) -> Run:
    """The run without the scores that were refused a place beside the others: for figures and curves."""
    scores = {row.key: row.scores for row in comparison.rows}
    evaluations = {
        role: replace(evaluation, tasks=tuple(task for task in evaluation.tasks if role in scores.get(task.key, {})))
        for role, evaluation in run.evaluations.items()
    }
    return replace(run, evaluations={role: evaluation for role, evaluation in evaluations.items() if evaluation.tasks})


def flipped(before: TaskScore, after: TaskScore) -> tuple[list[tuple[ItemScore, ItemScore]], ...]:
    """Items won and items lost from ``before`` to ``after``; empty for scores that are not right or wrong."""
    if not (is_binary(before) and is_binary(after)):
        return [], []
    later = {item.id: item for item in after.items}
    pairs = [(item, later[item.id]) for item in before.items if item.id in later]
    return [p for p in pairs if p[0].score < p[1].score], [p for p in pairs if p[0].score > p[1].score]


def protocol_gaps(rows: Iterable[Row], role: str) -> list[tuple[Row, Row, float]]:
    """(likelihood row, generation row, gap in retention) for each ability ``role`` was asked about in both ways."""
    usable = [
        row
        for row in rows
        if row.has_signal and (kept := row.retained.get(role)) is not None and kept.value is not None
    ]
    gaps = []
    for likely in (row for row in usable if row.key[1] in LIKELIHOOD_PROTOCOLS):
        for written in (row for row in usable if row.key[1] == "generation" and row.ability == likely.ability):
            by_likelihood, in_writing = likely.retained[role].value, written.retained[role].value
            assert by_likelihood is not None
            assert in_writing is not None
            gaps.append((likely, written, by_likelihood - in_writing))
    return gaps


def gap_limits(likely: Row, written: Row, role: str) -> tuple[float, float] | None:
    """The 95 % interval of a protocol gap: what ``role`` keeps by likelihood minus what it keeps in writing.

    None where either of the two has no retention.
    """
    gap = retention_gap(*((row.scores["teacher"], row.scores[role]) for row in (likely, written)))
    return gap and gap[1:]


def writing(rows: Iterable[Row]) -> tuple[Writing, ...]:
    """The rates of every task whose texts were counted, with their changes between roles; those of a task together."""
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
    ]
    adjusted = {name: _adjusted([entry.differences for entry in writings if entry.name == name]) for name in NAMES}
    return tuple(replace(entry, adjusted_p=adjusted[entry.name].pop(0)) for entry in writings)


def measured_in_nats(score: TaskScore) -> bool:
    """Whether exp(score) is a perplexity: a mean negative log-likelihood in nats."""
    return not score.higher_is_better and score.metric.startswith("nats")


def is_share(score: TaskScore) -> bool:
    """Whether the score is a share of items, to be written in percent."""
    return score.higher_is_better and score.ci_low >= 0 and score.ci_high <= 1


def _refuse_mixed_runs(run: Run) -> None:
    """Refuse results of different models in one folder, as copying files or pruning again leaves them.

    Which settings they were scored with is compared task by task: scoring one role anew is no other run.
    """
    for role, evaluation in run.evaluations.items():
        if evaluation.role != role:
            raise UserError(
                f"{run.folder / 'eval' / role}.json: role is {evaluation.role!r}, but {role!r} in the file's name; "
                "move it back to its own name, or run `shoal eval` again"
            )
    verbs = {Importance: "measure", PruningPlan: "prune", Training: "distill"}
    parts = [part for part in (run.plan, run.importance, run.training) if part is not None]
    for subject, entries in _identities(run, parts).items():
        (first, _, expected), *others = entries or [("", "", None)]
        for file, field, value in others:
            if value != expected:
                verb = next((verb for kind, verb in verbs.items() if file.endswith(kind.FILE)), "eval")
                raise UserError(
                    f"{run.folder / file}: {field} is {value!r}, but {expected!r} in {run.folder / first}: {subject} "
                    f"of another run. Run `shoal {verb}` again with this run's recipe, or delete the file"
                )


def _refuse_control_of_other_training(run: Run) -> None:
    """Refuse a control that was trained on other text or with other settings than the distilled model beside it."""
    control = read_result(Training, run.folder / "control" / Training.FILE)
    if control is None or run.training is None or "control" not in run.evaluations:
        return
    own, others = run.training.provenance.inputs, control.provenance.inputs
    both = {key for key in own.keys() & others.keys() if not key.startswith(OF_THE_STUDENT)}
    if unlike := differences({key: own[key] for key in both}, {key: others[key] for key in both}):
        raise UserError(
            f"{run.folder / 'control' / Training.FILE}: the control was not trained as the distilled model was: "
            f"{'; '.join(unlike)}. Run `shoal distill` and `shoal eval` with eval.control: true, or delete "
            f"{run.folder / 'eval' / 'control.json'}"
        )


def _identities(
    run: Run, parts: Sequence[Importance | PruningPlan | Training]
) -> dict[str, list[tuple[str, str, Any]]]:
    """What every file says that it was made from: (file, field, value), the file that the others follow from first."""
    subjects = {"pruned": "the student", "distilled": "the distilled model"}
    subjects = {role: subjects.get(role, f"the {role}") for role in ROLES}
    entries: dict[str, list[tuple[str, str, Any]]] = {subject: [] for subject in subjects.values()}
    for part in parts:
        entries["the teacher"].append((part.FILE, "model", part.provenance.inputs.get("model")))
    if run.training:
        entries["the student"].append((Training.FILE, "student", run.training.provenance.inputs.get("student")))
    for role, subject in subjects.items():
        if evaluation := run.evaluations.get(role):
            entries[subject].append((f"eval/{role}.json", "model", evaluation.provenance.inputs.get("model")))
        if run.speed and role in run.speed.roles:
            entries[subject].append((Speed.FILE, role, run.speed.provenance.inputs.get(role)))
    told = {subject: [entry for entry in files if entry[2] is not None] for subject, files in entries.items()}
    if run.plan and run.importance:
        counts = ((part.FILE, "num_layers", part.num_layers) for part in (run.plan, run.importance))
        told["the number of layers"] = [*counts]
    if run.plan and run.training and "prune.drop" in run.training.provenance.inputs:
        dropped = list(run.training.provenance.inputs["prune.drop"])
        told["the cut"] = [(PruningPlan.FILE, "drop", list(run.plan.drop)), (Training.FILE, "prune.drop", dropped)]
    return told


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
    """The rows, those of twins with their form gaps, and why one has none."""
    by_task, forms, formless = {row.any_score.task: row for row in rows}, dict[Key, Form](), list[str]()
    for row in rows:
        if own := by_task.get(row.any_score.twin_of):
            try:
                forms[row.key] = form_of(own.scores, row.scores)
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


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON ({error}); delete it and run a stage again") from error
    return body if isinstance(body, dict) else {}
