"""What of a run directory is logged to W&B: tables, figures, scores, and artifacts with what they were made from.

Everything is read from the files that stages have left, so that any stage, or a later `shoal report`, can log it; what
has been logged is kept in the run directory, and a stage that leaves nothing new does not even load W&B.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from shoal.artifacts.evaluation import ROLES, Evaluation
from shoal.artifacts.importance import Importance
from shoal.artifacts.plan import PruningPlan
from shoal.artifacts.speed import Speed
from shoal.artifacts.training import Training
from shoal.atomic_files import write_json
from shoal.models.checkpoint_files import DEMO_PREFIX, model_fingerprint
from shoal.recipe.track import Track
from shoal.redaction import redacted
from shoal.runtime import is_main
from shoal.tracking.wandb_run import UPLOAD_WAIT_S, attempt, finish, start, wandb_mode

if TYPE_CHECKING:
    from wandb import Artifact, Run

LOGGED_FILE = "wandb_logged.json"
WEIGHTS_WAIT_S = 4 * 3600
"""Seconds that a stage waits at its end for the upload of weights."""
EVALUATIONS = {role: f"eval/{role}.json" for role in ROLES}
RESULT_FILES = (
    *(Importance.FILE, PruningPlan.FILE, Training.FILE, f"control/{Training.FILE}"),
    *(*EVALUATIONS.values(), Speed.FILE, "report.md", "report.html"),
)


@dataclass(frozen=True)
class Rows:
    """A table of plain values."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class _Part:
    """One thing to be logged: with another ``identity`` under the same ``name`` it is logged again."""

    name: str
    identity: str
    log: Callable[[Run], dict[str, Any] | None]
    """Function that logs it, or returns what run.log is to be given."""


def log_results(
    track: Track, run_dir: Path, recipe: dict[str, Any], *, teacher: Path, score_rows: Callable[[Path], Rows]
) -> None:
    """Log on rank 0 what the run directory holds and has not been logged yet.

    ``teacher`` is its checkpoint; ``score_rows`` reads the before/after table of a run directory, whose columns are
    column, role, task, protocol, metric, score, retention and form_gap among others.
    """
    if not is_main() or wandb_mode(track) == "off":
        return
    with attempt("results could not be logged", run_dir):
        file = run_dir / LOGGED_FILE
        logged = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        parts = [*_media(run_dir, score_rows), *_artifacts(run_dir, recipe, teacher, upload=track.upload_weights)]
        new = [part for part in parts if logged.get(part.name) != part.identity]
        wait_s = WEIGHTS_WAIT_S if track.upload_weights else UPLOAD_WAIT_S
        run = start(track, run_dir, recipe, wait_s=wait_s) if new else None
        if run is None:
            return
        with _staged_in(run_dir / "wandb"):
            values: dict[str, Any] = {}
            for part in new:
                values |= part.log(run) or {}
            if values:
                run.log(values)
        finish(run_dir)
        write_json(file, logged | {part.name: part.identity for part in new})


def importance_rows(importance: Importance, drop: tuple[int, ...] = ()) -> Rows:
    """A row per layer: whether it was dropped, every metric with its standard error, every swept task."""
    columns: dict[str, tuple[Any, ...]] = {"layer": importance.teacher_layers}
    columns["dropped"] = tuple(layer in drop for layer in columns["layer"])
    for metric, scores in importance.layers.items():
        columns[metric] = scores
        if metric in importance.errors:
            columns[f"{metric}: standard error"] = importance.errors[metric]
    for column in importance.atlas.columns if importance.atlas else ():
        columns[f"{column.task} ({column.protocol})"] = column.importances
    return Rows(tuple(columns), tuple(zip(*columns.values(), strict=True)))


