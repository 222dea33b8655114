"""The record and distill stages: signals/, distilled/ and distill.json, and what they refuse before anything starts.

Code of compress and train is imported where it is used, so that a verb loads only what it runs.
"""

from __future__ import annotations

import dataclasses
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.artifacts.evaluation import CONTROL, PERPLEXITY
from shoal.artifacts.identity import Identity
from shoal.artifacts.plan import Plan
from shoal.artifacts.training import Training
from shoal.atomic_files import fingerprint
from shoal.data.image_rows import ImageReader
from shoal.data.sources import sources_fingerprint, to_write
from shoal.data.streams import check_source
from shoal.machine import ranks_to_start
from shoal.models.anatomy import refuse_both_directions
from shoal.models.checkpoint_files import model_fingerprint
from shoal.models.load import Checkpoint, LoadSettings
from shoal.progress import doing
from shoal.ranks import world_size
from shoal.recipe.distill import Recorded
from shoal.recipe.evaluate import Eval
from shoal.recipe.losses import HiddenStates
from shoal.recipe.section import Shapes, as_dict, shaping
from shoal.runtime import agreed, device, everyone_sees, free_memory, seed_everything
from shoal.tracking import wandb_run

from ..early.run_directory import student_missing
from .overlap import search_of_rows
from .prune import expected_plan, read_goals, read_plan
from .run import Run, check_length

if TYPE_CHECKING:
    from shoal.train.student.spec import Ranks, TrainSpec

log = logging.getLogger(__name__)


def record(run: Run) -> None:
    """signals/: what the teacher says of the training rows. All ranks take part, in an initialised process group."""
    from shoal.train import distill as training
    from shoal.train.student.spec import Ranks

    recipe, settings = run.recipe, run.recipe.distill
    assert isinstance(settings.teacher, Recorded)
    check_length(run, settings.sequence_length, "distill.sequence_length")
    # which layers' states are kept is known by the plan; else any as large will do
    is_by_plan = settings.teacher.prefix or any(isinstance(term, HiddenStates) for term in settings.terms)
    spec = training_spec(run, read_plan(run) if is_by_plan else expected_plan(run), Ranks.here())
    training.check_distillable(spec)
    seed_everything(recipe.seed)
    inputs = _inputs(run, {})
    rows = training.rows_of(spec, spec.teacher.tokenizer(), run.dir / "text", inputs)
    training.recorded(spec, rows, run.dir, inputs, verify=True)


def checkpoint_of(run: Run) -> Checkpoint:
    """The full model, as the recipe loads it."""
    return Checkpoint.read(run.teacher, LoadSettings(**run.load_args()))


def distill(run: Run) -> None:
    """distilled/ and distill.json, and those of control/ where eval.control asks for them. All ranks take part, inside
    an initialised process group."""
    from shoal.train import distill as training
    from shoal.train.preflight.fit import check_control
    from shoal.train.student.control import control_spec
    from shoal.train.student.spec import Ranks

    recipe, control_dir = run.recipe, run.dir / CONTROL
    check_length(run, recipe.distill.sequence_length, "distill.sequence_length")
    plan = read_plan(run)
    due = agreed(lambda: trainings_due(run, plan))
    if not due:
        return
    if run.dir in due and not everyone_sees(run.dir / "student" / "config.json"):
        raise student_missing(run.dir)
    spec = training_spec(run, plan, Ranks.here())
    control = control_spec(spec) if recipe.eval.control else None
    from shoal.eval.evaluate import QuickScores  # takes seconds, and nobody needs it where nothing is due

    watched = watched_by(run)
    scorer = watched and partial(QuickScores, settings=watched, config=run.config(), seed=recipe.seed)
    train = partial(training.distill, home=run.dir, make_scorer=scorer)
    if run.dir in due:
        if control is not None and control_dir in due:
            with doing("estimating what the control takes"):
                agreed(lambda: check_control(control, control_dir, spec, run.dir))
        seed_everything(recipe.seed)
        train(
            spec,
            run_dir=run.dir,
            inputs=due[run.dir],
            search_rows=search_of_rows(run),
            start_tracking=partial(wandb_run.start, recipe.track, run.dir, as_dict(recipe)),
        )
        log.info("distill: %s", run.dir / "distilled")
        free_memory()
        due = agreed(lambda: trainings_due(run, plan))  # which rows the control reads may be known only now
    if control is not None and control_dir in due:
        log.info("distill: the control (the teacher, trained on the same rows)")
        seed_everything(recipe.seed)
        # its curve is in its distill.json alone: a W&B run has one axis of steps
        train(control, run_dir=control_dir, inputs=due[control_dir], start_tracking=lambda: None)
        log.info("distill: %s", control_dir / "distilled")


