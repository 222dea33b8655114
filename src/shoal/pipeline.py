"""The stages in order: what each needs, whether it is done, and where its result goes.

Every stage does the same three things: works out the inputs that identify its result, returns at once when that result
is there already, and otherwise makes it, after making sure of what it needs. Room code is imported where it is used, so
that a verb loads only what it runs.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch.distributed as dist

from shoal.artifact import (
    Artifact,
    Evaluation,
    Importance,
    Provenance,
    PruningPlan,
    Speed,
    Training,
    differences,
    fingerprint,
    require_same_run,
    write_json,
    written_folder,
)
from shoal.data import TEACHER_TEXT, load_texts, pack, sources_fingerprint
from shoal.edits import Edit, Replace, Swap
from shoal.errors import UserError
from shoal.models import (
    load_config,
    load_model,
    load_tokenizer,
    model_fingerprint,
    resolve_model,
    text_config,
)
from shoal.recipe import CONFIGS_DIR, Recipe, as_dict
from shoal.runtime import device, environment, is_main, seed_everything, world_size

log = logging.getLogger(__name__)

LOCK_WAIT_S = 30


@dataclass(frozen=True)
class Run:
    """One recipe in its run directory."""

    recipe: Recipe

    @property
    def dir(self) -> Path:
        return Path(self.recipe.run_dir).expanduser()

    @cached_property
    def teacher(self) -> Path:
        """The teacher's local folder."""
        return _resolved(self.recipe.model, self.recipe.revision)

    @cached_property
    def donors(self) -> dict[int, Path]:
        """The local folders of the models that swaps take layers from, by index in prune.edits."""
        edits = enumerate(self.recipe.prune.edits)
        return {index: _resolved(edit.donor, edit.donor_revision) for index, edit in edits if isinstance(edit, Swap)}

    @cached_property
    def donor_fingerprints(self) -> dict[int, str]:
        return {index: model_fingerprint(folder) for index, folder in self.donors.items()}

    @cached_property
    def teacher_fingerprint(self) -> str:
        return model_fingerprint(self.teacher)

    @property
    def num_layers(self) -> int:
        config = load_config(self.teacher, trust_remote_code=self.recipe.trust_remote_code)
        return text_config(config).num_hidden_layers

    def load_args(self) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "dtype": recipe.dtype,
            "attention": recipe.attention,
            "trust_remote_code": recipe.trust_remote_code,
        }


def _resolved(model: str, revision: str | None) -> Path:
    """The model's local folder. Rank 0 resolves it first: a download or conversion happens once per machine."""
    if dist.is_initialized() and not is_main():
        dist.barrier()
    folder = resolve_model(model, revision=revision)
    if dist.is_initialized() and is_main():
        dist.barrier()
    return folder


@contextmanager
def locked(run: Run) -> Iterator[None]:
    """Keep every other process out of the run directory; the operating system lets go when this one dies.

    Raises:
        UserError: another living process holds it, or it cannot be created.
    """
    try:
        run.dir.mkdir(parents=True, exist_ok=True)
        handle = (run.dir / ".lock").open("a+")
    except OSError as error:
        raise UserError(f"run_dir {run.dir}: cannot be created ({error.strerror}); choose another folder") from error
    with handle:
        deadline = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                handle.seek(0)
                holder = handle.read().strip() or "another process"
                if time.monotonic() > deadline:
                    raise UserError(
                        f"run_dir {run.dir}: is in use by {holder}; wait for it, stop it, or choose another run_dir"
                    ) from None
                log.info("waiting for %s, which holds %s", holder, run.dir)
                time.sleep(5)
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}")
        handle.flush()
        yield


# --- measure ------------------------------------------------------------------------------------------------------


def measure_inputs(run: Run) -> dict[str, Any]:
    """What identifies importance.json; the batch size changes no number."""
    section = as_dict(run.recipe.measure)
    return {
        "model": run.teacher_fingerprint,
        "data": sources_fingerprint(run.recipe.measure.data),
        "seed": run.recipe.seed,
        "dtype": run.recipe.dtype,
        "attention": run.recipe.attention,
        **{f"measure.{key}": value for key, value in section.items() if key != "batch_size"},
    }


