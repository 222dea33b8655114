"""Write the student that a part of the lab has made of a run's model: student/ and plan.json, which `shoal distill` and
`shoal eval` take without knowing the kind of change."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.plan import LAB, Plan, PlannedChange
from shoal.atomic_files import fingerprint, written_folder
from shoal.compress.surgery.proof import behaviour, prove_by_files, prove_by_run
from shoal.compress.surgery.quantised import without_quantization
from shoal.errors import UserError
from shoal.launch.verbs.run import Run
from shoal.models.checkpoint_files import copy_beside, model_fingerprint
from shoal.models.load import load_model
from shoal.progress import doing
from shoal.recipe.section import Section, as_dict

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Edited:
    """A student in memory, and what it is."""

    student: PreTrainedModel
    change: PlannedChange
    in_force: Callable[[], AbstractContextManager[object]]
    """A block in which the teacher answers as the student must."""
    drop: tuple[int, ...] = ()
    """The teacher's layers that the student lacks."""


def loaded_teacher(run: Run) -> PreTrainedModel:
    """The run's model, in memory, in the precision in which it is stored.

    Raises:
        UserError: a quantised one, or a run directory that holds a training.
    """
    if any((run.dir / "checkpoints").glob("checkpoint-*")):
        raise UserError(
            f"{run.dir}: holds a training of another student; choose another run_dir, or delete its checkpoints folder"
        )
    if without_quantization(run.config())[1]:
        raise UserError(f"{run.teacher}: is quantised, so its layers cannot be changed; give the full-precision model")
    return load_model(run.teacher, attention=None, trust_remote_code=run.recipe.trust_remote_code)


def write_student(
    run: Run, part: str, settings: Section, edited: Edited, teacher: PreTrainedModel, read: Mapping[str, Any]
) -> str:
    """Write ``edited`` to student/ of the run directory, proven bit for bit against ``teacher`` with the change in
    force, and its plan.json. ``read`` are fingerprints of what else it was made from. Returns what to do next.

    Raises:
        UserError: a student that gives other answers, a full disk.
    """
    asked = {f"{LAB}.{key}": value for key, value in as_dict(settings).items()}
    inputs = {"model": run.teacher_fingerprint, LAB: part, **asked, "seed": run.recipe.seed, **read}
    words, num_layers = edited.change.words, run.num_layers
    reason = f"shoal lab {part}: {words}"
    origin = Provenance(inputs, model=run.recipe.model)
    plan = Plan(origin, num_layers, edited.drop, reason, changes=(edited.change,))
    out, path = run.dir / "student", run.dir / Plan.FILE
    path.unlink(missing_ok=True)  # the plan is written last: a plan without its student is never seen
    with written_folder(out, key=fingerprint(inputs)) as folder:
        with doing(f"{part}: writing the student"):
            edited.student.save_pretrained(folder)
            copy_beside(run.teacher, folder)
            prove_by_files(folder, teacher, plan.keep)
        with doing(f"{part}: proving the student by running it"):
            with edited.in_force():
                expected = behaviour(teacher)
            prove_by_run(folder, expected, reference=f"the teacher with {words}")
    replace(plan, student=plan.sealed(model_fingerprint(out))).save(path)
    told = f"{plan.in_words()}: {out} and {path} are written"
    return f"{told}\n`shoal distill {run.dir}` trains it, `shoal eval` scores it"
