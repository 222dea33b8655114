"""Checkpoints that are complete or absent.

DeepSpeed writes its pointer before all shards exist, accepts flipped bytes and, with the pointer missing, quietly
starts from the beginning. So a checkpoint here counts only once its manifest, written last and renamed, names every
file with its size and checksum; one that does not match its manifest is skipped with a message.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from shoal.artifact import differences, write_text
from shoal.errors import UserError
from shoal.runtime import is_main, rank, world_size

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


def commit(folder: Path, inputs: dict[str, Any]) -> None:
    """Make the files in ``folder`` a complete checkpoint of the run that ``inputs`` describes; every rank calls this.

    Ranks share the hashing: a large checkpoint is read once by all of them together.
    """
    _barrier()
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST)
    mine = {str(file.relative_to(folder)): _stamp(file) for file in files[rank() :: world_size()]}
    gathered: list[Any] = [mine]
    if dist.is_initialized() and world_size() > 1:
        gathered = [None] * world_size()
        dist.all_gather_object(gathered, mine)
    if is_main():
        stamps = {name: stamp for part in gathered for name, stamp in part.items()}
        write_text(folder / MANIFEST, json.dumps({"inputs": inputs, "files": stamps}, indent=1))
    _barrier()


def last_complete(folder: Path, inputs: dict[str, Any]) -> Path | None:
    """The newest complete checkpoint under ``folder``; damaged ones are named in the log and skipped.

    Raises:
        UserError: the newest complete one belongs to another run.
    """
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=_step, reverse=True):
        problem = _damage(checkpoint)
        if problem is not None:
            log.warning("%s: %s; going back to the checkpoint before it", checkpoint, problem)
            continue
        found = json.loads((checkpoint / MANIFEST).read_text())["inputs"]
        differing = differences(inputs, found)
        if differing:
            raise UserError(
                f"{checkpoint}: belongs to another run: {'; '.join(differing)}. Set the recipe back, choose another "
                f"run_dir, or delete {folder} to train from the beginning"
            )
        return checkpoint
    return None


def remove_older(folder: Path, *, keep: int) -> None:
    """Delete all but the newest ``keep`` complete checkpoints. Called after a commit, so that one always remains."""
    complete = [c for c in sorted(folder.glob("checkpoint-*"), key=_step) if (c / MANIFEST).is_file()]
    for old in complete[:-keep]:
        (old / MANIFEST).unlink()  # first: a half-deleted checkpoint must not look whole
        shutil.rmtree(old)


def _damage(checkpoint: Path) -> str | None:
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except FileNotFoundError:
        return "was not finished"
    except json.JSONDecodeError:
        return "has a damaged manifest"
    for name, stamp in manifest["files"].items():
        file = checkpoint / name
        if not file.is_file():
            return f"lacks {name}"
        if file.stat().st_size != stamp["bytes"]:
            return f"{name} has {file.stat().st_size:,} bytes instead of {stamp['bytes']:,}"
        if _stamp(file) != stamp:
            return f"{name} does not match its checksum"
    return None


def _stamp(file: Path) -> dict[str, Any]:
    with file.open("rb") as handle:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}


def _step(checkpoint: Path) -> int:
    digits = checkpoint.name.removeprefix("checkpoint-")
    return int(digits) if digits.isdigit() else -1


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
