"""The run directory: whether it can be written to, and holds what this recipe has made."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoal.artifacts.artifact import differences
from shoal.artifacts.evaluation import CONTROL, MODEL, ROLES, Scores, Speed
from shoal.artifacts.identity import Identity, refuse_other_training, step_of
from shoal.artifacts.importance import Importance
from shoal.artifacts.plan import Plan
from shoal.artifacts.training import Training
from shoal.atomic_files import cache_dir, free_disk, make_folder, refuse_no_lock
from shoal.compress import free_layers
from shoal.errors import NO_TOKEN, UserError
from shoal.eval.report.run import read_story
from shoal.formatting import bytes_text
from shoal.model_names import DEMO_PREFIX
from shoal.models import checkpoint_files as files
from shoal.recipe.prune import CutThese
from shoal.recipe.recipe import Recipe
from shoal.recipe.remembered import LOCK
from shoal.recipe.section import Shapes, shaping
from shoal.recipe.trainer_arguments import BATCH_SPLIT, training_settings

from .asked import CUT, SCORE, Asked
from .model_files import by_layer

FILES: dict[str, tuple[type[Any], tuple[str, ...]]] = {
    Importance.FILE: (Importance, ("measure", "prune", "run")),
    Plan.FILE: (Plan, (*CUT, "eval")),
    Training.FILE: (Training, ("distill", "run")),
    f"{CONTROL}/{Training.FILE}": (Training, ("run",)),
    **{f"eval/{role}.json": (Scores, SCORE) for role in (*ROLES, MODEL)},
    Speed.FILE: (Speed, SCORE),
}
"""File of a run directory -> what it is, and the commands that read it."""


def require_distilled(recipe: Recipe) -> None:
    """Refuse a push of nothing, or to nowhere."""
    run_dir = Path(recipe.run_dir).expanduser()
    if recipe.export.hub_repo is None:
        raise UserError(f"shoal push {run_dir}: the repository is missing; add its name, owner/name, to the command")
    if not (run_dir / "distilled" / "config.json").is_file():
        raise UserError(f"{run_dir / 'distilled'}: does not exist yet; run `shoal distill` first")


def refuse_no_token(asked: Asked) -> None:
    """Refuse a push of nobody."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError(f"export to {asked.recipe.export.hub_repo}: {NO_TOKEN}")


def student_missing(run_dir: Path) -> UserError:
    """The error of a training whose pruned model was removed."""
    return UserError(f"{run_dir / 'student'}: is missing; run `shoal prune` to restore it, or choose another run_dir")


def refuse_results(asked: Asked) -> None:
    """Refuse files that are not what their names say, and models that are damaged or missing."""
    read_story(asked.folder)
    for name, (kind, verbs) in FILES.items():
        if asked.verb in verbs:
            Identity(kind, asked.folder / name, {}, asked.verb).changed()
    models = {name: (asked.folder / name / "config.json").is_file() for name in ("student", "distilled")}
    if asked.verb == "distill" and (asked.folder / Plan.FILE).is_file() and not any(models.values()):
        raise student_missing(asked.folder)
    for name, is_there in models.items():
        if is_there and asked.verb in ("distill", "report", "push", *SCORE):
            try:
                files.check_checkpoint(asked.folder / name)
            except UserError as error:
                again = "prune" if name == "student" else "distill"
                what = str(error).partition("; ")[0]  # what follows would mend a model that was downloaded
                raise UserError(f"{what}; delete {asked.folder / name} and run `shoal {again}` again") from error


def require_student_of(plan: Plan, run_dir: Path) -> None:
    """Refuse a student/ that ``plan`` did not make."""
    student = run_dir / "student"
    is_there = plan.student and (student / "config.json").is_file()
    if is_there and plan.student != plan.sealed(files.model_fingerprint(student)):
        raise UserError(
            f"{run_dir / Plan.FILE}: describes {plan.in_words()!r}, which does not match {student}: one of them was "
            "changed after pruning. Delete plan.json and run `shoal prune` again; to choose other layers, set "
            "prune.drop"
        )


def require_model_of(model: Path, file: str, checksum: str | None) -> None:
    """Refuse a distilled ``model`` that is not the one of this ``checksum``, which ``file`` stores; "" = any."""
    if checksum is None:
        why = f"cannot be checked: {file} is of an older shoal, which did not store a checksum"
    elif checksum and checksum != files.model_fingerprint(model):
        why = f"is not the model of {file}: its weights, configuration or tokenizer differ"
    else:
        return
    raise UserError(f"{model}: {why}; delete it, and `shoal distill` restores it from the last checkpoint")


def refuse_made(asked: Asked) -> None:
    """Refuse to train, score or report models that others than the teacher and the plan made."""
    file, model, trained = (asked.folder / name for name in (Plan.FILE, "distilled", Training.FILE))
    there = [(folder / "config.json").is_file() for folder in (asked.folder / "student", model)]
    if not file.is_file() and any(there) and asked.verb != "distill":
        raise UserError(f"{file}: is missing, but models made with it are there; run `shoal prune` to restore it")
    if not file.is_file() or not any(there):
        return
    plan = Plan.load(file)
    inputs = plan.provenance.inputs
    if asked.verb != "push" and "model" in inputs:  # not of a plan from Python
        inputs = {key: own for key, own in inputs.items() if not key.startswith("prune.")}
        inputs |= shaping(asked.recipe.prune, Shapes.PLAN, "prune.")
    if asked.plain is not None and "model" in inputs:
        inputs = inputs | {"model": files.model_fingerprint(asked.plain)}
    Identity(Plan, file, inputs, "prune").require()
    require_student_of(plan, asked.folder)
    if there[1] and asked.verb != "distill":  # which restores it
        require_model_of(model, Training.FILE, Training.load(trained).settings.get("distilled"))


