"""The stages in order: what each needs, whether it is done, and where its result goes.

Room code is imported where it is used, so that a verb loads only what it runs.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shoal.artifact import (
    Artifact,
    Evaluation,
    Importance,
    Provenance,
    PruningPlan,
    Speed,
    Training,
    differences,
    write_json,
    written_folder,
)
from shoal.data import TEACHER_TEXT, check_source, load_texts, row_texts, sources_fingerprint
from shoal.edits import Edit, Replace
from shoal.errors import UserError
from shoal.machine import ranks_to_start
from shoal.measuring import check_measure, measure, measure_inputs
from shoal.models import load_config, load_model, load_tokenizer, model_fingerprint
from shoal.overlap import as_data, find_overlap
from shoal.packing import PackedRows
from shoal.recipe import Recipe, as_dict
from shoal.run import Run, barrier, check_length, is_done, locked, require, task_files_fingerprint
from shoal.runtime import device, environment, is_main, seed_everything

log = logging.getLogger(__name__)

RECORDING = "recording.json"
OVERLAP_TOKENS = 50_000_000
"""So much of the training text is searched for evaluation items at most: minutes, not hours."""

# --- prune --------------------------------------------------------------------------------------------------------


def plan_inputs(run: Run) -> dict[str, Any]:
    """What identifies plan.json and student/: the importance layers were chosen by and what edits read included."""
    from shoal.compress.plan import is_automatic

    prune = run.recipe.prune
    other = ("proof", "targets", "edits")
    section = {f"prune.{key}": value for key, value in as_dict(prune).items() if key not in other}
    inputs = {"model": run.teacher_fingerprint, **section}
    if is_automatic(prune):
        inputs["importance"] = Provenance(measure_inputs(run)).fingerprint
    for index, edit in enumerate(prune.edits):
        inputs[f"prune.edits.{index}"] = as_dict(edit)
        if isinstance(edit, Replace):
            inputs[f"prune.edits.{index}.data"] = sources_fingerprint(edit.data)
            inputs |= {"seed": run.recipe.seed, "dtype": run.recipe.dtype, "attention": run.recipe.attention}
    donors = run.donor_fingerprints.items()
    return {**inputs, **{f"prune.edits.{index}.donor": found for index, found in donors}}


def prune(run: Run) -> None:
    """plan.json and student/. Measures first where the layers are chosen by a metric."""
    from shoal.compress.plan import check_choice, is_automatic

    if is_automatic(run.recipe.prune) and not (run.dir / Importance.FILE).is_file():
        check_choice(run.recipe.prune, num_layers=run.num_layers)
        _refuse_impossible_edits(run)
        log.info("prune: needs %s, measuring first", Importance.FILE)
        measure(run)
    importance = _importance(run)
    path, student = run.dir / PruningPlan.FILE, run.dir / "student"
    inputs = plan_inputs(run)
    if (student / "config.json").is_file() and is_done(PruningPlan, path, inputs, "prune"):
        _refuse_for_targets(run, PruningPlan.read(path))
        return
    _refuse_stale_training(run)
    plan = _plan(run, importance, inputs)
    _refuse_unreadable_data(plan.edits)
    _refuse_for_targets(run, plan)
    log.info("prune: %s", plan.in_words())
    for line in _sacrifice(run, importance, plan):
        log.info("prune: %s", line)
    if is_main():
        from shoal.compress.apply import apply_plan
        from shoal.compress.targets import check_targets, log_verdicts

        path.unlink(missing_ok=True)  # the plan is written last: a plan without its student is never seen
        apply_plan(
            run.teacher,
            plan,
            student,
            donors=run.donors,
            seed=run.recipe.seed,
            proof=run.recipe.prune.proof,
            trust_remote_code=run.recipe.trust_remote_code,
        )
        plan.write(path)
        log.info("prune: %s", student)
        if not run.recipe.prune.targets:
            log_verdicts(check_targets(load_config(student)))
    barrier()


def prune_dry_run(run: Run) -> str:
    """What `shoal prune` would do and what would come of it, for a reader. Writes nothing and measures nothing.

    Raises:
        UserError: what pruning would refuse, and importance.json missing where layers are chosen by it.
    """
    from shoal.compress.dry_run import dry_run

    recipe = run.recipe
    _refuse_unreadable_data(recipe.prune.edits)
    importance = _importance(run)
    plan = _plan(run, importance, {})
    told = dry_run(
        run.teacher,
        plan,
        run.dir / "student",
        donors=run.donors,
        proof=recipe.prune.proof,
        targets=recipe.prune.targets,
        dtype=recipe.dtype,
        trust_remote_code=recipe.trust_remote_code,
    )
    return "\n".join([told, *_sacrifice(run, importance, plan)])


def _importance(run: Run) -> Importance | None:
    """importance.json, where layers are chosen by it and it is there."""
    from shoal.compress.plan import is_automatic

    path = run.dir / Importance.FILE
    if not is_automatic(run.recipe.prune) or not path.is_file():
        return None
    require(Importance, path, measure_inputs(run), "shoal measure")
    return Importance.read(path)


def _plan(run: Run, importance: Importance | None, inputs: dict[str, Any]) -> PruningPlan:
    from shoal.compress.plan import choose_changes

    choice = choose_changes(run.recipe.prune, num_layers=run.num_layers, importance=importance)
    return PruningPlan(Provenance(inputs), run.num_layers, choice.drop, choice.reason, choice.edits)


def _sacrifice(run: Run, importance: Importance | None, plan: PruningPlan) -> Sequence[str]:
    """What the plan is expected to cost, for a reader; nothing where no task was swept on this model."""
    from shoal.compress.sacrifice import expected_sacrifice

    path = run.dir / Importance.FILE
    if importance is None and path.is_file():
        found = Importance.read(path)
        importance = None if differences(measure_inputs(run), found.provenance.inputs) else found
    if importance is None or importance.atlas is None:
        return ()
    return expected_sacrifice(importance, plan.drop, plan.edits)


def _refuse_impossible_edits(run: Run) -> None:
    """Refuse edits that apply_plan would refuse before it loads a model, and data that cannot be read."""
    from shoal.compress.edit import refuse_impossible_edits

    edits, trusted = run.recipe.prune.edits, run.recipe.trust_remote_code
    refuse_impossible_edits(run.teacher, edits, run.donors, trust_remote_code=trusted)
    _refuse_unreadable_data(edits)


def _refuse_unreadable_data(edits: Sequence[Edit]) -> None:
    for source in {source for edit in edits if isinstance(edit, Replace) for source in edit.data}:
        load_texts(source, max_characters=1)


def _refuse_for_targets(run: Run, plan: PruningPlan) -> None:
    """Refuse a plan whose student a target or the GGUF export would not take, or would take for another model."""
    from shoal.compress.targets import refuse_for_targets, student_config

    targets, gguf = run.recipe.prune.targets, run.recipe.export.gguf
    if not targets and not gguf:
        return
    config = load_config(run.teacher, trust_remote_code=run.recipe.trust_remote_code)
    student = student_config(config, plan.keep)
    if targets:
        refuse_for_targets(student, targets)
    if gguf:
        from shoal.compress.gguf_export import refuse_gguf

        refuse_gguf(student)


def _refuse_stale_training(run: Run) -> None:
    if any((run.dir / "checkpoints").glob("checkpoint-*")) and (run.dir / PruningPlan.FILE).is_file():
        raise UserError(
            f"{run.dir}: holds checkpoints trained on another cut "
            f"({'; '.join(_plan_changes(run)) or 'student/ is gone'}). "
            "Set the recipe back, choose another run_dir, or delete its checkpoints folder"
        )


def _plan_changes(run: Run) -> list[str]:
    return differences(plan_inputs(run), PruningPlan.read(run.dir / PruningPlan.FILE).provenance.inputs)


# --- record, distill ----------------------------------------------------------------------------------------------


def read_plan(run: Run) -> PruningPlan:
    """plan.json of this run; made first where it is missing.

    Raises:
        UserError: it belongs to another model or to other settings.
    """
    path = run.dir / PruningPlan.FILE
    if not path.is_file():
        log.info("needs %s, pruning first", PruningPlan.FILE)
        prune(run)
    else:
        require(PruningPlan, path, plan_inputs(run), "shoal prune")
    return PruningPlan.read(path)


def record(run: Run) -> None:
    """signals/: what the teacher says of the training rows. All ranks take part, in an initialised process group."""
    from shoal.train.distill import rows_to_train_on
    from shoal.train.record import record_signals
    from shoal.train.recording import recording_layout, rows_from

    recipe = run.recipe
    settings = dataclasses.replace(recipe.distill, num_tokens=recipe.record.num_tokens or recipe.distill.num_tokens)
    trust = recipe.trust_remote_code
    check_length(run, settings.sequence_length, "distill.sequence_length")
    # refuses what the teacher cannot give before any text is read
    recording_layout(recipe.record, run.teacher, sequence_length=settings.sequence_length, trust_remote_code=trust)
    seed_everything(recipe.seed)
    inputs = {
        "model": run.teacher_fingerprint,
        "data": sources_fingerprint(settings.data),
        "seed": recipe.seed,
        "dtype": recipe.dtype,
        "attention": recipe.attention,
        **{f"distill.{key}": value for key, value in as_dict(settings).items()},
    }
    tokenizer = load_tokenizer(run.teacher, trust_remote_code=trust)
    rows = rows_to_train_on(run.teacher, tokenizer, settings, run.dir, inputs=inputs, trust_remote_code=trust)
    record_signals(
        run.teacher,
        rows,
        signals_folder(run),
        recipe.record,
        model=run.teacher_fingerprint,
        rows_from=rows_from(inputs),
        **run.load_args(),
    )


def signals_folder(run: Run) -> Path:
    """Where this recipe's signals are written."""
    folder = run.recipe.record.folder
    return run.dir / "signals" if folder is None else Path(folder).expanduser()


