"""Checkpoints that shoal makes once and keeps: the converted demo model, adapters merged into their base."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Callable
from pathlib import Path

from shoal.atomic_files import NO_LOCKS, make_folder, written_folder
from shoal.errors import UserError, explained_disk_errors
from shoal.models.checkpoint_files import check_checkpoint
from shoal.progress import doing

log = logging.getLogger(__name__)


def made_once(folder: Path, make: Callable[[Path], None], *, action: str) -> Path:
    """The whole checkpoint at ``folder``, into which ``make`` writes it on first use; ``action`` says so in the log.

    Of several processes one makes it and the others wait. What ``make`` leaves unfinished never stands there.

    Raises:
        UserError: the cache cannot be written, or as ``make`` does.
    """
    if _is_whole(folder):
        return folder
    make_folder(folder.parent, setting="SHOAL_CACHE")
    with explained_disk_errors(folder, setting="SHOAL_CACHE"):
        lock = (folder.parent / f".{folder.name}.lock").open("w")
    with lock:
        log.info(action)
        with doing(action):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                log.warning("%s: this disk cannot lock files; start only one shoal that fills it", folder.parent)
            if not _is_whole(folder):  # another process may have made it meanwhile
                with written_folder(folder, setting="SHOAL_CACHE") as temporary:
                    make(temporary)
    return folder


def _is_whole(folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        return False
    try:
        check_checkpoint(folder)
    except UserError as error:
        log.warning("%s; making it again", error)
        return False
    return True