def measure(run: Run) -> None:
    """importance.json and its figure. All ranks take part."""
    from shoal.compress.measure import measure_importance

    path = run.dir / Importance.FILE
    inputs = measure_inputs(run)
    if _is_done(Importance, path, inputs, "measure"):
        return
    settings = run.recipe.measure
    log.info("measure: %s over %s tokens", ", ".join(settings.metrics), f"{settings.num_tokens:,}")
    seed_everything(run.recipe.seed)
    tokenizer = load_tokenizer(run.teacher, trust_remote_code=run.recipe.trust_remote_code)
    check_length(run, settings.sequence_length, "measure.sequence_length")
    rows = pack(
        [(source, load_texts(source, max_characters=16 * settings.num_tokens)) for source in settings.data],
        tokenizer,
        sequence_length=settings.sequence_length,
        num_tokens=settings.num_tokens,
        seed=run.recipe.seed,
    )
    model = load_model(run.teacher, device=device(), **run.load_args())
    scores = measure_importance(model, rows, metrics=settings.metrics, batch_size=settings.batch_size)
    if is_main():
        importance = Importance(
            provenance=Provenance(inputs),
            num_layers=scores.num_layers,
            num_tokens=scores.num_tokens,
            layers=scores.layers,
            runs=scores.runs,
        )
        importance.write(path)
        from shoal.figures import importance_figure, save_figure

        save_figure(importance_figure(importance), run.dir / "figures" / "importance.svg")
        log.info("measure: %s", path)
    _barrier()


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
    if (student / "config.json").is_file() and _is_done(PruningPlan, path, inputs, "prune"):
        _refuse_for_targets(run, PruningPlan.read(path))
        return
    _refuse_stale_training(run)
    plan = _plan(run, importance, inputs)
    _refuse_unreadable_data(plan.edits)
    _refuse_for_targets(run, plan)
    log.info("prune: %s", plan.in_words())
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
    _barrier()


def prune_dry_run(run: Run) -> str:
    """What `shoal prune` would do and what would come of it, for a reader. Writes nothing and measures nothing.

    Raises:
        UserError: what pruning would refuse, and importance.json missing where layers are chosen by it.
    """
    from shoal.compress.dry_run import dry_run

    recipe = run.recipe
    _refuse_unreadable_data(recipe.prune.edits)
    return dry_run(
        run.teacher,
        _plan(run, _importance(run), {}),
        run.dir / "student",
        donors=run.donors,
        proof=recipe.prune.proof,
        targets=recipe.prune.targets,
        dtype=recipe.dtype,
        trust_remote_code=recipe.trust_remote_code,
    )


def _importance(run: Run) -> Importance | None:
    """importance.json, where layers are chosen by it and it is there."""
    from shoal.compress.plan import is_automatic

    path = run.dir / Importance.FILE
    if not is_automatic(run.recipe.prune) or not path.is_file():
        return None
    _require(Importance, path, measure_inputs(run), "shoal measure")
    return Importance.read(path)


def _plan(run: Run, importance: Importance | None, inputs: dict[str, Any]) -> PruningPlan:
    from shoal.compress.plan import choose_layers

    settings = run.recipe.prune
    drop, reason = choose_layers(settings, num_layers=run.num_layers, importance=importance)
    return PruningPlan(Provenance(inputs), run.num_layers, drop, reason, settings.edits)


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


# --- distill ------------------------------------------------------------------------------------------------------


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
        _require(PruningPlan, path, plan_inputs(run), "shoal prune")
    return PruningPlan.read(path)


def distill(run: Run) -> None:
    """distilled/ and distill.json. All ranks take part, inside an initialised process group."""
    from shoal.train import distill as room

    plan = read_plan(run)
    recipe = run.recipe
    inputs = training_inputs(run, plan)
    distilled = run.dir / "distilled"
    if (distilled / "config.json").is_file() and _is_done(Training, run.dir / Training.FILE, inputs, "distill"):
        return
    seed_everything(recipe.seed)
    room.distill(
        run.teacher,
        run.dir / "student",
        run_dir=run.dir,
        first_change=plan.first_change,
        settings=recipe.distill,
        track=recipe.track,
        inputs=inputs,
        recipe=as_dict(recipe),
        seed=recipe.seed,
        dtype=recipe.dtype,
        attention=recipe.attention,
        trust_remote_code=recipe.trust_remote_code,
    )
    log.info("distill: %s", distilled)


def distill_is_done(run: Run) -> bool:
    """Whether distilled/ is there already, so that no launcher need be started."""
    if not (run.dir / "distilled" / "config.json").is_file():
        return False
    return _is_done(Training, run.dir / Training.FILE, training_inputs(run, read_plan(run)), "distill")