def distill(run: Run) -> None:
    """distilled/ and distill.json. All ranks take part, inside an initialised process group."""
    from shoal.train import distill as room

    plan = read_plan(run)
    recipe = run.recipe
    inputs = training_inputs(run, plan)
    distilled = run.dir / "distilled"
    if (distilled / "config.json").is_file() and is_done(Training, run.dir / Training.FILE, inputs, "distill"):
        return
    seed_everything(recipe.seed)
    room.distill(
        run.teacher,
        run.dir / "student",
        plan,
        run_dir=run.dir,
        settings=recipe.distill,
        record=recipe.record,
        track=recipe.track,
        scorer=_scorer(run),
        search_rows=_search_rows(run),
        inputs=inputs,
        recipe=as_dict(recipe),
        seed=recipe.seed,
        dtype=recipe.dtype,
        attention=recipe.attention,
        trust_remote_code=recipe.trust_remote_code,
    )
    log.info("distill: %s", distilled)


def distill_dry_run(run: Run) -> str:
    """What `shoal distill` would take on this machine, for a reader. Writes nothing and trains nothing.

    Raises:
        UserError: what pruning would refuse if it has still to choose layers, what training would, and a family whose
            memory cannot be told without running it.
    """
    from shoal.compress.targets import student_config
    from shoal.train.dry_run import dry_run

    recipe = run.recipe
    check_training_settings(recipe)
    check_length(run, recipe.distill.sequence_length, "distill.sequence_length")
    has_plan = (run.dir / PruningPlan.FILE).is_file()
    plan = read_plan(run) if has_plan else _plan(run, _importance(run), {})
    teacher = load_config(run.teacher, trust_remote_code=recipe.trust_remote_code)
    ranks = ranks_to_start(recipe.distill.num_ranks)
    return dry_run(
        teacher,
        student_config(teacher, plan.keep),
        plan,
        settings=recipe.distill,
        run_dir=run.dir,
        dtype=recipe.dtype,
        attention=recipe.attention,
        ranks=ranks,
        ranks_per_node=min(ranks, ranks_to_start(None)) if device().type != "cpu" else ranks,
        device=device(),
    )