def training_spec(run: Run, plan: Plan, ranks: Ranks) -> TrainSpec:
    """The training of the student of ``plan``, whether student/ is there or not."""
    from shoal.compress.surgery.narrow_config import student_config
    from shoal.train.student.spec import train_spec

    folder, teacher = run.dir / "student", checkpoint_of(run)
    if everyone_sees(folder / "config.json"):
        student = Checkpoint.read(folder, teacher.load)
    else:
        student = Checkpoint(folder, student_config(teacher.config, plan.keep, plan.width), teacher.load)
    spec = train_spec(teacher, student, plan, run.recipe.distill, ranks)
    return dataclasses.replace(spec, is_forced=run.force, model=run.recipe.model)


def distill_is_done(run: Run) -> bool:
    """Whether distilled/ is there already, and control/ where it is asked for, so that no launcher need be started."""
    refuse_other_checkpoints(run)
    return _has_model(run.dir / "distilled") and not trainings_due(run, read_plan(run))


def what_is_trained(run: Run) -> list[str] | None:
    """What is out of date of distill.json and what it tells of, in words: nothing where it stays; None where a model is
    missing. The student is there.

    Raises:
        UserError: checkpoints of other settings, with which training would be refused.
    """
    refuse_other_checkpoints(run)
    told = list[str]()
    for folder, asked in trainings(run, read_plan(run)).items():
        changed = asked.changed()
        if changed is None or not _has_model(folder / "distilled"):
            return None
        told += changed
    return told


def trainings(run: Run, plan: Plan) -> dict[Path, Identity[Training]]:
    """What this recipe trains, by folder: the student, and the control where eval.control asks for it."""
    asked = {run.dir: training_inputs(run, plan)}
    if run.recipe.eval.control:
        asked[run.dir / CONTROL] = control_inputs(run, plan)
    return {folder: Identity(Training, folder / Training.FILE, inputs, "distill") for folder, inputs in asked.items()}


def trainings_due(run: Run, plan: Plan) -> dict[Path, dict[str, Any]]:
    """What identifies each of the trainings whose model is still to be made."""
    return {
        folder: asked.inputs
        for folder, asked in trainings(run, plan).items()
        if not (_has_model(folder / "distilled") and asked.is_done())
    }


def _has_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def refuse_other_checkpoints(run: Run) -> None:
    """Refuse a training that its ranks would refuse, before any is started and before the log promises one.

    Raises:
        UserError: checkpoints of other settings are in the way, the plan is of another run, or its student is gone.
    """
    from shoal.train.engine.checkpoint import last_complete
    from shoal.train.identity import checkpoint_inputs

    if not (run.dir / Plan.FILE).is_file():
        return
    settings = run.recipe.distill
    for folder, asked in trainings(run, read_plan(run)).items():
        if not (folder / "checkpoints").is_dir() or asked.is_there():
            continue  # trained already, whatever number of ranks would train it now
        identity = checkpoint_inputs(settings, asked.inputs)
        if settings.batch_size is None:
            identity["distill.batch_size"] *= ranks_to_start(run.recipe.num_processes)
        last_complete(folder / "checkpoints", identity, by_manifest=True)


def training_inputs(run: Run, plan: Plan) -> dict[str, Any]:
    """The identity of distilled/. Where student/ is gone, distill.json alone still knows which one it was."""
    student, trained, cut = run.dir / "student", run.dir / Training.FILE, dict[str, Any]()
    if _has_model(student):
        cut["student"] = model_fingerprint(student)
    elif trained.is_file():
        cut["student"] = Training.load(trained).provenance.inputs.get("student")
    return _inputs(run, {"prune.drop": list(plan.drop), **cut})


def control_inputs(run: Run, plan: Plan) -> dict[str, Any]:
    """The identity of control/distilled/: no student, and of the plan what decides how the control is trained."""
    from shoal.train.student.control import control_identity

    return _inputs(run, control_identity(run.recipe.distill, plan))


