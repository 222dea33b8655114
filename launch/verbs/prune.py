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
from shoal.artifacts.plan import Plan
from shoal.data.sources import load_texts, sources_fingerprint
from shoal.models.checkpoint_files import model_fingerprint
from shoal.models.load import load_config, without_data
from shoal.ranks import is_main
from shoal.recipe.measure import METRICS
from shoal.recipe.prune import CutThese, Width
from shoal.recipe.section import Shapes, shaping
from shoal.runtime import agreed, barrier, everyone_sees

from ..early.asked import Asked
from ..early.run_directory import refuse_trained, require_student_of
from .measure import importance_of, measure
from .overlap import search_of_rows
from .run import Run, check_length

if TYPE_CHECKING:
    from shoal.compress.free_layers import Goals
    from shoal.compress.metrics.metric import Calibration
    from shoal.compress.plan import Choice

log = logging.getLogger(__name__)


def prune(run: Run, *, for_training: bool = False) -> None:
    """plan.json and student/. Measures first where the layers are chosen by a metric. ``for_training`` refuses layers
    with which checkpoints could not go on."""
    student = run.dir / "student"
    if agreed(lambda: (student / "config.json").is_file() and plan_of(run).is_done()):
        refuse_unfit_student(run, _plan_of_its_student(run))
        return
    if not _is_named(run) and not everyone_sees(run.dir / Importance.FILE):
        refuse_impossible_plan(run)
        log.info("prune: needs %s, measuring first", Importance.FILE)
        measure(run)
    importance, asked = read_importance(run), plan_of(run)
    plan, path = choose_plan(run, importance, asked.inputs), asked.path
    refuse_impossible_changes(run, plan)
    refuse_unfit_student(run, plan)
    if for_training:
        refuse_trained(Asked("distill", run.recipe), plan.drop)
    log.info("prune: %s", plan.in_words())
    for line in sacrifice(run, importance, plan):
        log.info("prune: %s", line)
    if is_main():
        from shoal.compress.apply import apply_plan, changes_of
        from shoal.compress.gguf import misreading

        text, told = _calibration(run, plan)
        path.unlink(missing_ok=True)  # the plan is written last: a plan without its student is never seen
        applied = apply_plan(
            run.teacher,
            plan,
            student,
            changes=changes_of(run.recipe.prune),
            text=text,
            trust_remote_code=run.recipe.trust_remote_code,
        )
        replace(applied, text=told, student=applied.sealed(model_fingerprint(student))).save(path)
        log.info("prune: %s", student)
        if (problem := misreading(load_config(student))) is not None:
            log.warning("prune: llama.cpp would run another model than this student: %s", problem)
    barrier()


def read_plan(run: Run) -> Plan:
    """plan.json of this run; made first where it is missing.

    Raises:
        UserError: it belongs to another model, to other settings, or to another student.
    """
    if not everyone_sees(run.dir / Plan.FILE):
        log.info("needs %s, pruning first", Plan.FILE)
        prune(run, for_training=True)
        everyone_sees(run.dir / Plan.FILE)
    else:
        asked = plan_of(run)
        if asked.changed():
            read_importance(run)  # whose own settings say more than that it is another one
        asked.require()
    return _plan_of_its_student(run)


def _plan_of_its_student(run: Run) -> Plan:
    """plan.json, as student/ was made by it."""
    plan = Plan.load(run.dir / Plan.FILE)
    require_student_of(plan, run.dir)
    return plan


def sacrifice(run: Run, importance: Importance | None, plan: Plan) -> Sequence[str]:
    """What the plan is expected to cost, for a reader; nothing where no task was swept on this model."""
    from shoal.compress.sweeps.columns import expected_sacrifice

    if importance is None and (asked := importance_of(run)).is_there():
        importance = asked.require()
    if importance is None or importance.atlas is None:
        return ()
    return expected_sacrifice(importance, plan.drop)


def _calibration(run: Run, plan: Plan) -> tuple[Calibration | None, dict[str, Any]]:
    """The text that prune.changes are decided on, and what of evaluation items stands in it; None and nothing where
    there are none."""
    from shoal.compress.apply import changes_of, num_tokens_of
    from shoal.compress.changes.calibration import calibration_rows
    from shoal.compress.metrics.metric import Calibration

    if not (changes := changes_of(run.recipe.prune)):
        return None, {}
    settings, tokenizer = run.recipe.measure, run.tokenizer()
    num_tokens = num_tokens_of(changes, without_data(run.config()), plan, settings)
    rows = calibration_rows(settings, tokenizer, seed=run.recipe.seed, num_tokens=num_tokens)
    told = {"sources": rows.counts, **search_of_rows(run, "the text of prune.changes")(rows, tokenizer)}
    return Calibration(rows, settings.batch_size), told


def plan_of(run: Run) -> Identity[Plan]:
    """plan.json as this recipe makes it."""
    return Identity(Plan, run.dir / Plan.FILE, plan_inputs(run), "prune")


def plan_inputs(run: Run) -> dict[str, Any]:
    """What identifies plan.json and student/: the importance layers were chosen by included."""
    prune = run.recipe.prune
    inputs = {"model": run.teacher_fingerprint, **shaping(prune, Shapes.PLAN, "prune.")}
    if not _is_named(run):
        inputs["importance"] = importance_of(run).provenance.fingerprint
    if prune.changes:
        inputs |= shaping(run.recipe, Shapes.PLAN) | shaping(run.recipe.measure, Shapes.PLAN, "measure.")
        inputs["data"] = sources_fingerprint(run.recipe.measure.data)
    return inputs


