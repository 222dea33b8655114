"""The prune stage: which layers go, by a metric or named, plan.json and student/, and what no measurement could make
possible.

Room code is imported where it is used, so that a verb loads only what it runs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.identity import Identity
from shoal.artifacts.importance import Importance
from shoal.artifacts.plan import LAB, KeptWidth, Plan
from shoal.data.sources import load_texts, sources_fingerprint
from shoal.errors import UserError
from shoal.models.checkpoint_files import model_fingerprint
from shoal.models.load import load_config
from shoal.ranks import is_main
from shoal.recipe.measure import METRICS
from shoal.recipe.section import Shapes, shaping
from shoal.runtime import barrier

from .measure import importance_of, measure
from .overlap import search_of_rows
from .run import Run, check_length

if TYPE_CHECKING:
    from shoal.compress.layer_sizes import Goals

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
        from shoal.compress.apply import apply_plan, changes_of
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
        replace(plan, student=plan.sealed(model_fingerprint(student))).save(path)
        log.info("prune: %s", student)
        if (problem := misreading(load_config(student))) is not None:
            log.warning("prune: llama.cpp would run another model than this student: %s", problem)
    barrier()


def what_is_cut(run: Run) -> list[str] | None:
    """What is out of date of plan.json and student/, in words: nothing where they stay; None where one is missing."""
    return plan_of(run).changed() if (run.dir / "student" / "config.json").is_file() else None


def read_plan(run: Run) -> Plan:
    """plan.json of this run; made first where it is missing.

    Raises:
        UserError: it belongs to another model, to other settings, or to another student.
    """
    if not (run.dir / Plan.FILE).is_file():
        log.info("needs %s, pruning first", Plan.FILE)
        prune(run)
    else:
        plan_of(run).require()
    return _plan_of_its_student(run)


def _plan_of_its_student(run: Run) -> Plan:
    """plan.json, as student/ was made by it.

    Raises:
        UserError: one of the two was changed after the cut.
    """
    path, student = run.dir / Plan.FILE, run.dir / "student"
    plan = Plan.load(path)
    is_there = plan.student and (student / "config.json").is_file()
    if is_there and plan.student != plan.sealed(model_fingerprint(student)):
        raise UserError(
            f"{path}: says {plan.in_words()!r}, and {student} was not made so: one of them was changed after the cut. "
            "Delete plan.json and run `shoal prune` again; to choose other layers, set prune.drop"
        )
    return plan


def sacrifice(run: Run, importance: Importance | None, plan: Plan) -> Sequence[str]:
    """What the plan is expected to cost, for a reader; nothing where no task was swept on this model."""
    from shoal.compress.sweeps.columns import expected_sacrifice

    if importance is None and (asked := importance_of(run)).is_there():
        importance = asked.require()
    if importance is None or importance.atlas is None:
        return ()
    return expected_sacrifice(importance, plan.drop)


def _calibration_text(run: Run) -> dict[str, Any]:
    """What prune.compensate is fitted to, or prune.width chosen on, and what of evaluation items stands in it."""
    from shoal.compress.apply import changes_of
    from shoal.compress.changes.calibration import calibration_rows

    for change in changes_of(run.recipe.prune):
        if (settings := change.calibration) is not None:
            tokenizer = run.tokenizer()
            rows = calibration_rows(settings, tokenizer, seed=run.recipe.seed, section=change.SECTION)
            return {"sources": rows.counts, **search_of_rows(run, f"the text of {change.SECTION}")(rows, tokenizer)}
    return {}


def plan_of(run: Run) -> Identity[Plan]:
    """plan.json as this recipe makes it."""
    return Identity(Plan, run.dir / Plan.FILE, plan_inputs(run), "prune")


def plan_inputs(run: Run) -> dict[str, Any]:
    """What identifies plan.json and student/: the importance layers were chosen by included. Of a student that a part
    of the lab made it is that part and its settings, whatever the recipe says of `prune`."""
    path = run.dir / Plan.FILE
    made = Plan.load(path).provenance.inputs if path.is_file() else {}
    if LAB in made:
        return {**made, "model": run.teacher_fingerprint}
    prune = run.recipe.prune
    inputs = {"model": run.teacher_fingerprint, **shaping(prune, Shapes.PLAN, "prune.")}
    if prune.drop is None:
        inputs["importance"] = importance_of(run).provenance.fingerprint
    for name, settings in (("compensate", prune.compensate), ("width", prune.width)):
        if settings is not None:
            inputs |= shaping(settings, Shapes.PLAN, f"prune.{name}.") | shaping(run.recipe, Shapes.PLAN)
            inputs[f"prune.{name}.data"] = sources_fingerprint(settings.data)
    return inputs


def read_goals(run: Run) -> Goals | None:
    """What prune.target asks of this run's teacher; None where it is not set.

    Raises:
        UserError: targets that say nothing about this model, or lack what they need.
    """
    from shoal.compress.layer_sizes import goals_of, layer_sizes

    target = run.recipe.prune.target
    if target is None:
        return None
    for name in ("memory_gb", "speedup"):
        if (serving := getattr(target, name)) is not None and serving.length is not None:
            check_length(run, serving.length, f"prune.target.{name}.length")
    sizes = layer_sizes(run.teacher, trust_remote_code=run.recipe.trust_remote_code)
    return goals_of(target, sizes)


def read_importance(run: Run) -> Importance | None:
    """importance.json, where layers are chosen by it and it is there."""
    if run.recipe.prune.drop is not None or not (run.dir / Importance.FILE).is_file():
        return None
    return importance_of(run).require()


def refuse_unmeasured(run: Run) -> None:
    """Refuse to choose by what nothing in the recipe measures, or measures too short, before hours are spent on it.

    The choice is made among columns without scores, whose names and lengths are known beforehand. Where importance.json
    is there and belongs to this run, it tells.
    """
    from shoal.compress.metrics.greedy import TASK_ORDER
    from shoal.compress.plan import choose_changes, free_layers
    from shoal.compress.sweeps.placeholder import placeholder_importance

    if run.recipe.prune.drop is not None or importance_of(run).is_there():
        return
    prune, num_layers, goals = run.prune, run.num_layers, read_goals(run)
    free = free_layers(prune, num_layers)
    if goals is not None and any(len({goal.layers[layer] for layer in free}) > 1 for goal in goals.goals):
        # which removals reach most is not known before they are ordered
        prune, goals = replace(prune, target=None, num_drop=1), None
    tasks_choose = bool({prune.metric, *prune.weights} - {None, *METRICS, TASK_ORDER})
    with_tasks = tasks_choose or bool(prune.spare) or "cornerstone" in prune.protect
    to_come = placeholder_importance(run.recipe.measure, num_layers, go_first=free, with_tasks=with_tasks)
    choose_changes(prune, num_layers=num_layers, importance=to_come, goals=goals)


def refuse_impossible_plan(run: Run) -> None:
    """Refuse what no measurement could make possible, before hours are spent on one.

    Raises:
        UserError: a choice of layers that cannot be made, changes that the model does not allow, unreadable data.
    """
    from shoal.compress.plan import stand_in

    stand_in(run.prune, num_layers=run.num_layers, goals=read_goals(run))
    refuse_unmeasured(run)
    refuse_impossible_changes(run, Plan(Provenance({}), run.num_layers, (), "not chosen yet"))
    if run.recipe.prune.drop is not None:
        plan = choose_plan(run, None, {})
        refuse_impossible_changes(run, plan)
        refuse_unfit_student(run, plan)


def refuse_impossible_changes(run: Run, plan: Plan) -> None:
    """Refuse changes that apply_plan would refuse, as far as that shows without the model, and unreadable data."""
    from shoal.compress.apply import changes_of
    from shoal.compress.surgery.teacher import read_teacher

    changes = changes_of(run.recipe.prune)
    teacher = read_teacher(run.teacher, trust_remote_code=run.recipe.trust_remote_code) if changes else None
    for change in changes:
        if (settings := change.calibration) is not None:
            check_length(run, settings.sequence_length, f"{change.SECTION}.sequence_length")
            for source in settings.data:
                load_texts(source, max_characters=1)
        assert teacher is not None
        teacher = change.sizes(teacher, plan)


def refuse_unfit_student(run: Run, plan: Plan) -> None:
    """Refuse a plan that no configuration can express, and one whose student llama.cpp would take for
    another model where a GGUF file is to be written."""
    from shoal.compress.surgery.narrow_config import student_config

    student = student_config(run.config(), plan.keep, plan.width)
    if run.recipe.export.gguf:
        from shoal.compress.gguf import refuse_misread

        refuse_misread(student)


def choose_plan(run: Run, importance: Importance | None, inputs: dict[str, Any]) -> Plan:
    """The plan that the recipe asks for, with ``inputs`` as its provenance; nothing is written.

    Raises:
        UserError: an impossible choice.
    """
    from shoal.compress.plan import choose_changes

    if importance is None:
        refuse_unmeasured(run)
    prune = run.prune
    choice = choose_changes(prune, num_layers=run.num_layers, importance=importance, goals=read_goals(run))
    told = [f"what stays of each layer writes most, on {prune.width.num_tokens:,} tokens"] if prune.width else []
    reason = "; ".join(filter(None, [choice.reason, *told]))
    chosen = replace(choice, reason=reason)
    return Plan(Provenance(inputs), run.num_layers, **vars(chosen), width=width_of(run))


def expected_plan(run: Run) -> Plan:
    """The plan that this run will make; before layers are measured, one that drops as many, whose reason says so.

    Raises:
        UserError: an impossible choice.
    """
    from shoal.compress.plan import stand_in

    if run.recipe.prune.drop is not None or importance_of(run).is_there():
        return choose_plan(run, read_importance(run), {})
    choice = stand_in(run.prune, num_layers=run.num_layers, goals=read_goals(run))
    return Plan(Provenance({}), run.num_layers, choice.drop, choice.reason, width=width_of(run))


def width_of(run: Run) -> KeptWidth | None:
    """How wide the layers of the student are; what stays of each is chosen once it is cut."""
    from shoal.compress.surgery.narrow_config import kept_width

    return None if (settings := run.recipe.prune.width) is None else kept_width(run.config(), settings)
