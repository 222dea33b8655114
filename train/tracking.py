"""Weights & Biases: one run id for the whole life of a run directory."""

from __future__ import annotations

import logging
import os
import secrets
from pathlib import Path
from typing import Any, Literal

from shoal.artifact import write_text
from shoal.errors import UserError
from shoal.recipe import Track
from shoal.runtime import is_main

log = logging.getLogger(__name__)

RUN_ID_FILE = "wandb_run_id"


def wandb_mode(track: Track) -> Literal["online", "offline", "off"]:
    """online, offline or off.

    Raises:
        UserError: online was asked for and there is no API key.
    """
    if track.wandb in ("off", "offline"):
        return track.wandb
    has_key = _has_key()
    if track.wandb == "online" and not has_key:
        raise UserError("track.wandb: online needs an API key; run `wandb login`, set WANDB_API_KEY, or use offline")
    return "online" if has_key else "offline"


def start(track: Track, run_dir: Path, config: dict[str, Any]) -> list[str]:
    """Start or resume tracking on rank 0; returns what TrainingArguments.report_to wants.

    The run id is kept in the run directory, so that a resumed training draws on into the same curves.
    """
    mode = wandb_mode(track)
    if mode == "off":
        return []
    if not is_main():
        return ["wandb"]
    import wandb

    id_file = run_dir / RUN_ID_FILE
    if not id_file.is_file():
        write_text(id_file, secrets.token_hex(4) + "\n")
    os.environ.setdefault("WANDB_SILENT", "true")
    run = wandb.init(
        project=track.project,
        name=track.name or run_dir.name,
        tags=track.tags or None,
        config=config,
        dir=str(run_dir),
        id=id_file.read_text().strip(),
        resume="allow",
        mode=mode,
    )
    hint = f"; later: wandb sync {run_dir}/wandb/offline-run-*" if mode == "offline" else f": {run.url}"
    log.info("W&B: %s, run id %s%s", mode, run.id, hint)
    return ["wandb"]


def finish() -> None:
    """Close the W&B run of this process, if there is one."""
    if is_main():
        import wandb

        if wandb.run is not None:
            wandb.finish()


def _has_key() -> bool:
    import netrc

    if os.environ.get("WANDB_API_KEY"):
        return True
    file = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return any("wandb" in host for host in netrc.netrc(file).hosts)
    except (FileNotFoundError, netrc.NetrcParseError):
        return False