def _is_named(run: Run) -> bool:
    """Whether the recipe names the layers that go."""
    return isinstance(run.recipe.prune, CutThese)


def read_goals(run: Run) -> Goals | None:
    """What prune.target asks of this run's teacher; None where it is not set.

    Raises:
        UserError: targets that say nothing about this model, or lack what they need.
    """
    from shoal.compress.layer_sizes import goals_of, layer_sizes

    if isinstance(prune := run.recipe.prune, CutThese) or (target := prune.target) is None:
        return None
    if target.sequence_length is not None:
        check_length(run, target.sequence_length, "prune.target.sequence_length")
    sizes = layer_sizes(run.teacher, trust_remote_code=run.recipe.trust_remote_code)
    return goals_of(target, sizes)


def read_importance(run: Run) -> Importance | None:
    """importance.json, where layers are chosen by it and it is there."""
    if _is_named(run) or not everyone_sees(run.dir / Importance.FILE):
        return None
    return importance_of(run).require()


def refuse_unmeasured(run: Run) -> None:
    """Refuse to choose by what nothing in the recipe measures, or measures too short, before hours are spent on it.

    The choice is made among columns without scores, whose names and lengths are known beforehand. Where importance.json
    is there and belongs to this run, it tells.
    """
    if _is_named(run):
        return
    from shoal.compress.free_layers import free_layers
    from shoal.compress.plan import choose_changes
    from shoal.compress.sweeps.placeholder import placeholder_importance

    prune, num_layers, goals = run.prune, run.num_layers, read_goals(run)
    if isinstance(prune, CutThese) or importance_of(run).is_there():
        return
    free = free_layers(prune, num_layers)
    if goals is not None and any(len({goal.layers[layer] for layer in free}) > 1 for goal in goals.goals):
        # which removals reach most is not known before they are ordered
        prune, goals = replace(prune, target=None, num_drop=1), None
    with_tasks = bool(prune.chosen_by - {*METRICS} or prune.spare) or "cornerstone" in prune.protect
    scored = run.swept if with_tasks else None
    to_come = placeholder_importance(
        run.recipe.measure, num_layers, removals=run.num_removals, go_first=free, scored=scored
    )
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
    if _is_named(run):
        plan = choose_plan(run, None, {})
        refuse_impossible_changes(run, plan)
        refuse_unfit_student(run, plan)


def refuse_impossible_changes(run: Run, plan: Plan) -> None:
    """Refuse changes that apply_plan would refuse, as far as that shows without the model, and unreadable data."""
    from shoal.compress.apply import changes_of
    from shoal.compress.surgery.teacher import read_teacher

    changes = changes_of(run.recipe.prune)
    if not changes:
        return
    check_length(run, run.recipe.measure.sequence_length, "measure.sequence_length")
    teacher = read_teacher(run.teacher, trust_remote_code=run.recipe.trust_remote_code)
    for change in changes:
        teacher = change.sizes(teacher, plan)
    for source in run.recipe.measure.data:  # last, since some take seconds to read
        load_texts(source, max_characters=1)


def refuse_unfit_student(run: Run, plan: Plan) -> None:
    """Refuse a plan that no configuration can express, and one whose student llama.cpp would take for
    another model where a GGUF file is to be written."""
    from shoal.compress.surgery.narrow_config import student_config

    student = student_config(run.config(), plan.keep, plan.width)
    if run.recipe.export.gguf:
        from shoal.compress.gguf import refuse_misread

        refuse_misread(student)


def choose_plan(run: Run, importance: Importance | None, inputs: dict[str, Any]) -> Plan:
    """The plan that the recipe asks for, with ``inputs`` as its provenance; nothing is written."""
    from shoal.compress.plan import choose_changes

    if importance is None:
        refuse_unmeasured(run)
    prune = run.prune
    choice = choose_changes(prune, num_layers=run.num_layers, importance=importance, goals=read_goals(run))
    return _plan(run, choice, inputs)


def expected_plan(run: Run) -> Plan:
    """The plan that this run will make; before layers are measured, one that drops as many, whose reason says so."""
    from shoal.compress.plan import stand_in

    if _is_named(run) or agreed(lambda: importance_of(run).is_there()):
        return choose_plan(run, read_importance(run), {})
    return _plan(run, stand_in(run.prune, num_layers=run.num_layers, goals=read_goals(run)), {})


def _plan(run: Run, choice: Choice, inputs: dict[str, Any]) -> Plan:
    """The plan of ``choice``, with how wide the layers of the student are; what stays of each is chosen once it is
    cut."""
    from shoal.compress.surgery.narrow_config import kept_width

    widths = [kept_width(run.config(), change) for change in run.recipe.prune.changes if isinstance(change, Width)]
    told = ["the largest outputs of every layer stay"] if widths else []
    reason = "; ".join(filter(None, [choice.reason, *told]))
    width = widths[0] if widths else None
    origin = Provenance(inputs, model=run.recipe.model)
    return Plan(origin, run.num_layers, **vars(replace(choice, reason=reason)), width=width)
