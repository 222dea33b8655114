"""The stage `eval`: teacher, pruned, control and distilled model on the same items, and how fast they are.

Code of a stage is imported where it is used, so that a verb loads only what it runs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.evaluation import CONTROL, MODEL, Scores, Speed
from shoal.artifacts.identity import Identity
from shoal.atomic_files import fingerprint
from shoal.data.sources import load_texts, sources_fingerprint
from shoal.errors import UserError
from shoal.inference.vllm import check_vllm
from shoal.model_names import name_of_model, names_model
from shoal.models.checkpoint_files import WRITING, model_fingerprint, writing_settings
from shoal.models.load import Checkpoint, LoadSettings
from shoal.progress import doing
from shoal.ranks import is_main, world_size
from shoal.recipe.recipe import Recipe, load_recipe
from shoal.recipe.section import Shapes, shaping
from shoal.runtime import agreed, barrier, environment, free_memory, seed_everything

from ..early.run_directory import require_model_of
from .distill import trainings
from .launch import seeing
from .prune import read_plan
from .run import Run, locked, open_run, resolved, write_story

log = logging.getLogger(__name__)

MODELS = "models"
"""Folder, where a comparison goes, of the scores of checkpoints that are no run's."""


def roles(run: Run) -> dict[str, Path]:
    """The models that exist now, by role; control only where the recipe asks for it."""
    return {role: folder for role, folder in _folders(run).items() if (folder / "config.json").is_file()}


def _folders(run: Run) -> dict[str, Path]:
    """Where the models of a run are, or would be."""
    folders = {"teacher": run.teacher, "pruned": run.dir / "student"}
    if run.recipe.eval.control:
        folders[CONTROL] = run.dir / CONTROL / "distilled"
    return folders | {"distilled": run.dir / "distilled"}


def scores_of(run: Run, role: str, inputs: dict[str, Any]) -> Identity[Scores]:
    """eval/<role>.json as ``inputs`` make it, which are those of eval_inputs."""
    return Identity(Scores, run.dir / "eval" / f"{role}.json", inputs, "eval")


def eval_inputs(run: Run, folder: Path) -> dict[str, Any]:
    """What identifies the evaluation of the model in ``folder``."""
    from shoal.eval.tasks.names import local_data_fingerprint, tasks_fingerprint

    settings = run.recipe.eval
    inputs = {
        "model": model_fingerprint(folder),
        "data": sources_fingerprint(settings.perplexity_data),
        **shaping(run.recipe, Shapes.SCORES),
        "tasks": tasks_fingerprint(settings.tasks, settings.include_path),
    }
    if writing := writing_settings(folder):
        inputs[WRITING] = writing
    if settings.data_dir is not None:
        inputs["eval.data_dir (files)"] = local_data_fingerprint(settings.data_dir, settings.include_path)
    return {**inputs, **shaping(settings, Shapes.SCORES, "eval.")}


def speed_inputs(run: Run, folders: dict[str, Path]) -> dict[str, Any]:
    """What identifies the speed of these models, by role."""
    settings = {**shaping(run.recipe, Shapes.SPEED), **shaping(run.recipe.eval, Shapes.SPEED, "eval.")}
    return {**settings, **{role: model_fingerprint(folder) for role, folder in folders.items()}}


def evaluate(run: Run) -> None:
    """eval/<role>.json of every model that exists, and eval/speed.json. All ranks take part."""
    from shoal.eval.compare.comparable import require_same_tokenizer

    there = agreed(lambda: list(roles(run)))  # by name: every machine has the teacher in a folder of its own
    folders = {role: folder for role, folder in _folders(run).items() if role in there}
    require_models_of_this_run(run, folders)
    require_same_tokenizer(folders, trust_remote_code=run.recipe.trust_remote_code)
    if list(folders) == ["teacher"]:
        log.info("eval: %s does not exist: only the teacher is scored; `shoal prune` creates it", run.dir / "student")
    if run.recipe.eval.control and "distilled" in folders and CONTROL not in folders:
        log.warning("eval: no control (eval.control) in %s yet; `shoal distill` trains it", run.dir / CONTROL)
    checkpoints = _checkpoints(run, folders)
    due = agreed(lambda: _due(run, {role: eval_inputs(run, folder) for role, folder in folders.items()}))
    _score(run, checkpoints, due)
    if run.recipe.eval.speed and is_main():
        _speed(run, checkpoints)
    barrier()


def scored_beside_runs(names: Sequence[str], out: Path) -> list[Path]:
    """Folders to compare: run directories as they are, and of every checkpoint among ``names``, which is no run's, one
    in ``out`` with its scores: of the tasks and settings that the first run was scored with, and its speed in turns
    with that run's teacher. What is there is kept.

    Raises:
        UserError: a run whose recipe is not known, no such model, or one that cannot be scored so.
    """
    recipe = load_recipe(next(name for name in names if not names_model(name)))
    with seeing(recipe.device):
        run = open_run(recipe)
        beside = {name: _beside(run, name, out) for name in filter(names_model, names)}
        teacher = _checkpoints(run, {"teacher": run.teacher})
        for own, checkpoint, inputs in beside.values():
            checkpoints = {MODEL: checkpoint}
            with locked(own):
                _score(own, checkpoints, _due(own, {MODEL: inputs}))
                if run.recipe.eval.speed:
                    _speed(own, teacher | checkpoints)
                write_story(own)
    return [beside[name][0].dir if name in beside else Path(name) for name in names]


