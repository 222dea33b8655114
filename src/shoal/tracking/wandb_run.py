"""Weights & Biases: one run for the whole life of a run directory, whichever stage writes to it.

Tracking looks on. Results are on the disk before anything of them is logged, and nothing that goes wrong here ends a
run: it is said once, and the stage goes on without.
"""

from __future__ import annotations

import hashlib
import json
import logging
import netrc
import os
import re
import secrets
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import ValidationError

from shoal.artifacts.importance import Importance
from shoal.artifacts.plan import Plan
from shoal.artifacts.training import Training
from shoal.atomic_files import write_text
from shoal.errors import UserError
from shoal.ranks import is_main
from shoal.recipe.recipe import Track
from shoal.redaction import redacted, redacted_arguments

if TYPE_CHECKING:
    from wandb import Run

log = logging.getLogger(__name__)

RUN_ID_FILE = "wandb_run_id"
LOGGED_FILE = "wandb_logged"
UPLOAD_WAIT_S = 300
"""Seconds that a stage waits at its end for uploads; all of it is on the disk anyway."""
RESULT_FILES = (Importance.FILE, Plan.FILE, Training.FILE, "eval/*.json", "report.*", "figures/*.svg")

_given_up = False


def wandb_mode(track: Track) -> Literal["online", "offline", "off"]:
    """online, offline or off: nothing is sent unless the recipe, WANDB_MODE=online or WANDB_PROJECT asks for it, also
    where somebody is logged in.

    Raises:
        UserError: online was asked for and there is no API key, or one that W&B would refuse.
    """
    if track.wandb in ("off", "offline"):
        return track.wandb
    wanted = os.environ.get("WANDB_MODE") if track.wandb is None else None
    if wanted in ("offline", "dryrun"):
        return "offline"
    in_variables = wanted == "online" or (wanted is None and bool(os.environ.get("WANDB_PROJECT")))
    is_asked = track.wandb == "online" or (track.wandb is None and in_variables)
    if is_asked and (key := _key()):
        if not re.fullmatch(r"\w{40,}|[^-]*-[\w-]{40,}|[\w-]+(\.[\w-]+){2}", key):  # of an own server; short-lived
            raise UserError(
                f"track.wandb: the API key is not one of W&B (40 or more letters and digits; it has {len(key)} "
                "characters); run `wandb login`, correct WANDB_API_KEY, or set track.wandb=off"
            )
        return "online"
    if track.wandb == "online":
        raise UserError("track.wandb: online needs an API key; run `wandb login`, set WANDB_API_KEY, or use offline")
    return "off"


