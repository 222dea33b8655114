"""Weights & Biases: one run for the whole life of a run directory, whichever stage writes to it.

Tracking looks on. Results are on the disk before anything of them is logged, and nothing that goes wrong here ends a
run: it is said once, and the stage goes on without. What is logged of which result: shoal.tracking.wandb_results.
"""

from __future__ import annotations

import logging
import os
import secrets
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shoal.atomic_files import write_text
from shoal.errors import UserError
from shoal.recipe.track import Track
from shoal.redaction import redacted, redacted_arguments
from shoal.runtime import environment, is_main
from shoal.tracking.login import has_key, wanted_mode

if TYPE_CHECKING:
    from wandb import Run

log = logging.getLogger(__name__)

RUN_ID_FILE = "wandb_run_id"
UPLOAD_WAIT_S = 300
"""Seconds that a stage waits at its end for uploads; all of it is on the disk anyway."""
FULL_DISK_BYTES = 100_000
"""Bytes of free space below which the last records are lost, and W&B does not say so."""

_given_up = False


def wandb_mode(track: Track) -> Literal["online", "offline", "off"]:
    """online, offline or off.

    Raises:
        UserError: online was asked for and there is no API key.
    """
    if track.wandb in ("off", "offline"):
        return track.wandb
    wanted = wanted_mode() if track.wandb is None else None
    if wanted in ("offline", "dryrun"):
        return "offline"
    if wanted != "disabled" and has_key():
        return "online"
    if track.wandb == "online":
        raise UserError("track.wandb: online needs an API key; run `wandb login`, set WANDB_API_KEY, or use offline")
    return "off"


def start(track: Track, run_dir: Path, recipe: dict[str, Any], *, wait_s: float = UPLOAD_WAIT_S) -> Run | None:
    """The W&B run of ``run_dir``, begun or gone on with, on rank 0; None where nothing is tracked.

    Where W&B cannot be reached, this process goes on offline. At its end it waits ``wait_s`` for uploads.
    """
    mode = wandb_mode(track)
    if mode == "off" or _given_up or not is_main():
        return None
    with attempt("it could not be started", run_dir):
        return _open(mode, track, run_dir, recipe, wait_s)
    return None


def finish(run_dir: Path) -> None:
    """Close the W&B run of this process, if there is one, and wait a while for what is still to be uploaded."""
    if "wandb" not in sys.modules:
        return
    import wandb

    if wandb.run is None:
        return
    with attempt("what is left was not uploaded", run_dir):
        wandb.finish()
    if shutil.disk_usage(run_dir).free < FULL_DISK_BYTES:
        give_up("the disk is full, so its records are not complete", run_dir)


@contextmanager
def attempt(problem: str, run_dir: Path) -> Iterator[None]:
    """Let tracking fail with one warning that says ``problem``; after that this process tracks nothing any more."""
    try:
        yield
    except Exception as error:
        give_up(f"{problem} ({_reason(error)})", run_dir)


def give_up(problem: str, run_dir: Path) -> None:
    """Track nothing more in this process, and say so the first time."""
    global _given_up
    if not _given_up:
        log.warning(
            "W&B: %s. Nothing more is tracked by this process; results are in %s as always, and what W&B has recorded "
            "there is uploaded with: %s",
            problem,
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


def tell_unsent(track: Track, run_dir: Path) -> None:
    """Say where W&B's records of ``run_dir`` lie that no server has, and what uploads them."""
    if wandb_mode(track) == "off":
        return
    runs = run_dir.glob("wandb/offline-run-*")
    for folder in sorted({run.parent for run in runs if not any(run.glob("*.synced"))}):
        log.info("W&B: %s was recorded offline; upload it with: %s", folder, sync_command(folder.parent))


def _open(
    mode: Literal["online", "offline"], track: Track, run_dir: Path, recipe: dict[str, Any], wait_s: float
) -> Run:
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    id_file = run_dir / RUN_ID_FILE
    is_new = not id_file.is_file()
    if is_new:
        write_text(id_file, secrets.token_hex(4) + "\n")
    arguments: dict[str, Any] = {
        "project": redacted(track.project),
        "name": redacted(track.name or run_dir.resolve().name),
        "tags": redacted(track.tags) or None,
        "dir": str(run_dir),
        "id": id_file.read_text().strip(),
        "resume": "allow",
        "settings": wandb.Settings(finish_timeout=wait_s, finish_timeout_raises=True),
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
    where = "offline" if run.offline else str(run.url)
    log.info("W&B: %s %s, %s", "run" if is_new else "going on with run", run.id, where)
    return run


def _reason(error: Exception) -> str:
    """The first line of what went wrong, without secrets."""
    line = redacted(str(error)).strip().split("\n")[0]
    return line[:300] or type(error).__name__