def _beside(run: Run, model: str, out: Path) -> tuple[Run, Checkpoint, dict[str, Any]]:
    """A run of the checkpoint ``model`` alone, in a folder of its own in ``out``, to be scored as ``run`` was; the
    checkpoint, and what identifies its evaluation."""
    from shoal.eval.compare.comparable import tokenizer_difference

    folder, asked = resolved(model, None), run.recipe
    name = f"{name_of_model(model)}-{fingerprint(str(folder.resolve()))[:8]}"
    alike = ("seed", "dtype", "attn_implementation", "trust_remote_code", "hub_kernels", "eval")
    shared = {key: getattr(asked, key) for key in alike}
    own = Run(Recipe(model=model, run_dir=str(out / MODELS / name), **shared), run.numerics)
    inputs, checkpoint = eval_inputs(own, folder), _checkpoints(own, {MODEL: folder})[MODEL]
    if asked.dtype == "stored":  # so that the comparison can tell in what
        inputs["dtype"] = str(checkpoint.stored_dtype).removeprefix("torch.")
    if tokenizer_difference(folder, run.teacher, trust_remote_code=asked.trust_remote_code):
        log.info(
            "compare: %s has other tokens than %s, so results that count tokens are not compared", model, run.teacher
        )
    return own, checkpoint, inputs


def _checkpoints(run: Run, folders: dict[str, Path]) -> dict[str, Checkpoint]:
    load = LoadSettings(**run.load_args())
    return {role: Checkpoint.read(folder, load) for role, folder in folders.items()}


def _score(run: Run, checkpoints: dict[str, Checkpoint], due: dict[str, dict[str, Any]]) -> None:
    """eval/<role>.json of every role that is ``due``."""
    from shoal.eval.evaluate import Questions, checked_items, num_items, role_evaluation, work_of
    from shoal.eval.tasks.load import tasks_of

    if not due:
        return
    settings = run.recipe.eval
    if settings.backend == "vllm":
        check_vllm("eval.backend")
    seed_everything(run.recipe.seed)  # some tasks of lm-eval draw the order of their options as they are loaded
    with doing("eval: loading the tasks"):  # a wrong one is refused before a model loads
        tasks = tasks_of(settings, seed=run.recipe.seed)
        for role in due:
            config, tokenizer = checkpoints[role].config, checkpoints[role].tokenizer()
            checked_items(tasks, settings, config=config, tokenizer=tokenizer, num_ranks=world_size())
        for source in settings.perplexity_data if settings.perplexity_tokens else ():
            load_texts(source, max_characters=1)
    cost = work_of(tasks, num_items(tasks, settings), perplexity_tokens=settings.perplexity_tokens)
    log.info("eval: %s, each: %s", ", ".join(due), cost)
    questions, folder = Questions(settings, run.recipe.seed, tasks), run.dir / "eval"
    for role, inputs in due.items():
        log.info("eval: %s (%s)", role, checkpoints[role].folder)
        seed_everything(run.recipe.seed)
        result = role_evaluation(role, checkpoints[role], questions, inputs=inputs, items=folder / "items")
        if is_main():
            origin = replace(result.provenance, model=run.recipe.model)
            replace(result, provenance=origin).save(folder / f"{role}.json")
        barrier()


def _due(run: Run, inputs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Those of ``inputs``, by role what identifies its evaluation, whose evaluation is not there.

    Where there are any, also those made by a version of this code whose scores could not be compared with the new ones.
    """
    asked = {role: scores_of(run, role, own) for role, own in inputs.items()}
    due = {role for role, own in asked.items() if not own.is_done()}
    for role in inputs.keys() - due if due else ():
        if changed := _other_code(asked[role].require()):
            log.info("eval %s: was scored on %s, so it is scored again for the comparison", role, changed)
            due.add(role)
    return {role: own for role, own in inputs.items() if role in due}


def _other_code(scored: Scores) -> str:
    """Which version of matching or of lm-eval made these scores; "" = those of today."""
    from shoal.abilities.matching import MATCHING

    versions = {task.matching for task in scored.tasks} - {1, MATCHING}  # 1 has what asks for no matching
    if versions:
        return f"matching {min(versions)}"
    last, now = (environment.get("lm_eval") for environment in (scored.provenance.environment, environment()))
    return f"lm_eval {last}" if last not in (None, now) else ""


def require_models_of_this_run(run: Run, folders: dict[str, Path]) -> None:
    """Refuse a student/, distilled/, or control/ that other settings made, or that was put there afterwards: scores of
    different runs would share a table, or have another model's name."""
    if folders.keys() & {"pruned", CONTROL, "distilled"}:
        for folder, asked in trainings(run, read_plan(run)).items():
            model, file = folder / "distilled", asked.path.name
            told = asked.require().settings.get("distilled") if model in folders.values() else ""
            require_model_of(model, file, told)


def _speed(run: Run, checkpoints: dict[str, Checkpoint]) -> None:
    from shoal.eval.speed import measure_speed

    path = run.dir / Speed.FILE
    # a control is as fast as the teacher
    measured = {role: own for role, own in checkpoints.items() if role != CONTROL}
    inputs = speed_inputs(run, {role: own.folder for role, own in measured.items()})
    if Identity(Speed, path, inputs, "eval").is_done():
        return
    log.info("eval: speed of %s, interleaved", ", ".join(measured))
    sizes = None if isinstance(run.recipe.eval.speed, bool) else run.recipe.eval.speed
    free_memory()  # of the models that were scored one after another
    try:
        speed = measure_speed(measured, provenance=Provenance(inputs, model=run.recipe.model), batch_sizes=sizes)
    except UserError as reason:  # the report of a run that has healed for hours is worth more than its speed
        log.warning("eval: the speed is not measured. %s", reason)
        path.unlink(missing_ok=True)  # one of other models, which the report would refuse beside these scores
        return
    speed.save(path)