def _key() -> str:
    """The key in the environment or in the file that `wandb login` writes, empty = none; W&B is not loaded for it."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    server = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(server)
    except (OSError, ValueError, netrc.NetrcParseError):  # not there, or nothing that W&B could read
        return ""
    return (found or ("", "", ""))[2]


def start(track: Track, run_dir: Path, recipe: dict[str, Any]) -> Run | None:
    """The W&B run of ``run_dir``, begun or gone on with, on rank 0; None where nothing is tracked.

    Where W&B cannot be reached, this process goes on offline.
    """
    mode = wandb_mode(track)
    if mode == "off" and is_main():
        log.info("curves: in %s/log.jsonl; track.wandb=online sends them to W&B too", run_dir)
    if mode == "off" or _given_up or not is_main():
        return None
    with attempt("it could not be started", run_dir):
        return _open(mode, track, run_dir, recipe)
    return None


def finish(run_dir: Path) -> None:
    """Close the W&B run of this process, if there is one, and wait a while for what is still to be uploaded."""
    if "wandb" in sys.modules and sys.modules["wandb"].run is not None:
        with attempt("the rest was not uploaded", run_dir):
            sys.modules["wandb"].finish()


def log_results(
    track: Track, run_dir: Path, recipe: dict[str, Any], score_rows: Callable[[Path], list[dict[str, Any]]]
) -> None:
    """Log on rank 0 the scores, figures and result files of the run directory, unless just these were logged before.

    ``score_rows`` reads the before/after table of a run directory: column, role, task, protocol, metric, score,
    share_kept and wording_gap among others.
    """
    files = sorted(file for pattern in RESULT_FILES for file in run_dir.glob(pattern))
    if not files or not is_main() or wandb_mode(track) == "off":
        return
    with attempt("results could not be logged", run_dir):
        digest = hashlib.sha256()
        for file in files:
            digest.update(file.read_bytes())
        marker = run_dir / LOGGED_FILE
        if marker.is_file() and marker.read_text(encoding="utf-8") == digest.hexdigest():
            return
        if (run := start(track, run_dir, recipe)) is None:
            return
        if any(file.parent.name == "eval" for file in files):
            _log_scores(run, score_rows(run_dir))
        _log_files(run, run_dir, files, recipe)
        finish(run_dir)
        write_text(marker, digest.hexdigest())


def _log_scores(run: Run, rows: list[dict[str, Any]]) -> None:
    """The before/after table; scores, shares kept and wording gaps go into the summary, by which W&B compares runs."""
    import wandb

    for row in rows:
        # the column stands first where it is known: nobody takes a score in the trained wording for another
        name = "/".join(row[key] for key in ("column", "role", "task", "protocol", "metric") if row[key])
        values = {f"{key}/{name}": row[key] for key in ("score", "share_kept", "wording_gap") if row[key] is not None}
        run.summary.update(values)
    if rows:
        table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        run.log({"before_after": table})


def _log_files(run: Run, run_dir: Path, files: list[Path], recipe: dict[str, Any]) -> None:
    """Figures as media, the other files as one artifact; as they are, but for secrets in settings."""
    import wandb

    artifact = wandb.Artifact(f"results-{run.id}", "results")
    texts = {"recipe.yaml": yaml.safe_dump(redacted(recipe), sort_keys=False, allow_unicode=True)}
    for file in files:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".svg":
            run.log({f"figures/{file.stem}": wandb.Html(text, inject=False)})
        else:
            record = json.dumps(redacted(json.loads(text)), indent=1) if file.suffix == ".json" else text
            texts[str(file.relative_to(run_dir))] = record
    for name, text in texts.items():
        with artifact.new_file(name, encoding="utf-8") as handle:
            handle.write(text)
    run.log_artifact(artifact)


@contextmanager
def attempt(problem: str, run_dir: Path) -> Iterator[None]:
    """Let tracking fail with one warning that says ``problem``; after that this process tracks nothing any more."""
    global _given_up
    try:
        yield
    except Exception as error:
        if not _given_up:
            log.warning(
                "W&B: %s (%s). This process stops tracking; results are in %s as always, and to upload what W&B has "
                "recorded there: %s",
                problem,
                _reason(error),
                run_dir,
                sync_command(run_dir),
            )
        _given_up = True


def is_tracking() -> bool:
    """Whether a W&B run is open in this process and has not failed."""
    return not _given_up and "wandb" in sys.modules and sys.modules["wandb"].run is not None


def sync_command(run_dir: Path) -> str:
    """The command that uploads the records of a run directory later."""
    return f"wandb sync --include-online {shlex.quote(str(run_dir / 'wandb'))}"


def _open(mode: Literal["online", "offline"], track: Track, run_dir: Path, recipe: dict[str, Any]) -> Run:
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_DATA_DIR", str((run_dir / "wandb").resolve()))  # artifacts wait there, not in ~
    import wandb

    from shoal.runtime import environment

    id_file = run_dir / RUN_ID_FILE
    is_new = not id_file.is_file()
    if is_new:
        write_text(id_file, secrets.token_hex(4) + "\n")
    arguments: dict[str, Any] = {
        "project": redacted(os.environ.get("WANDB_PROJECT") or track.project),
        "name": redacted(os.environ.get("WANDB_NAME") or run_dir.resolve().name),
        "tags": redacted(track.tags) or None,
        "dir": str(run_dir),
        "id": id_file.read_text(encoding="utf-8").strip(),
        "resume": "allow",
        "settings": wandb.Settings(finish_timeout=UPLOAD_WAIT_S, finish_timeout_raises=True),
    }
    command_line = sys.argv
    sys.argv = redacted_arguments(command_line)  # W&B records it, and a setting on it may be a secret
    try:
        run = wandb.init(mode=mode, **arguments)
    except wandb.Error as error:
        if mode == "offline":
            raise
        later = sync_command(run_dir)
        log.warning("W&B: cannot go online (%s); this stage is tracked offline, later: %s", _reason(error), later)
        wandb.teardown()  # its service still holds the id of the run that did not come about
        run = wandb.init(mode="offline", **arguments)
    finally:
        sys.argv = command_line
    # not at the top level: the Trainer puts its arguments and the model's configuration there, under the same names
    run.config.update(redacted({"recipe": recipe, "environment": environment()}), allow_val_change=True)
    where = f"offline; to upload it: {sync_command(run_dir)}" if run.offline else str(run.url)
    log.info("W&B: %s %s, %s", "run" if is_new else "resuming run", run.id, where)
    return run


def _reason(error: Exception) -> str:
    """The first line of what went wrong, without secrets."""
    text = str(error)
    if isinstance(error, ValidationError):  # whose first line does not say of what
        text = "; ".join(f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}" for wrong in error.errors())
    line = redacted(text).strip().split("\n")[0]
    return line[:300] or type(error).__name__
