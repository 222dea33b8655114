"""Runs side by side: what each kept of its teacher, at what size, speed and cost, and what may be said of the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shoal.artifacts.evaluation import MODEL, ROLES, Evaluation, Speed, SpeedScore, TaskScore
from shoal.formatting import listed
from shoal.models.checkpoint_files import WRITING
from shoal.stats.paired import PairedDifference, Retention, holm, paired, retention, verdict, z_above_chance

from ..report.costs import SpeedRatio, speed_ratio
from ..report.findings import SIGNAL_SIGMAS
from .comparable import CUT_ROLES, Common, Contender, find_common, read_contenders, score_of

SPEED_SETTINGS = ("batch_size", "prompt_tokens", "new_tokens", "dtype")
SPEED_MACHINE = ("device", "cpu_threads")
COMPARED = (*CUT_ROLES, MODEL)
"""Roles whose models are compared with one of the first run, or with the checkpoint that stands first; of a run beside
a checkpoint the last of them is."""


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
    evaluation: Evaluation
    cells: tuple[Cell, ...]
    """One cell per task, in their order."""
    speed: SpeedScore | None
    speed_ratio: SpeedRatio | None
    """Decoding speed over that of the teacher measured in turns with it."""
    rival: str | None = None
    """Role of the first run's model, or checkpoint, that it is compared with; None = there is none."""

    @property
    def content(self) -> str | None:
        """Fingerprint of the weights."""
        return self.evaluation.provenance.inputs.get("model")


@dataclass(frozen=True)
class RunComparison:
    """The table and what has to be known to read it."""

    contenders: tuple[Contender, ...]
    tasks: tuple[TaskScore, ...]
    """Scores of the first model, one per column of the table."""
    silent: frozenset[str]
    """Tasks on which no intact teacher is clear of chance."""
    models: tuple[Model, ...]
    """Teachers first, then every run's."""
    left_out: tuple[str, ...]
    """Tasks and speeds that are not in the table, and why."""
    notes: tuple[str, ...]
    precision: str = ""
    """Sentence above the table on runs that were scored in different precisions; empty = all in one."""

    @property
    def num_differences(self) -> int:
        """Number of comparisons that the correction allows for."""
        return len({_question(m, index) for m in self.models for index, cell in enumerate(m.cells) if cell.difference})


def compare_runs(folders: Sequence[Path], *, across_teachers: bool = False) -> RunComparison:
    """Everything the table and the figure show of the runs in ``folders``.

    Raises:
        UserError: a folder without results, or results that cannot stand in one table.
    """
    contenders = read_contenders(folders)
    common = find_common(contenders, across_teachers=across_teachers)
    speeds, no_speed = _speeds(contenders)
    shown = [(contender, "teacher") for contender in _first_of_each_teacher(contenders)]
    roles = (*ROLES[1:], MODEL)
    shown += [(contender, role) for contender in contenders for role in roles if role in contender.run.evaluations]
    models = [_model(contender, role, contenders, common, speeds) for contender, role in shown]
    first = models[0]
    return RunComparison(
        contenders=contenders,
        tasks=tuple(cell.score for cell in first.cells),
        silent=_silent(models, common.tasks),
        models=_with_adjusted_p(models),
        left_out=(*common.left_out, *no_speed),
        notes=tuple(_notes(contenders, common)),
        precision=common.precision,
    )


def same_models(comparison: RunComparison) -> list[list[Model]]:
    """Models of several runs that are one and the same: two recipes often share their cut."""
    groups: dict[tuple[str, str], list[Model]] = {}
    for model in comparison.models:
        if model.role != "teacher" and model.content is not None:
            groups.setdefault((model.role, model.content), []).append(model)
    return [group for group in groups.values() if len({member.contender.letter for member in group}) > 1]


def _model(
    contender: Contender,
    role: str,
    contenders: Sequence[Contender],
    common: Common,
    speeds: dict[tuple[str, str], tuple[SpeedScore, SpeedRatio | None]],
) -> Model:
    evaluation, first = contender.run.evaluations[role], contenders[0]
    teacher = teacher_of(contender, contenders) if role != "teacher" else None
    rival = rival_of(contender, role, first)
    other = first.run.evaluations[rival] if rival else None
    if other and evaluation.provenance.inputs.get("model") == other.provenance.inputs.get("model") is not None:
        other = None  # the same weights: nothing to compare
    cells = []
    for task in common.tasks:
        score = score_of(evaluation, task)
        kept = retention(score_of(teacher, task), score) if teacher else None
        cells.append(Cell(score, kept, paired(score_of(other, task), score) if other else None))
    speed, ratio = speeds.get((contender.letter, role), (None, None))
    return Model(contender, role, evaluation, tuple(cells), speed, ratio, rival)


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


