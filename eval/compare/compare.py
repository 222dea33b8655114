"""Runs side by side: what each kept of its teacher, at what size, speed and cost, and what may be said of the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.artifacts.evaluation import MODEL, ROLES, Scores, Speed, SpeedScore, TaskScore
from shoal.formatting import listed
from shoal.models.checkpoint_files import WRITING
from shoal.stats.paired import (
    PairedDifference,
    Retention,
    holm,
    kept_influences,
    paired,
    retention,
    verdict,
    z_above_chance,
)

from ..report.costs import SpeedRatio, speed_ratio
from ..report.findings import SIGNAL_SIGMAS
from .comparable import CUT_ROLES, Common, Contender, find_common, read_contenders, score_of

SPEED_SETTINGS = ("batch_size", "prompt_tokens", "new_tokens", "dtype")
SPEED_MACHINE = ("device", "cpu_threads")
COMPARED = (*CUT_ROLES, MODEL)
"""Roles whose models are compared with one of the first run, or with the checkpoint that stands first; of a run beside
a checkpoint the last of them is."""

Question = tuple[str, str, str]
"""Role, content of the model and task of a difference."""
Tested = dict[Question, tuple[PairedDifference, float]]


@dataclass(frozen=True)
class Cell:
    """One model on one task."""

    score: TaskScore
    kept: Retention | None
    """Share kept of the teacher's score above chance; None for a teacher, and where no teacher was evaluated."""
    difference: PairedDifference | None
    """Difference to the first one's model (see rival_of); None = there is no other such model."""
    adjusted_p: float | None = None
    """p-value of the difference after Holm's correction over all differences of the table."""
    influences: Mapping[str, float] = field(default_factory=dict)
    """Item -> how far it moves `kept`; empty where there is no share."""

    @property
    def verdict(self) -> str | None:
        """`better` or `worse` than the first run, or `unclear`; None = not compared."""
        return verdict(self.difference, self.adjusted_p, higher_is_better=self.score.higher_is_better)


@dataclass(frozen=True)
class Model:
    """One row of the table."""

    contender: Contender
    """Run that the scores are from; of a teacher the first run that evaluated it."""
    role: str
    evaluation: Scores
    cells: tuple[Cell, ...]
    """One cell per task, in their order."""
    speed: SpeedScore | None
    speed_ratio: SpeedRatio | None
    """Decoding speed over that of the teacher measured in turns with it."""
    rival: str | None = None
    """Role of the first run's model, or checkpoint, that it is compared with; None = there is none."""


@dataclass(frozen=True)
class RunComparison:
    """The table and what has to be known to read it."""

    contenders: tuple[Contender, ...]
    tasks: tuple[TaskScore, ...]
    """Scores of the first model, one per column of the table."""
    silent: frozenset[str]
    """Tasks on which no teacher is clearly above chance."""
    models: tuple[Model, ...]
    """Teachers first, then every run's."""
    num_differences: int
    """Number of comparisons that the correction allows for."""
    left_out: tuple[str, ...]
    """Tasks and speeds that are not in the table, and why."""
    notes: tuple[str, ...]
    precision: str = ""
    """Sentence above the table on runs that were scored in different precisions; empty = all in one."""


def compare_runs(folders: Sequence[Path], *, across_teachers: bool = False) -> RunComparison:
    """Everything the table and the figure show of the runs in ``folders``.

    Raises:
        UserError: a folder without results, or results that cannot stand in one table.
    """
    contenders = read_contenders(folders)
    common = find_common(contenders, across_teachers=across_teachers)
    timed, no_speed = _timed_alike(contenders)
    teachers: dict[str | None, Contender] = {}
    for contender in contenders:
        if "teacher" in contender.run.evaluations:
            teachers.setdefault(contender.teacher, contender)
    shown = [(contender, "teacher") for contender in teachers.values()]
    roles = (*ROLES[1:], MODEL)
    shown += [(contender, role) for contender in contenders for role in roles if role in contender.run.evaluations]
    tested = _tests(shown, contenders[0], common.tasks)
    models = tuple(_model(contender, role, contenders, common, tested, timed) for contender, role in shown)
    return RunComparison(
        contenders=contenders,
        tasks=tuple(cell.score for cell in models[0].cells),
        silent=_silent(models, common.tasks),
        models=models,
        num_differences=len(tested),
        left_out=(*common.left_out, *no_speed),
        notes=tuple(_notes(contenders, common)),
        precision=common.precision,
    )


