"""What pruning refuses before a model is loaded: changes and text that do not go with it."""

from __future__ import annotations

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.plan import PruningPlan
from shoal.data.sources import load_texts

from .plan import choose_plan, read_goals, refuse_unmeasured
from .run import Run, check_length


def refuse_impossible_plan(run: Run) -> None:
    """Refuse what no measurement could make possible, before hours are spent on one.

    Raises:
        UserError: a choice of layers that cannot be made, changes that the model does not allow, unreadable data.
    """
    from shoal.compress.plan import check_choice

    check_choice(run.prune, num_layers=run.num_layers, goals=read_goals(run))
    refuse_unmeasured(run)
    refuse_impossible_changes(run, PruningPlan(Provenance({}), run.num_layers, (), "not chosen yet"))
    if run.recipe.prune.drop is not None:
        plan = choose_plan(run, None, {})
        refuse_impossible_changes(run, plan)
        refuse_unfit_student(run, plan)


def refuse_impossible_changes(run: Run, plan: PruningPlan) -> None:
    """Refuse changes that apply_plan would refuse, as far as that shows without the model, and unreadable data."""
    from shoal.compress.changes.table import changes_of
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


def refuse_unfit_student(run: Run, plan: PruningPlan) -> None:
    """Refuse a plan that no configuration can express, and one whose student llama.cpp would take for
    another model where a GGUF file is to be written."""
    from shoal.compress.surgery.narrow_config import student_config

    student = student_config(run.config(), plan.keep, plan.width)
    if run.recipe.export.gguf:
        from shoal.compress.gguf.export import refuse_misread

        refuse_misread(student)
