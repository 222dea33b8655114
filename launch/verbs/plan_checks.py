"""What pruning refuses before a model is loaded: changes and text that do not go with it."""

from __future__ import annotations

from shoal.artifacts.plan import PruningPlan
from shoal.data.sources import load_texts
from shoal.errors import UserError
from shoal.recipe.prune import Calibration

from .plan import choose_plan, read_goals, refuse_unmeasured, width_of
from .run import Run, check_length


def refuse_impossible_plan(run: Run) -> None:
    """Refuse what no measurement could make possible, before hours are spent on one.

    Raises:
        UserError: a choice of layers that cannot be made, changes that the model does not allow, unreadable data.
    """
    from shoal.compress.plan import check_choice, is_automatic

    check_choice(run.prune, num_layers=run.num_layers, goals=read_goals(run))
    refuse_unmeasured(run)
    refuse_impossible_changes(run)
    if not is_automatic(run.recipe.prune):
        plan = choose_plan(run, None, {})
        refuse_compensation(run, plan)
        refuse_unfit_student(run, plan)


def refuse_impossible_changes(run: Run) -> None:
    """Refuse changes that apply_plan would refuse, as far as that shows without the model, and unreadable data."""
    _refuse_calibration(run)
    if run.recipe.prune.compensate is not None:
        from shoal.compress.changes.fit import refuse_quantised

        refuse_quantised(run.teacher, run.config())
    if (width := width_of(run)) is not None:
        from shoal.compress.changes.narrowing import narrowing

        narrowing(run.teacher, run.config(), width)


def refuse_compensation(run: Run, plan: PruningPlan) -> None:
    """Refuse what cannot be made up for, and calibration text that cannot be read, before a model is loaded."""
    _refuse_calibration(run)
    if run.recipe.prune.compensate is None:
        return
    if 0 in plan.drop:
        raise UserError(
            "prune.compensate: layer 0 is dropped, and no layer below it is left whose weights could make up for it; "
            "keep it, or leave prune.compensate out"
        )


def calibration_of(run: Run) -> tuple[str, Calibration] | None:
    """The section of the recipe that decides by calibration text, and its name; there is one of them at most."""
    prune = run.recipe.prune
    named = {"prune.compensate": prune.compensate, "prune.width": prune.width}
    return next(((name, settings) for name, settings in named.items() if settings is not None), None)


def _refuse_calibration(run: Run) -> None:
    """Refuse rows that are too long for the model, and text that cannot be read."""
    if (calibration := calibration_of(run)) is None:
        return
    name, settings = calibration
    check_length(run, settings.sequence_length, f"{name}.sequence_length")
    for source in settings.data:
        load_texts(source, max_characters=1)


def refuse_unfit_student(run: Run, plan: PruningPlan) -> None:
    """Refuse a plan that no configuration can express, and one whose student llama.cpp would take for
    another model where a GGUF file is to be written."""
    from shoal.compress.surgery.narrow_config import student_config

    student = student_config(run.config(), plan.keep, plan.width)
    if run.recipe.export.gguf:
        from shoal.compress.gguf.export import refuse_misread

        refuse_misread(student)