def inputs_of(file: Path) -> dict[str, Any]:
    """What identifies the result or checkpoint that ``file`` describes; empty where it is not there, or is damaged,
    which its own stage says in its own words."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        inputs = content.get("internal", content)["inputs"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return inputs if isinstance(inputs, dict) else {}


def refuse_trained(asked: Asked, drop: Sequence[int] = ()) -> None:
    """Refuse to go on with a training of other settings, as far as the recipe tells: what the model, the machine or the
    number of ranks decides is compared when it is known. ``drop``: the layers that go, where a metric has told."""
    from shoal.data.sources import local_files, sources_fingerprint  # loads the Hub's library

    manifests = asked.folder.glob("checkpoints/checkpoint-*/manifest.json")
    newest = max(manifests, key=lambda file: step_of(file.parent), default=None)
    if newest is None or not (there := inputs_of(newest)):
        return
    recipe, prune, trained = asked.recipe, asked.recipe.prune, inputs_of(asked.folder / Training.FILE)
    settings = {**shaping(recipe, Shapes.TRAINING), **training_settings(recipe.distill)}
    later = {"distill.watch", *(f"distill.trainer.{key}" for key in BATCH_SPLIT)}
    later |= {key for key, value in settings.items() if any(word in repr(value) for word in ("'auto'", "'fast'"))}
    if recipe.max_minutes is not None:
        later.add("distill.num_tokens")
    # null may stand for a number that the machine decides on
    said = {key: value for key, value in settings.items() if value is not None and key not in later}
    if "distill.data" in said and all(map(local_files, recipe.distill.data)):
        said["data"] = sources_fingerprint(recipe.distill.data)
    if asked.plain is not None:
        said["model"] = files.model_fingerprint(asked.plain)
    made = Plan.load(plan) if (plan := asked.folder / Plan.FILE).is_file() else None
    if made is not None and made.student == made.sealed(there.get("student", "")):  # the plan of what was trained
        said["prune.changes"] = shaping(prune, Shapes.PLAN, "prune.").get("prune.changes")
        changes = {"prune.changes": made.provenance.inputs.get("prune.changes")}
        trained, there = trained | changes, there | changes
    if isinstance(prune, CutThese):
        said["prune.drop"] = list(prune.drop)
    elif drop:
        said["prune.drop"] = list(drop)
    elif prune.target is None and (num_layers := asked.number("num_hidden_layers")) is not None:
        count = free_layers.count_of(prune, num_layers)
        if count not in [len(own.get("prune.drop", ())) for own in (trained, there)]:
            said["prune.drop"] = f"{count} layers"
    changed = [differences(said, {key: own[key] for key in said.keys() & own.keys()}) for own in (trained, there)]
    if all(changed):
        refuse_other_training(newest.parent, changed[1])


def refuse_place(asked: Asked) -> None:
    """Refuse a run directory that cannot be made or written to, or has less room than the weights that will be written
    take, as far as the teacher's files tell."""
    folder, prune, num_layers = asked.folder, asked.recipe.prune, asked.number("num_hidden_layers")
    name = asked.recipe.model
    if name.startswith(DEMO_PREFIX) and not (cache_dir() / name.removeprefix(DEMO_PREFIX) / "config.json").is_file():
        require_folder(cache_dir(), setting="SHOAL_CACHE")
    require_folder(folder)
    refuse_no_lock(folder / LOCK)
    student, home = folder / "student", asked.described[1]
    if asked.verb in CUT and home is not None and home.resolve().is_relative_to(student.resolve()):
        raise UserError(f"{student}: {files.OWN_FOLDER}")
    written = {"student": CUT, "distilled": ("distill", "run")}
    due = [name for name, verbs in written.items() if asked.verb in verbs and not (folder / name).is_dir()]
    if not due or num_layers is None or prune.changes or getattr(prune, "target", None) is not None:
        return
    count = len({*prune.drop}) if isinstance(prune, CutThese) else free_layers.count_of(prune, num_layers)
    outside, *layers = by_layer(asked, num_layers, lambda tensor: tensor.end - tensor.start) or [0]
    needed, free = len(due) * (outside + sum(sorted(layers)[: num_layers - count])), free_disk(folder)
    if needed > free:
        raise UserError(
            f"run_dir {folder}: at least {bytes_text(needed)} are to be written there and {bytes_text(free)} are free; "
            "free some space, or set run_dir to another disk"
        )


def require_folder(folder: Path, *, setting: str = "run_dir") -> None:
    """Refuse a folder that cannot be made or written to; nothing stays of one that was not there."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    make_folder(folder, setting=setting)
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        raise UserError(f"{folder}: cannot be written (Permission denied); set {setting} to a folder you may write to")
    with contextlib.suppress(OSError):  # another process may be writing into it by now
        for made in new:
            made.rmdir()