def _media(run_dir: Path, score_rows: Callable[[Path], Rows]) -> Iterator[_Part]:
    """Tables, the run's summary, and figures."""
    importance, plan = run_dir / Importance.FILE, run_dir / PruningPlan.FILE
    if importance.is_file():
        yield _Part("importance", _hashed(importance, plan), lambda _: _importance(importance, plan))
    if evaluations := [file for name in EVALUATIONS.values() if (file := run_dir / name).is_file()]:
        identity = _hashed(*evaluations, run_dir / Speed.FILE)
        yield _Part("before_after", identity, lambda run: _scores(run, run_dir, score_rows(run_dir)))
    figures = run_dir / "figures"
    for file in sorted([*figures.glob("*.png"), *figures.glob("*.svg")]):
        if file.suffix == ".png" or not file.with_suffix(".png").is_file():
            yield _Part(f"figures/{file.stem}", _hashed(file), lambda _, file=file: _figure(file))


def _importance(file: Path, plan_file: Path) -> dict[str, Any]:
    importance = Importance.read(file)
    drop = PruningPlan.read(plan_file).drop if plan_file.is_file() else ()
    values = {"importance": _table(importance_rows(importance, drop))}
    runs = [
        (metric, importance.teacher_layers[start], length, score)
        for metric, rows in importance.runs.items()
        for length, row in enumerate(rows, 1)
        for start, score in enumerate(row)
    ]
    if runs:
        values["importance_of_runs"] = _table(Rows(("metric", "first_layer", "num_layers", "importance"), tuple(runs)))
    return values


def _scores(run: Run, run_dir: Path, rows: Rows) -> dict[str, Any]:
    """The before/after table; scores, retention, form gaps, sizes and speeds go into the summary, by which W&B compares
    runs."""
    summary: dict[str, Any] = {}
    for cells in rows.rows:
        row = dict(zip(rows.columns, cells, strict=True))
        # the column stands first where it is known: nobody takes a score in the trained form for another
        name = "/".join(row[key] for key in ("column", "role", "task", "protocol", "metric") if row[key])
        values = {key: row[key] for key in ("score", "retention", "form_gap") if row[key] is not None}
        summary |= {f"{key}/{name}": value for key, value in values.items()}
    for role, name in EVALUATIONS.items():
        if (file := run_dir / name).is_file():
            summary[f"num_parameters/{role}"] = Evaluation.read(file).num_parameters
    if (speed := run_dir / Speed.FILE).is_file():
        for role, score in Speed.read(speed).roles.items():
            summary[f"prefill_tokens_per_s/{role}"] = score.prefill_tokens_per_s
            summary[f"decode_tokens_per_s/{role}"] = score.decode_tokens_per_s
    run.summary.update(summary)
    return {"before_after": _table(rows)}


def _figure(file: Path) -> dict[str, Any]:
    import wandb

    if file.suffix == ".png":
        return {f"figures/{file.stem}": wandb.Image(str(file))}
    return {f"figures/{file.stem}": wandb.Html(file.read_text(encoding="utf-8"), inject=False)}


def _table(rows: Rows) -> Any:
    import wandb

    return wandb.Table(columns=list(rows.columns), data=[list(row) for row in rows.rows])


def _artifacts(run_dir: Path, recipe: dict[str, Any], teacher: Path, *, upload: bool) -> Iterator[_Part]:
    """Teacher -> student -> distilled, and the files that say how and what came of it.

    Each artifact says in `made_from` what it was made from. To W&B the teacher is what the run used, the others what it
    made; since all stages are one run, its graph cannot show the student as what distilled/ was made from.
    """
    plan, training = run_dir / PruningPlan.FILE, run_dir / Training.FILE
    base = _artifact_name(recipe["model"])
    made_of_it = next((file for file in (plan, run_dir / Importance.FILE) if file.is_file()), None)
    if made_of_it is not None:
        yield _Part("artifacts/teacher", _hashed(made_of_it), lambda run: _teacher(run, base, recipe, teacher))
    for name, record in (("student", plan), ("distilled", training)):
        if record.is_file() and (run_dir / name / "config.json").is_file():
            log = partial(_checkpoint, folder=run_dir / name, base=base, plan=plan, upload=upload)
            yield _Part(f"artifacts/{name}", f"{_hashed(record)} {upload}", log)
    files = [run_dir / name for name in RESULT_FILES if (run_dir / name).is_file()]
    if files:
        yield _Part("artifacts/results", _hashed(*files), lambda run: _results(run, run_dir, files, recipe))