def same_models(comparison: RunComparison) -> list[list[Model]]:
    """Models of several runs that are one and the same: two recipes often share their cut."""
    groups: dict[tuple[str, str], list[Model]] = {}
    for model in comparison.models:
        if model.role != "teacher" and (content := content_of(model.evaluation)) is not None:
            groups.setdefault((model.role, content), []).append(model)
    return [group for group in groups.values() if len({member.contender.letter for member in group}) > 1]


def _model(
    contender: Contender, role: str, contenders: Sequence[Contender], common: Common, tested: Tested, timed: set[str]
) -> Model:
    evaluation = contender.run.evaluations[role]
    teacher = teacher_of(contender, contenders) if role != "teacher" else None
    cells = []
    for task in common.tasks:
        score = score_of(evaluation, task)
        own = score_of(teacher, task) if teacher else None
        kept = retention(own, score) if own else None
        influences = kept_influences(own, score) if own and kept and kept.value is not None else {}
        cells.append(Cell(score, kept, *tested.get(_question(contender, role, task), (None, None)), influences))
    speeds = contender.run.speed.roles if contender.run.speed and contender.letter in timed else {}
    ratio = speed_ratio(speeds[role], speeds["teacher"], "decode") if {role, "teacher"} <= speeds.keys() else None
    rival = rival_of(contender, role, contenders[0])
    return Model(contender, role, evaluation, tuple(cells), speeds.get(role), ratio, rival)


def _tests(shown: Sequence[tuple[Contender, str]], first: Contender, tasks: Sequence[str]) -> Tested:
    """Every difference to the first run's models with its p-value after Holm's correction over all of them; one model
    that several runs share makes one of them, and the same weights make none."""
    found: dict[Question, PairedDifference] = {}
    for contender, role in shown:
        rival, evaluation = rival_of(contender, role, first), contender.run.evaluations[role]
        other = first.run.evaluations[rival] if rival else None
        if other and (content_of(evaluation) is None or content_of(evaluation) != content_of(other)):
            for task in tasks:
                change = paired(score_of(other, task), score_of(evaluation, task))
                found[_question(contender, role, task)] = change
    adjusted = holm([change.p_value for change in found.values()])
    return {key: (change, p_value) for (key, change), p_value in zip(found.items(), adjusted, strict=True)}


def _question(contender: Contender, role: str, task: str) -> Question:
    """What a difference asks: equal for runs that share the model."""
    return role, content_of(contender.run.evaluations[role]) or contender.letter, task


def content_of(evaluation: Scores) -> str | None:
    """Fingerprint of the weights that were scored."""
    return evaluation.provenance.inputs.get("model")


def rival_of(contender: Contender, role: str, first: Contender) -> str | None:
    """The role of ``first`` that a model is compared with: its own; of a run beside a checkpoint its last model.

    None where ``first`` has no such model, or is the model's own run.
    """
    if contender is first or role not in COMPARED:
        return None
    if role in first.run.evaluations:
        return role
    last = next(own for own in reversed(COMPARED) if own in first.run.evaluations)
    return last if contender.is_model or first.is_model else None


def run_beside(contenders: Sequence[Contender]) -> Contender:
    """The run with whose settings checkpoints are scored, and by whose teacher they are measured."""
    return next(contender for contender in contenders if not contender.is_model)


def teacher_of(contender: Contender, contenders: Sequence[Contender]) -> Scores | None:
    """The run's own evaluation of its teacher, else another run's of the same one; of a checkpoint see run_beside."""
    if contender.is_model:
        contender = run_beside(contenders)
    own = contender.run.evaluations.get("teacher")
    if own or contender.teacher is None:
        return own
    same = (other.run.evaluations.get("teacher") for other in contenders if other.teacher == contender.teacher)
    return next((evaluation for evaluation in same if evaluation), None)


def _silent(models: Sequence[Model], tasks: Sequence[str]) -> frozenset[str]:
    teachers = [model for model in models if model.role == "teacher"]
    sigmas = {task: [z_above_chance(own.cells[index].score) for own in teachers] for index, task in enumerate(tasks)}
    return frozenset(
        task for task, own in sigmas.items() if own and all(z is not None and z <= SIGNAL_SIGMAS for z in own)
    )


