"""The stages after training and all of them in order: evaluate, report, export, run.

Code of compress and eval is imported where it is used, so that a verb loads only what it runs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shoal.artifacts.artifact import Artifact, Evaluation, Importance, Provenance, PruningPlan, Speed, Training
from shoal.atomic_files import write_json, written_folder
from shoal.data.sources import load_texts, sources_fingerprint
from shoal.errors import UserError
from shoal.models.load import Checkpoint, LoadSettings, load_config, model_fingerprint
from shoal.progress import doing
from shoal.recipe.section import Shapes, as_dict, shaping
from shoal.redaction import redacted
from shoal.runtime import barrier, environment, is_main, seed_everything
from shoal.stages.distill import check_distill, distill_is_done, training_inputs
from shoal.stages.measure import check_measure, measure, measure_inputs
from shoal.stages.prune import choose_plan, prune, read_plan, refuse_impossible_changes, refuse_unfit_student
from shoal.stages.run import Run, check_length, is_done, local_data_fingerprint, locked, require

log = logging.getLogger(__name__)

# --- eval ---------------------------------------------------------------------------------------------------------


def roles(run: Run) -> dict[str, Path]:
    """The models that exist now, by role."""
    found = {"teacher": run.teacher, "pruned": run.dir / "student", "distilled": run.dir / "distilled"}
    return {role: folder for role, folder in found.items() if (folder / "config.json").is_file()}


def eval_inputs(run: Run, folder: Path) -> dict[str, Any]:
    """What identifies the evaluation of the model in ``folder``."""
    from shoal.eval.tasks.names import tasks_fingerprint

    settings = run.recipe.eval
    inputs = {
        "model": model_fingerprint(folder),
        "data": sources_fingerprint(settings.perplexity_data),
        **shaping(run.recipe, Shapes.SCORES),
        "tasks": tasks_fingerprint(settings.tasks, settings.include_path),
    }
    if settings.data_dir is not None:
        inputs["eval.data_dir (files)"] = local_data_fingerprint(settings.data_dir)
    return {**inputs, **shaping(settings, Shapes.SCORES, "eval.")}


def speed_inputs(run: Run, found: dict[str, Path]) -> dict[str, Any]:
    """What identifies the speed of these models, by role."""
    settings = {**shaping(run.recipe, Shapes.SPEED), **shaping(run.recipe.eval, Shapes.SPEED, "eval.")}
    return {**settings, **{role: model_fingerprint(folder) for role, folder in found.items()}}


def evaluate(run: Run) -> None:
    """eval/<role>.json of every model that exists, and eval/speed.json. All ranks take part."""
    from shoal.eval.evaluate import role_evaluation
    from shoal.eval.harness.tokenizer_check import require_same_tokenizer
    from shoal.eval.suites import rest_in_words
    from shoal.eval.tasks.load import tasks_of

    check_length(run, run.recipe.eval.sequence_length, "eval.sequence_length")
    found = roles(run)
    _require_models_of_this_run(run, found)
    require_same_tokenizer(found, trust_remote_code=run.recipe.trust_remote_code)
    prune = run.recipe.prune
    if list(found) == ["teacher"] and (prune.drop or prune.num_drop or prune.ratio or prune.edits):
        log.warning("eval: %s does not exist: only the teacher is scored; `shoal prune` makes it", run.dir / "student")
    due = _due(run, found)
    load = LoadSettings(**run.load_args())
    checkpoints = {role: Checkpoint.read(folder, load) for role, folder in found.items()}
    seed_everything(run.recipe.seed)  # some tasks of lm-eval draw the order of their options as they are loaded
    with doing("eval: loading the tasks"):  # a wrong one is refused before a model loads
        tasks = tasks_of(run.recipe.eval, seed=run.recipe.seed) if due else {}
    if due and is_main():
        log.info("eval: %s, each: %s", ", ".join(due), _cost_in_words(run, tasks))
    for number, (role, inputs) in enumerate(due.items(), 1):
        path = run.dir / "eval" / f"{role}.json"
        log.info("eval: %s (%s)", role, found[role])
        seed_everything(run.recipe.seed)
        result = role_evaluation(
            role,
            checkpoints[role],
            run.recipe.eval,
            inputs=inputs,
            seed=run.recipe.seed,
            items=run.dir / "eval" / "items",
            tasks=tasks,
        )
        if is_main():
            _tell_of_left_out(path, result)
            result.write(path)
            if rest := rest_in_words(result, list(due)[number:]):
                log.info("eval: %s", rest)
        barrier()
    if run.recipe.eval.speed and is_main():
        _speed(run, found, checkpoints)
    barrier()


def _due(run: Run, found: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Role -> what identifies its evaluation, of the models whose evaluation is not there."""
    inputs = {role: eval_inputs(run, folder) for role, folder in found.items()}
    files = {role: run.dir / "eval" / f"{role}.json" for role in found}
    return {role: own for role, own in inputs.items() if not is_done(Evaluation, files[role], own, f"eval {role}")}


def _cost_in_words(run: Run, tasks: dict[str, Any]) -> str:
    """What every model has to do, by a few items of every task."""
    from shoal.eval.evaluate import num_items
    from shoal.eval.suites import in_words, work_of

    settings = run.recipe.eval
    return in_words(work_of(tasks, num_items(tasks, settings), perplexity_tokens=settings.perplexity_tokens))