def _teacher(run: Run, name: str, recipe: dict[str, Any], folder: Path) -> None:
    record = {"model": redacted(recipe["model"]), "revision": recipe["revision"]}
    artifact = _new_artifact(name, "model", {**record, "fingerprint": model_fingerprint(folder)})
    artifact.add_reference(_hub_address(recipe) or folder.resolve().as_uri(), name="checkpoint", checksum=False)
    # what run.use_artifact does with a new artifact; but that refuses to offline, where `wandb sync` does it later, and
    # waits for the upload online
    run._log_artifact(artifact, is_user_created=True, use_after_commit=True)


def _checkpoint(run: Run, *, folder: Path, base: str, plan: Path, upload: bool) -> None:
    made_from = [base] if folder.name == "student" else [f"student-{run.id}", base]
    record: dict[str, Any] = {"made_from": made_from, "fingerprint": model_fingerprint(folder)}
    if plan.is_file():
        cut = PruningPlan.read(plan)
        record |= {"num_layers": len(cut.keep), "drop": list(cut.drop), "plan": cut.in_words()}
    artifact = _new_artifact(f"{folder.name}-{run.id}", "model", record)
    if upload:
        artifact.add_dir(str(folder), name="checkpoint", policy="immutable", skip_cache=True)
    else:
        artifact.add_reference(folder.resolve().as_uri(), name="checkpoint", checksum=False)
    run.log_artifact(artifact)


def _results(run: Run, run_dir: Path, files: list[Path], recipe: dict[str, Any]) -> None:
    """The files as they are, but for secrets in settings."""
    artifact = _new_artifact(f"results-{run.id}", "results", {"made_from": [_artifact_name(recipe["model"])]})
    texts = {"recipe.yaml": yaml.safe_dump(redacted(recipe), sort_keys=False, allow_unicode=True)}
    for file in files:
        text = file.read_text(encoding="utf-8")
        name = str(file.relative_to(run_dir))
        texts[name] = json.dumps(redacted(json.loads(text)), indent=1) if file.suffix == ".json" else text
    for name, text in texts.items():
        with artifact.new_file(name, encoding="utf-8") as handle:
            handle.write(text)
    run.log_artifact(artifact)


def _new_artifact(name: str, kind: str, record: dict[str, Any]) -> Artifact:
    """``record`` is its metadata and, since W&B makes a new version only of another content, a file in it too."""
    import wandb

    artifact = wandb.Artifact(name, kind, metadata=record)
    with artifact.new_file("made_from.json", encoding="utf-8") as handle:
        json.dump(record, handle, indent=1)
    return artifact


def _hub_address(recipe: dict[str, Any]) -> str | None:
    """Address of the teacher's page; None where it is a folder of this machine."""
    name = recipe["model"]
    if name.startswith((DEMO_PREFIX, ".", "/", "~")) or name.count("/") > 1 or Path(name).exists():
        return None
    return f"https://huggingface.co/{name}" + (f"/tree/{recipe['revision']}" if recipe["revision"] else "")


def _artifact_name(model: str) -> str:
    """Name of a model among artifacts: the same in every run that starts from it."""
    name = Path(model).name if model.startswith((".", "/", "~")) else model
    return re.sub(r"[^\w.-]+", "-", name).strip("-") or "model"


def _hashed(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes() if file.is_file() else b"absent")
    return digest.hexdigest()[:16]


@contextmanager
def _staged_in(folder: Path) -> Iterator[None]:
    """Let W&B keep the files of artifacts in ``folder`` until they are uploaded, and not in the user's home."""
    if "WANDB_DATA_DIR" in os.environ:
        yield
        return
    os.environ["WANDB_DATA_DIR"] = str(folder.resolve())
    try:
        yield
    finally:
        del os.environ["WANDB_DATA_DIR"]