def _timed_alike(contenders: Sequence[Contender]) -> tuple[set[str], list[str]]:
    """Letters of the runs that were timed as the first of them was, and why the others have no speed."""
    timed = {own.letter: _timing(own.run.speed) for own in contenders if own.run.speed is not None}
    if not timed:
        return set(), ["No run has a speed: set `eval.speed: true` to measure it."]
    alike, reasons, (first, wanted) = set[str](), list[str](), next(iter(timed.items()))
    for letter in (own.letter for own in contenders):
        if letter not in timed:
            reasons.append(f"{letter} has no speed: set `eval.speed: true` to measure it.")
        elif other := [field for field, value in wanted.items() if timed[letter][field] != value]:
            reasons.append(
                f"The speeds of {letter} are not shown: {other[0]} is {timed[letter][other[0]]!r} there and "
                f"{wanted[other[0]]!r} in {first}."
            )
        else:
            alike.add(letter)
    return alike, reasons


def _timing(speed: Speed) -> dict[str, Any]:
    """What speeds depend on, apart from the model."""
    settings = {field: getattr(speed, field) for field in SPEED_SETTINGS}
    machine = {field: speed.provenance.environment.get(field) for field in SPEED_MACHINE}
    return {**settings, "attention": speed.provenance.inputs.get("attention"), **machine}


def _notes(contenders: Sequence[Contender], common: Common) -> Iterator[str]:
    """Gaps, and differences between the runs that are no reason to refuse them."""
    for contender in contenders:
        if contender.is_model:
            continue
        for role in CUT_ROLES:
            if role not in contender.run.evaluations:
                yield f"{contender.letter} has no {role} model: {contender.file(role)} does not exist."
        if "teacher" not in contender.run.evaluations:
            same = teacher_of(contender, contenders)
            use = "the evaluation of the same teacher in another run is used" if same else "it has no shares kept"
            yield f"{contender.letter} has no evaluation of its teacher; {use}."
    if models := [contender for contender in contenders if contender.is_model]:
        beside = run_beside(contenders).letter
        names = listed(f"{contender.letter} ({contender.name})" for contender in models)
        yield (
            f"{names}: a checkpoint without a run, scored with the settings of {beside}; its “share kept” is its score "
            f"above chance divided by that of the teacher of {beside}."
        )
    judged = [contender for contender in contenders if "teacher" in contender.run.evaluations]
    for contender in judged[1:]:
        if contender.teacher == judged[0].teacher and contender.teacher is not None:
            yield from _restless(judged[0], contender, common)
    first = next(iter(contenders[0].run.evaluations.values()))
    if any(score_of(first, task).protocol == "generation" for task in common.tasks):
        yield from _other_writing(contenders)


def _other_writing(contenders: Sequence[Contender]) -> Iterator[str]:
    """Models that write by settings of their own: with a penalty or sampling, texts differ whatever was cut."""
    by_settings: dict[str, list[str]] = {}
    for contender in contenders:
        for role, evaluation in contender.run.evaluations.items():
            settings = evaluation.provenance.inputs.get(WRITING) or {}
            told = ", ".join(f"{key} {value}" for key, value in settings.items()) or "nothing recorded"
            by_settings.setdefault(told, []).append(f"{contender.letter} {role}")
    if len(by_settings) > 1:
        told = "; ".join(f"{settings} in {listed(names)}" for settings, names in by_settings.items())
        yield f"{WRITING} differs between models: {told}. Generated answers depend on it."


def _restless(first: Contender, other: Contender, common: Common) -> Iterator[str]:
    """What the same teacher did otherwise: the noise of the machine, which no interval over items holds."""
    pairs = [[score_of(c.run.evaluations["teacher"], task) for c in (first, other)] for task in common.tasks]
    differences = [paired(before, after) for before, after in pairs]
    binary = [difference for difference in differences if difference.test == "mcnemar-exact"]
    if changed := sum(difference.won + difference.lost for difference in binary):
        yield (
            f"The same teacher answered {changed} of {sum(difference.n for difference in binary):,} items differently "
            f"in {other.letter} and {first.letter} (another machine, library or batch size). Differences of this size "
            "mean nothing."
        )