def training_inputs(run: Run, plan: PruningPlan) -> dict[str, Any]:
    """The identity of distilled/."""
    from shoal.train.distill import distill_inputs

    recipe = run.recipe
    return distill_inputs(
        recipe.distill,
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
        "tasks": _task_files_fingerprint(run.recipe.eval.include_path),
        **section,
    }


def _task_files_fingerprint(include_path: str | None) -> str:
    """Content hash of the task files that may be read: prompts and matching rules are part of a score."""
    folders = [CONFIGS_DIR / "tasks", *([Path(include_path).expanduser()] if include_path else [])]
    files = [file for folder in folders for file in sorted(folder.rglob("*")) if file.suffix in (".yaml", ".py")]
    return fingerprint([[file.name, file.read_text(encoding="utf-8")] for file in files])


def evaluate(run: Run) -> None:
    """eval/<role>.json of every model that exists, and eval/speed.json. All ranks take part."""
    from shoal.eval.evaluate import role_evaluation

    check_length(run, run.recipe.eval.sequence_length, "eval.sequence_length")
    found = roles(run)
    _require_models_of_this_run(run, found)
    for role, folder in found.items():
        path = run.dir / "eval" / f"{role}.json"
        inputs = eval_inputs(run, folder)
        if _is_done(Evaluation, path, inputs, f"eval {role}"):
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
        _barrier()
    if run.recipe.eval.speed and is_main():
        _speed(run, found)
    _barrier()


def _require_models_of_this_run(run: Run, found: dict[str, Path]) -> None:
    """Refuse a student/ or distilled/ that other settings made: scores of different runs would share a table."""
    if "pruned" in found or "distilled" in found:
        plan = read_plan(run)
        if "distilled" in found:
            _require(Training, run.dir / Training.FILE, training_inputs(run, plan), "shoal distill")


def _require_this_run(run: Run) -> None:
    """Refuse to report or export results that other settings made, naming the first that differs."""
    found = roles(run)
    _require_models_of_this_run(run, found)
    if (run.dir / Importance.FILE).is_file():
        _require(Importance, run.dir / Importance.FILE, measure_inputs(run), "shoal measure")
    for role, folder in found.items():
        path = run.dir / "eval" / f"{role}.json"
        if path.is_file():
            _require(Evaluation, path, eval_inputs(run, folder), "shoal eval")


def _speed(run: Run, found: dict[str, Path]) -> None:
    from shoal.eval.speed import measure_speed

    path = run.dir / Speed.FILE
    inputs = {
        "dtype": run.recipe.dtype,
        "attention": run.recipe.attention,
        **{role: model_fingerprint(folder) for role, folder in found.items()},
    }
    if _is_done(Speed, path, inputs, "speed"):
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
    if _is_done(room.Gguf, path, inputs, "gguf") and (path.parent / room.Gguf.read(path).file).is_file():
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
    for name in ("measure", "distill", "eval"):
        check_length(run, getattr(recipe, name).sequence_length, f"{name}.sequence_length")
    check_training_settings(recipe)
    for source in {*recipe.measure.data, *recipe.distill.data, *recipe.eval.perplexity_data}:
        if source.path != TEACHER_TEXT:
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


def check_length(run: Run, sequence_length: int, setting: str) -> None:
    """Refuse rows longer than the model's positions, before any weight is loaded."""
    config = text_config(load_config(run.teacher, trust_remote_code=run.recipe.trust_remote_code))
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and sequence_length > longest:
        raise UserError(f"{setting}: {sequence_length} is more than the {longest} positions of {run.recipe.model}")


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


def _is_done(kind: type[Artifact], path: Path, inputs: dict[str, Any], stage: str) -> bool:
    """Whether ``path`` holds exactly this result; what changed is logged where it does not."""
    if not path.is_file():
        return False
    changed = differences(inputs, kind.read(path).provenance.inputs)
    if changed:
        log.info("%s: %s is out of date (%s), making it again", stage, path.name, "; ".join(changed))
        return False
    log.info("%s: done already (%s)", stage, path)
    return True


def _require(kind: type[Artifact], path: Path, inputs: dict[str, Any], verb: str) -> None:
    provenance = kind.read(path).provenance
    remedy = f"Run `{verb}` again, or set run_dir to another folder"
    require_same_run(inputs, provenance, path, remedy=remedy)


def _barrier() -> None:
    if world_size() > 1 and dist.is_initialized():
        dist.barrier()