def _inputs(run: Run, trained: dict[str, Any]) -> dict[str, Any]:
    from shoal.train.identity import distill_inputs

    recipe = run.recipe
    general = shaping(recipe, Shapes.TRAINING)
    inputs = distill_inputs(recipe.distill, teacher=run.teacher_fingerprint, trained=trained, general=general)
    return inputs | _chosen_by(run)


def _chosen_by(run: Run) -> dict[str, Any]:
    """Of section `eval`, by content, what distill.watch chooses the best state by; nothing where it chooses none."""
    watch, scored = run.recipe.distill.watch, watched_by(run)
    if watch is None or scored is None or watch.metric_for_best_model is None:
        return {}
    from shoal.eval.tasks.names import local_data_fingerprint, tasks_fingerprint

    if watch.metric_for_best_model == PERPLEXITY:
        chosen_by = {"data": sources_fingerprint(scored.perplexity_data)}
    else:
        folder = scored.data_dir
        chosen_by = {
            "tasks": tasks_fingerprint(scored.tasks, scored.include_path),
            "num_fewshot": scored.num_fewshot,
            "apply_chat_template": scored.apply_chat_template,
            "data": None if folder is None else local_data_fingerprint(folder, scored.include_path),
        }
    return {"distill.watch.metric_for_best_model (files)": fingerprint(chosen_by)}


def check_distill(run: Run) -> None:
    """Refuse what training would refuse, before anything is measured, cut or launched.

    Raises:
        UserError: more ranks than cores or devices, impossible layers, unknown tasks or training arguments, rows that
            cannot be divided, kernels that cannot be had, bundled text with reworded questions, another recording,
            tracking without a key.
    """
    from shoal.compress.plan import stand_in
    from shoal.eval.evaluate import WATCHED, checked_items, num_items
    from shoal.eval.tasks.load import tasks_of
    from shoal.eval.tasks.names import named_in
    from shoal.train.engine.arguments import check_names, deepspeed_config
    from shoal.train.engine.kernels import require_liger

    recipe = run.recipe
    refuse_both_directions(run.config())
    check_names(recipe.distill, ranks=max(world_size(), ranks_to_start(recipe.num_processes)))
    deepspeed_config(recipe.distill)
    wandb_run.wandb_mode(recipe.track)
    if recipe.distill.trainer.get("use_liger_kernel"):
        require_liger(run.config().model_type, device())
    _refuse_other_recording(run)
    check_length(run, recipe.distill.sequence_length, "distill.sequence_length")
    if not (run.dir / Plan.FILE).is_file():
        stand_in(run.prune, num_layers=run.num_layers, goals=read_goals(run))
    tokenizer = run.tokenizer()
    distill = recipe.distill
    images = ImageReader.of(distill.data, checkpoint_of(run)) if distill.has_images else None
    for source in distill.data:
        if source.generate is not None:
            to_write(source, sequence_length=distill.sequence_length)
        if images is not None and source.has_images:
            images.check(source, sequence_length=distill.sequence_length)
        else:
            check_source(source, tokenizer, sequence_length=distill.sequence_length, packing=distill.packing)
    num_items(tasks_of(recipe.eval), recipe.eval)
    if (watched := watched_by(run)) is not None and watched.tasks:
        num_ranks = max(world_size(), ranks_to_start(recipe.num_processes))
        with named_in("distill.watch", *WATCHED):
            tasks = tasks_of(watched)
            checked_items(tasks, watched, config=run.config(), tokenizer=tokenizer, num_ranks=num_ranks)


def _refuse_other_recording(run: Run) -> None:
    """Refuse a folder of signals that is not the run's own and holds others, as far as it is known without a plan."""
    from shoal.train.teacher.recording import RecordingManifest, Wanted

    settings = run.recipe.distill
    if not isinstance(settings.teacher, Recorded) or settings.teacher.path is None:
        return
    folder = settings.teacher.folder(run.dir)
    if (folder / RecordingManifest.FILE).is_file():
        told = run.teacher_fingerprint, settings.sequence_length, settings.teacher, settings.recorded_temperature
        Wanted(checkpoint_of(run), *told).require(folder)


def watched_by(run: Run) -> Eval | None:
    """Section `eval` as distill.watch scores by it; None where nothing is watched."""
    watch, settings = run.recipe.distill.watch, run.recipe.eval
    return watch and dataclasses.replace(
        settings, tasks=watch.tasks, limit=watch.limit, perplexity_tokens=watch.perplexity_tokens
    )