def _scorer(run: Run) -> Callable[[PreTrainedTokenizerBase], Callable[[PreTrainedModel], Mapping[str, Any]]] | None:
    """What distill.watch scores a student with, made for a tokenizer; None where nothing is watched."""
    from shoal.eval.quick import QuickScores

    watch, settings = run.recipe.distill.watch, run.recipe.eval
    if watch is None:
        return None
    quick = dataclasses.replace(
        settings,
        tasks=watch.tasks,
        limit=watch.limit,
        limits={},
        perplexity_tokens=max(1, watch.perplexity_tokens),
        sequence_length=min(settings.sequence_length, run.recipe.distill.sequence_length),
    )
    return partial(QuickScores, settings=quick, seed=run.recipe.seed, held_out=watch.perplexity_tokens > 0)


def _search_rows(run: Run) -> Callable[[PackedRows, PreTrainedTokenizerBase], dict[str, Any]] | None:
    """What looks for evaluation items in training rows, by task; None where the recipe does not want it."""
    from shoal.eval.evaluate import num_items
    from shoal.eval.item_texts import item_texts
    from shoal.eval.tasks import load_tasks

    settings = run.recipe.eval
    if not run.recipe.distill.overlap:
        return None

    def search(rows: PackedRows, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        tasks = load_tasks(settings.tasks, include_path=settings.include_path, num_fewshot=settings.num_fewshot)
        documents = row_texts(rows, tokenizer, max_tokens=OVERLAP_TOKENS)
        found = find_overlap(item_texts(tasks, num_items(tasks, settings)), documents)
        searched = min(rows.input_ids_NS.numel(), OVERLAP_TOKENS)
        return {"overlap": as_data(found), "tokens_searched_for_overlap": searched}

    return search


def distill_is_done(run: Run) -> bool:
    """Whether distilled/ is there already, so that no launcher need be started."""
    if not (run.dir / "distilled" / "config.json").is_file():
        return False
    return is_done(Training, run.dir / Training.FILE, training_inputs(run, read_plan(run)), "distill")


def training_inputs(run: Run, plan: PruningPlan) -> dict[str, Any]:
    """The identity of distilled/."""
    from shoal.train.distill import distill_inputs

    recipe = run.recipe
    return distill_inputs(
        recipe.distill,
        recipe.record,
        teacher=run.teacher_fingerprint,
        student=model_fingerprint(run.dir / "student"),
        drop=plan.drop,
        seed=recipe.seed,
        dtype=recipe.dtype,
        attention=recipe.attention,
    )


# --- eval ---------------------------------------------------------------------------------------------------------


def roles(run: Run) -> dict[str, Path]:
    """The models that exist now, by role."""
    found = {"teacher": run.teacher, "pruned": run.dir / "student", "distilled": run.dir / "distilled"}
    return {role: folder for role, folder in found.items() if (folder / "config.json").is_file()}


def eval_inputs(run: Run, folder: Path) -> dict[str, Any]:
    """What identifies the evaluation of the model in ``folder``."""
    section = {f"eval.{key}": value for key, value in as_dict(run.recipe.eval).items() if key != "speed"}
    return {
        "model": model_fingerprint(folder),
        "data": sources_fingerprint(run.recipe.eval.perplexity_data),
        "seed": run.recipe.seed,
        "dtype": run.recipe.dtype,
        "attention": run.recipe.attention,
        "tasks": task_files_fingerprint(run.recipe.eval.include_path),
        **section,
    }


def evaluate(run: Run) -> None:
    """eval/<role>.json of every model that exists, and eval/speed.json. All ranks take part."""
    from shoal.eval.evaluate import role_evaluation

    check_length(run, run.recipe.eval.sequence_length, "eval.sequence_length")
    found = roles(run)
    _require_models_of_this_run(run, found)
    for role, folder in found.items():
        path = run.dir / "eval" / f"{role}.json"
        inputs = eval_inputs(run, folder)
        if is_done(Evaluation, path, inputs, f"eval {role}"):
            continue
        log.info("eval: %s (%s)", role, folder)
        seed_everything(run.recipe.seed)
        model = load_model(folder, device=device(), **run.load_args())
        tokenizer = load_tokenizer(folder, trust_remote_code=run.recipe.trust_remote_code)
        result = role_evaluation(
            role, model, tokenizer, run.recipe.eval, folder=folder, inputs=inputs, seed=run.recipe.seed
        )
        if is_main():
            result.write(path)
        del model
        barrier()
    if run.recipe.eval.speed and is_main():
        _speed(run, found)
    barrier()


def _require_models_of_this_run(run: Run, found: dict[str, Path]) -> None:
    """Refuse a student/ or distilled/ that other settings made: scores of different runs would share a table."""
    if "pruned" in found or "distilled" in found:
        plan = read_plan(run)
        if "distilled" in found:
            require(Training, run.dir / Training.FILE, training_inputs(run, plan), "shoal distill")


def _require_this_run(run: Run) -> None:
    """Refuse to report or export results that other settings made, naming the first that differs."""
    found = roles(run)
    _require_models_of_this_run(run, found)
    if (run.dir / Importance.FILE).is_file():
        require(Importance, run.dir / Importance.FILE, measure_inputs(run), "shoal measure")
    for role, folder in found.items():
        path = run.dir / "eval" / f"{role}.json"
        if path.is_file():
            require(Evaluation, path, eval_inputs(run, folder), "shoal eval")


def _speed(run: Run, found: dict[str, Path]) -> None:
    from shoal.eval.speed import measure_speed

    path = run.dir / Speed.FILE
    inputs = {
        "dtype": run.recipe.dtype,
        "attention": run.recipe.attention,
        **{role: model_fingerprint(folder) for role, folder in found.items()},
    }
    if is_done(Speed, path, inputs, "speed"):
        return
    log.info("eval: speed of %s, interleaved", ", ".join(found))
    measure_speed(found, provenance=Provenance(inputs), **run.load_args()).write(path)


# --- report, export, run ------------------------------------------------------------------------------------------


def report(run: Run) -> None:
    """report.html and report.md, then what the recipe exports: a GGUF file, a push to the Hub."""
    from shoal.eval.report import write_report

    _require_this_run(run)
    _write_story(run)
    path = write_report(run.dir)
    log.info("report: %s", path)
    if run.recipe.export.gguf:
        export_gguf(run)
    if run.recipe.export.hub_repo is not None:
        export(run)


def export_gguf(run: Run) -> None:
    """gguf/<model>-<role>.gguf, proven, of the distilled checkpoint, or of the pruned one where there is no other."""
    from shoal.compress import gguf_export as room

    found = roles(run)
    role = next((role for role in ("distilled", "pruned") if role in found), None)
    if role is None:
        raise UserError(f"{run.dir}: nothing to export yet; run `shoal prune` first")
    inputs = {"model": model_fingerprint(found[role]), "converter": room.converter_fingerprint()}
    path = run.dir / room.Gguf.FILE
    if is_done(room.Gguf, path, inputs, "gguf") and (path.parent / room.Gguf.read(path).file).is_file():
        return
    name = re.sub(r"[^\w.-]+", "-", f"{Path(run.recipe.model).name}-{role}.gguf")
    log.info("gguf: converting %s with llama.cpp's converter", found[role])
    with written_folder(path.parent) as temporary:
        proof = room.export_gguf(found[role], temporary / name)
        room.Gguf(Provenance(inputs), name, proof).write(temporary / path.name)
    log.info("gguf: %s: %s", path.parent / name, proof.in_words())


def export(run: Run) -> None:
    """Push distilled/ with its model card to the Hub."""
    from shoal.eval.card import model_card
    from shoal.eval.hub import push

    distilled = run.dir / "distilled"
    if not (distilled / "config.json").is_file():
        raise UserError(f"{distilled}: nothing to export yet; run `shoal distill` first")
    assert run.recipe.export.hub_repo is not None
    url = push(
        distilled,
        model_card(run.dir, base_folder=run.teacher),
        run.recipe.export.hub_repo,
        private=run.recipe.export.private,
    )
    log.info("export: %s", url)


def check_training_settings(recipe: Recipe) -> None:
    """Refuse training settings that cannot work, without loading anything.

    Raises:
        UserError: an unknown training argument, a wrong DeepSpeed configuration, tracking without a key.
    """
    from shoal.train.arguments import check_names, deepspeed_config
    from shoal.train.tracking import wandb_mode

    check_names(recipe.distill)
    deepspeed_config(recipe.distill)
    wandb_mode(recipe.track)


def check_recording(recipe: Recipe) -> None:
    """Refuse a recording that is not there, before anything is measured, cut or launched.

    Raises:
        UserError: it is not.
    """
    recorded = recipe.distill.teacher.recorded
    if recorded is not None and not (Path(recorded).expanduser() / RECORDING).is_file():
        raise UserError(
            f"distill.teacher.recorded: {recorded} is no folder of recorded signals; run `shoal record` first, which "
            "writes RUN_DIR/signals, or name the folder that it wrote"
        )


def preflight(run: Run) -> None:
    """Refuse within seconds what a later stage would refuse after hours: layers, data, tasks, training arguments.

    Raises:
        UserError: as the stages do.
    """
    from shoal.compress.plan import check_choice, is_automatic
    from shoal.eval.tasks import load_tasks

    recipe = run.recipe
    check_choice(recipe.prune, num_layers=run.num_layers)
    _refuse_impossible_edits(run)
    if recipe.export.gguf:
        from shoal.compress.gguf_export import check_export

        check_export(load_config(run.teacher, trust_remote_code=recipe.trust_remote_code))
    if not is_automatic(recipe.prune):
        _refuse_for_targets(run, _plan(run, None, {}))
    check_measure(run)
    for name in ("distill", "eval"):
        check_length(run, getattr(recipe, name).sequence_length, f"{name}.sequence_length")
    check_training_settings(recipe)
    check_recording(recipe)
    tokenizer = load_tokenizer(run.teacher, trust_remote_code=recipe.trust_remote_code)
    for source in recipe.distill.data:
        if source.path != TEACHER_TEXT:
            distill = recipe.distill
            check_source(source, tokenizer, sequence_length=distill.sequence_length, packing=distill.packing)
    for source in recipe.eval.perplexity_data:
        load_texts(source, max_characters=1)
    load_tasks(recipe.eval.tasks, include_path=recipe.eval.include_path, num_fewshot=recipe.eval.num_fewshot)


def run_all(run: Run, launch_distill: Callable[[], None]) -> None:
    """Every stage that is not done; ``launch_distill`` runs the distill stage under the DeepSpeed launcher.

    The run directory is let go while the launched ranks hold it.
    """
    with locked(run):
        preflight(run)
        _write_story(run)
        measure(run)
        prune(run)
        distilled = distill_is_done(run)
    if not distilled:
        launch_distill()
    with locked(run):
        evaluate(run)
        report(run)


def _write_story(run: Run) -> None:
    """run.json: the resolved recipe, versions, and the fingerprint of every stage that is there."""
    if not is_main():
        return
    stages = {}
    kinds: list[tuple[str, type[Artifact]]] = [
        (Importance.FILE, Importance),
        (PruningPlan.FILE, PruningPlan),
        (Training.FILE, Training),
        *((f"eval/{role}.json", Evaluation) for role in ("teacher", "pruned", "distilled")),
        (Speed.FILE, Speed),
    ]
    for name, kind in kinds:
        if (run.dir / name).is_file():
            provenance = kind.read(run.dir / name).provenance
            stages[name] = {"fingerprint": provenance.fingerprint, "created": provenance.created}
    story = {"recipe": as_dict(run.recipe), "environment": environment(), "stages": stages}
    write_json(run.dir / "run.json", story)