def _tell_of_left_out(path: Path, result: Evaluation) -> None:
    """Log how many tasks of an earlier evaluation are no part of the one that takes its place."""
    before = {task.task for task in Evaluation.read(path).tasks} if path.is_file() else set[str]()
    now = {task.task for task in result.tasks}
    if gone := before - now:
        log.warning(
            "eval %s: %d task%s in place of %d; %s no longer scored, answers given stay in eval/items",
            result.role,
            len(now),
            "" if len(now) == 1 else "s",
            len(before),
            f"{', '.join(sorted(gone))} {'is' if len(gone) == 1 else 'are'}",
        )


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


def _speed(run: Run, found: dict[str, Path], checkpoints: dict[str, Checkpoint]) -> None:
    from shoal.eval.speed import measure_speed

    path = run.dir / Speed.FILE
    inputs = speed_inputs(run, found)
    if is_done(Speed, path, inputs, "speed"):
        return
    log.info("eval: speed of %s, interleaved", ", ".join(found))
    batch_sizes = run.recipe.eval.speed_batch_sizes
    measure_speed(checkpoints, provenance=Provenance(inputs), batch_sizes=batch_sizes).write(path)


# --- report, export, run ------------------------------------------------------------------------------------------


def require_results(run: Run) -> None:
    """Refuse to report what is not there, before the lock and run.json would make a run directory of it."""
    from shoal.eval.report.findings import read_run

    read_run(run.dir)


def report(run: Run) -> None:
    """report.html and report.md, then what the recipe exports: a GGUF file, a push to the Hub."""
    from shoal.eval.report.report import write_report

    _require_this_run(run)
    _write_story(run)
    with doing("writing the report"):
        path = write_report(run.dir)
    log.info("report: %s", path)
    if run.recipe.export.gguf:
        export_gguf(run)
    if run.recipe.export.hub_repo is not None:
        export(run)


def export_gguf(run: Run) -> None:
    """gguf/<model>-<role>.gguf, proven, of the distilled checkpoint, or of the pruned one where there is no other."""
    from shoal.compress.targets import gguf

    found = roles(run)
    role = next((role for role in ("distilled", "pruned") if role in found), None)
    if role is None:
        raise UserError(f"{run.dir}: nothing to export yet; run `shoal prune` first")
    inputs = {"model": model_fingerprint(found[role]), "converter": gguf.converter_fingerprint()}
    path = run.dir / gguf.Gguf.FILE
    if is_done(gguf.Gguf, path, inputs, "gguf") and (path.parent / gguf.Gguf.read(path).file).is_file():
        return
    name = re.sub(r"[^\w.-]+", "-", f"{Path(run.recipe.model).name}-{role}.gguf")
    log.info("gguf: converting %s with llama.cpp's converter", found[role])
    with written_folder(path.parent) as temporary:
        proof = gguf.export_gguf(found[role], temporary / name)
        gguf.Gguf(Provenance(inputs), name, proof).write(temporary / path.name)
    log.info("gguf: %s: %s", path.parent / name, proof.in_words())


def export(run: Run) -> None:
    """Push distilled/ with its model card to the Hub."""
    from shoal.eval.export.card import model_card
    from shoal.eval.export.hub import push

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


def preflight(run: Run) -> None:
    """Refuse within seconds what a later stage would refuse after hours: layers, data, tasks, training arguments.

    Raises:
        UserError: as the stages do.
    """
    from shoal.compress.plan import check_choice, is_automatic
    from shoal.eval.evaluate import num_items
    from shoal.eval.tasks.load import tasks_of

    recipe = run.recipe
    check_choice(recipe.prune, num_layers=run.num_layers)
    refuse_impossible_changes(run)
    if recipe.export.gguf:
        from shoal.compress.targets.gguf import check_export

        check_export(load_config(run.teacher, trust_remote_code=recipe.trust_remote_code))
    if not is_automatic(recipe.prune):
        refuse_unfit_student(run, choose_plan(run, None, {}))
    check_measure(run)
    check_distill(run)
    check_length(run, recipe.eval.sequence_length, "eval.sequence_length")
    for source in recipe.eval.perplexity_data:
        load_texts(source, max_characters=1)
    num_items(tasks_of(recipe.eval), recipe.eval)


def run_all(run: Run, launch_distill: Callable[[], None]) -> None:
    """Every stage that is not done; ``launch_distill`` runs the distill stage under the DeepSpeed launcher.

    The run directory is let go while the launched ranks hold it.
    """
    with locked(run):
        preflight(run)
        _write_story(run)
        measure(run)
        prune(run)
        track(run)
        distilled = distill_is_done(run)
    if not distilled:
        launch_distill()
    with locked(run):
        evaluate(run)
        report(run)
        track(run)


def track(run: Run) -> None:
    """Log to W&B what the run directory holds now, as far as the recipe wants it; what fails there is only said."""
    from shoal.tracking.wandb_results import Rows, log_results

    def score_rows(folder: Path) -> Rows:
        from shoal.eval.report.score_rows import score_rows

        return score_rows(folder)

    log_results(run.recipe.track, run.dir, as_dict(run.recipe), teacher=run.teacher, score_rows=score_rows)


def _write_story(run: Run) -> None:
    """run.json: the resolved recipe without secrets, versions, and the fingerprint of every stage that is there."""
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
    numerics = None if run.numerics is None else asdict(run.numerics)
    story = {
        "recipe": redacted(as_dict(run.recipe)),
        "numerics": numerics,
        "environment": environment(),
        "stages": stages,
    }
    write_json(run.dir / "run.json", story)
