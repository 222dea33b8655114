"""What a run directory holds: its artifacts, which have to be of one run."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from shoal.artifacts.artifact import Artifact, differences
from shoal.artifacts.evaluation import CONTROL, MODEL, ROLES, Scores, Speed
from shoal.artifacts.importance import Importance
from shoal.artifacts.plan import Plan
from shoal.artifacts.training import Training
from shoal.atomic_files import read_json
from shoal.errors import UserError
from shoal.recipe.remembered import refuse_misplaced

log = logging.getLogger(__name__)
OF_THE_STUDENT = ("student", "prune.", "control.")
"""Beginnings of inputs of a training in which a control differs from the student's."""
A = TypeVar("A", bound=Artifact)


@dataclass(frozen=True)
class Run:
    """Everything a run directory holds; None or absent = that stage has not run."""

    folder: Path
    recipe: dict[str, Any] | None
    importance: Importance | None
    plan: Plan | None
    training: Training | None
    evaluations: dict[str, Scores]
    speed: Speed | None
    numerics: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Precision of the numbers and the reason for it, as in run.json; empty = not recorded."""

    @property
    def model(self) -> str:
        """Name of the model in the recipe, else `the model`."""
        return (self.recipe or {}).get("model") or "the model"

    @property
    def results(self) -> dict[str, Artifact]:
        """Every result by its file."""
        made = (self.importance, self.plan, self.training)
        return {
            **{artifact.FILE: artifact for artifact in made if artifact is not None},
            **{f"eval/{role}.json": evaluation for role, evaluation in self.evaluations.items()},
            **({Speed.FILE: self.speed} if self.speed else {}),
        }


def read_story(folder: Path) -> dict[str, Any]:
    """run.json of a run directory; empty if there is none."""
    file = folder / "run.json"
    story = read_json(file)
    parts = {"recipe": story.get("recipe") if file.exists() else {}, "numerics": story.get("numerics") or {}}
    if wrong := next((key for key, part in parts.items() if not isinstance(part, dict)), None):
        raise UserError(f"{file}: {wrong} must be a mapping, got {type(story.get(wrong)).__name__}; delete the file")
    return story


def read_run(folder: Path) -> Run:
    """The artifacts of a run directory, whichever exist.

    Raises:
        UserError: no such folder, nothing of a run in it, an artifact that cannot be read, or artifacts of another run
            among them.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run directory; run a stage of the recipe first")
    refuse_misplaced(folder)
    evaluations = {
        role: evaluation
        for role in (*ROLES, MODEL)
        if (evaluation := read_result(Scores, folder / "eval" / f"{role}.json")) is not None
    }
    run_file = read_story(folder)
    run = Run(
        folder=folder,
        recipe=run_file.get("recipe"),
        importance=read_result(Importance, folder / Importance.FILE),
        plan=read_result(Plan, folder / Plan.FILE),
        training=read_result(Training, folder / Training.FILE),
        evaluations=evaluations,
        speed=read_result(Speed, folder / Speed.FILE),
        numerics=run_file.get("numerics") or {},
    )
    if not run.results and (folder / "compare.json").is_file():
        raise UserError(f"{folder}: is the output of an earlier comparison; leave it out")
    if not run.results:
        raise UserError(f"{folder}: has no result to report; run `shoal measure`, `prune`, `distill` or `eval` first")
    _refuse_mixed_runs(run)
    _leave_out_control_of_other_training(run)
    return run


def read_result(kind: type[A], path: Path) -> A | None:
    """The artifact at ``path``; None where it was not made. Raises as its ``read`` does."""
    return kind.load(path) if path.exists() else None


def _refuse_mixed_runs(run: Run) -> None:
    """Refuse results of different models in one folder, as copying files or pruning again leaves them.

    Which settings they were scored with is compared task by task: scoring one role anew is no other run.
    """
    for role, evaluation in run.evaluations.items():
        if evaluation.role != role:
            raise UserError(
                f"{run.folder / 'eval' / role}.json: role is {evaluation.role!r}, but the file's name is {role!r}; "
                "rename it back, or run `shoal eval` again"
            )
    verbs = {Importance: "measure", Plan: "prune", Training: "distill"}
    for subject, entries in _identities(run).items():
        (first, _, expected), *others = entries or [("", "", None)]
        for file, field, value in others:
            if value != expected:
                verb = next((verb for kind, verb in verbs.items() if file.endswith(kind.FILE)), "eval")
                raise UserError(
                    f"{run.folder / file}: {field} is {value!r}, but {expected!r} in {run.folder / first}: {subject} "
                    f"of another run. Run `shoal {verb}` again with this run's recipe, or delete the file"
                )


def _leave_out_control_of_other_training(run: Run) -> None:
    """Forget the scores of a control that was trained on other text or with other settings than the distilled model, as
    one that a recipe no longer asks for."""
    control = read_result(Training, run.folder / CONTROL / Training.FILE)
    if control is None or run.training is None or CONTROL not in run.evaluations:
        return
    own, others = run.training.provenance.inputs, control.provenance.inputs
    both = {key for key in own.keys() & others.keys() if not key.startswith(OF_THE_STUDENT)}
    if unlike := differences({key: own[key] for key in both}, {key: others[key] for key in both}):
        del run.evaluations[CONTROL]
        told = "control: not used, as its training differs from the distilled model's: %s; eval.control=true trains it"
        log.warning(told, "; ".join(unlike))


def _identities(run: Run) -> dict[str, list[tuple[str, str, Any]]]:
    """What every file says that it was made from: (file, field, value), the file that the others follow from first."""
    subjects = {"pruned": "the student", "distilled": "the distilled model"}
    subjects = {role: subjects.get(role, f"the {role}") for role in ROLES}
    entries: dict[str, list[tuple[str, str, Any]]] = {subject: [] for subject in subjects.values()}
    for part in filter(None, (run.plan, run.importance, run.training)):
        entries["the teacher"].append((part.FILE, "model", part.provenance.inputs.get("model")))
    if run.training:
        entries["the student"].append((Training.FILE, "student", run.training.provenance.inputs.get("student")))
    for role, subject in subjects.items():
        if evaluation := run.evaluations.get(role):
            entries[subject].append((f"eval/{role}.json", "model", evaluation.provenance.inputs.get("model")))
        if run.speed and role in run.speed.roles:
            entries[subject].append((Speed.FILE, role, run.speed.provenance.inputs.get(role)))
    told = {subject: [entry for entry in files if entry[2] is not None] for subject, files in entries.items()}
    if run.plan:
        cut = {role: run.evaluations[role] for role in ("pruned", "distilled") if role in run.evaluations}
        told["the depth"] = [
            (Plan.FILE, "keep", len(run.plan.keep)),
            *((f"eval/{role}.json", "num_layers", evaluation.num_layers) for role, evaluation in cut.items()),
        ]
        whole = (run.plan, run.importance) if run.importance else ()
        told["the model"] = [(part.FILE, "num_layers", part.num_layers) for part in whole]
    if run.plan and run.training and "prune.drop" in run.training.provenance.inputs:
        dropped = list(run.training.provenance.inputs["prune.drop"])
        told["the cut"] = [(Plan.FILE, "drop", list(run.plan.drop)), (Training.FILE, "prune.drop", dropped)]
    return told