def teacher_of(contender: Contender, contenders: Sequence[Contender]) -> Evaluation | None:
    """The run's own evaluation of its teacher, else another run's of the same one; of a checkpoint see run_beside."""
    if contender.is_model:
        contender = run_beside(contenders)
    own = contender.run.evaluations.get("teacher")
    if own or contender.teacher is None:
        return own
    same = (other.run.evaluations.get("teacher") for other in contenders if other.teacher == contender.teacher)
    return next((evaluation for evaluation in same if evaluation), None)


def _first_of_each_teacher(contenders: Sequence[Contender]) -> Iterator[Contender]:
    seen: set[str | None] = set()
    for contender in contenders:
        if "teacher" in contender.run.evaluations and contender.teacher not in seen:
            seen.add(contender.teacher)
            yield contender


def _silent(models: Sequence[Model], tasks: Sequence[str]) -> frozenset[str]:
    teachers = [model for model in models if model.role == "teacher"]
    return frozenset(
        task
        for index, task in enumerate(tasks)
        if teachers
        and all(
            (sigmas := z_above_chance(teacher.cells[index].score)) is not None and sigmas <= SIGNAL_SIGMAS
            for teacher in teachers
        )
    )


def _with_adjusted_p(models: Sequence[Model]) -> tuple[Model, ...]:
    """Holm's correction over all differences; one model that several runs share makes one of them."""
    compared = {
        _question(model, index): cell.difference.p_value
        for model in models
        for index, cell in enumerate(model.cells)
        if cell.difference
    }
    adjusted = dict(zip(compared, holm(list(compared.values())), strict=True))
    return tuple(
        replace(
            model,
            cells=tuple(
                replace(cell, adjusted_p=adjusted[_question(model, index)]) if cell.difference else cell
                for index, cell in enumerate(model.cells)
            ),
        )
        for model in models
    )


def _question(model: Model, column: int) -> tuple[str, str, int]:
    """What a difference of ``model`` asks: equal for runs that share it."""
    return model.role, model.content or model.contender.letter, column


def _speeds(
    contenders: Sequence[Contender],
) -> tuple[dict[tuple[str, str], tuple[SpeedScore, SpeedRatio | None]], list[str]]:
    """(letter, role) -> speed and its ratio to the teacher's, of all runs that were timed like the first of them."""
    timed = [(contender, contender.run.speed) for contender in contenders if contender.run.speed is not None]
    reasons = [
        f"{c.letter} has no speed: it was not measured there (`eval.speed: true`)."
        for c in contenders
        if timed and c.run.speed is None
    ]
    if not timed:
        return {}, ["No run has a speed: it was not measured (`eval.speed: true`)."]
    first, speed = timed[0]
    speeds: dict[tuple[str, str], tuple[SpeedScore, SpeedRatio | None]] = {}
    for contender, own in timed:
        wanted, settings = _timing(speed), _timing(own)
        other = [field for field in wanted if wanted[field] != settings[field]]
        if other:
            field = other[0]
            reasons.append(
                f"The speeds of {contender.letter} are left out: {field} is {settings[field]!r} there and "
                f"{wanted[field]!r} in {first.letter}, so they are not of one kind."
            )
            continue
        teacher = own.roles.get("teacher")
        for role, score in own.roles.items():
            ratio = speed_ratio(score, teacher, "decode") if teacher else None
            speeds[contender.letter, role] = score, ratio
    return speeds, reasons


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
                yield f"{contender.letter} has no {role} model here: {contender.file(role)} does not exist."
        if "teacher" not in contender.run.evaluations:
            same = teacher_of(contender, contenders)
            said = "that of another run is used, of the same model" if same else "so nothing is known of what it kept"
            yield f"{contender.letter} has no evaluation of its teacher; {said}."
    if models := [contender for contender in contenders if contender.is_model]:
        beside = run_beside(contenders).letter
        names = listed(f"{contender.letter} ({contender.name})" for contender in models)
        yield (
            f"{names}: no run but a model as it is, which was asked what {beside} was asked; what it “keeps” is its "
            f"score above chance as a share of that of the teacher of {beside}."
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
        yield f"{WRITING} says how a model writes, not the same of all: {told}. Generated answers differ by that too."


def _restless(first: Contender, other: Contender, common: Common) -> Iterator[str]:
    """What the same teacher did otherwise: the noise of the machine, which no interval over items holds."""
    pairs = [[score_of(c.run.evaluations["teacher"], task) for c in (first, other)] for task in common.tasks]
    differences = [paired(before, after) for before, after in pairs]
    binary = [difference for difference in differences if difference.test == "mcnemar-exact"]
    changed = sum(difference.won + difference.lost for difference in binary)
    if changed:
        yield (
            f"The same teacher answered {changed} of {sum(difference.n for difference in binary):,} items otherwise in "
            f"{other.letter} than in {first.letter} (another machine, library or batch size): so much of a difference "
            "means nothing."
        )
