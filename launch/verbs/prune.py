"""The prune stage: plan.json and student/, chosen by a metric or named, refused early where they cannot work.

Room code is imported where it is used, so that a verb loads only what it runs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from shoal.artifacts.importance import Importance
from shoal.artifacts.plan import PruningPlan
from shoal.errors import UserError
from shoal.models.checkpoint_files import model_fingerprint
from shoal.models.load import load_config
from shoal.ranks import is_main
from shoal.runtime import barrier

from .measure import importance_of, measure
from .overlap import search_of_rows
from .plan import (
    choose_plan,
    plan_of,
    read_importance,
    refuse_impossible_changes,
    refuse_impossible_plan,
    refuse_unfit_student,
)
from .run import Run

log = logging.getLogger(__name__)


def prune(run: Run) -> None:
    """plan.json and student/. Measures first where the layers are chosen by a metric."""
    student = run.dir / "student"
    if (student / "config.json").is_file() and plan_of(run).is_done():
        refuse_unfit_student(run, _plan_of_its_student(run))
        return
    if run.recipe.prune.drop is None and not (run.dir / Importance.FILE).is_file():
        refuse_impossible_plan(run)
        log.info("prune: needs %s, measuring first", Importance.FILE)
        measure(run)
    importance, asked = read_importance(run), plan_of(run)
    plan, path = choose_plan(run, importance, asked.inputs), asked.path
    refuse_impossible_changes(run, plan)
    refuse_unfit_student(run, plan)
    log.info("prune: %s", plan.in_words())
    for line in sacrifice(run, importance, plan):
        log.info("prune: %s", line)
    if is_main():
        from shoal.compress.apply import apply_plan
        from shoal.compress.changes.table import changes_of
        from shoal.compress.gguf import misreading

        text = _calibration_text(run)
        path.unlink(missing_ok=True)  # the plan is written last: a plan without its student is never seen
        applied = apply_plan(
            run.teacher,
            plan,
            student,
            seed=run.recipe.seed,
            changes=changes_of(run.recipe.prune),
            trust_remote_code=run.recipe.trust_remote_code,
        )
        plan = replace(applied, text=text)
        replace(plan, student=plan.sealed(model_fingerprint(student))).write(path)
        log.info("prune: %s", student)
        if (problem := misreading(load_config(student))) is not None:
            log.warning("prune: llama.cpp would run another model than this student: %s", problem)
    barrier()


def what_is_cut(run: Run) -> list[str] | None:
    """What is out of date of plan.json and student/, in words: nothing where they stay; None where one is missing."""
    return plan_of(run).changed() if (run.dir / "student" / "config.json").is_file() else None


def read_plan(run: Run) -> PruningPlan:
    """plan.json of this run; made first where it is missing.

    Raises:
        UserError: it belongs to another model, to other settings, or to another student.
    """
    if not (run.dir / PruningPlan.FILE).is_file():
        log.info("needs %s, pruning first", PruningPlan.FILE)
        prune(run)
    else:
        plan_of(run).require()
    return _plan_of_its_student(run)


def _plan_of_its_student(run: Run) -> PruningPlan:
    """plan.json, as student/ was made by it.

    Raises:
        UserError: one of the two was changed after the cut.
    """
    path, student = run.dir / PruningPlan.FILE, run.dir / "student"
    plan = PruningPlan.read(path)
    is_there = plan.student and (student / "config.json").is_file()
    if is_there and plan.student != plan.sealed(model_fingerprint(student)):
        raise UserError(
            f"{path}: says {plan.in_words()!r}, and {student} was not made so: one of them was changed after the cut. "
            "Delete plan.json and run `shoal prune` again; to choose other layers, set prune.drop"
        )
    return plan


def sacrifice(run: Run, importance: Importance | None, plan: PruningPlan) -> Sequence[str]:
    """What the plan is expected to cost, for a reader; nothing where no task was swept on this model."""

    from shoal.compress.sweeps.columns import expected_sacrifice

    if importance is None and (asked := importance_of(run)).is_there():
        importance = asked.require()
    if importance is None or importance.atlas is None:
        return ()
    return expected_sacrifice(importance, plan.drop)


def _calibration_text(run: Run) -> dict[str, Any]:
    """What prune.compensate is fitted to, or prune.width chosen on, and what of evaluation items stands in it."""
    from shoal.compress.changes.calibration import calibration_rows
    from shoal.compress.changes.table import changes_of

    for change in changes_of(run.recipe.prune):
        if (settings := change.calibration) is not None:
            tokenizer = run.tokenizer()
            rows = calibration_rows(settings, tokenizer, seed=run.recipe.seed, section=change.SECTION)
            return {"sources": rows.counts, **search_of_rows(run, f"the text of {change.SECTION}")(rows, tokenizer)}
    return {}
