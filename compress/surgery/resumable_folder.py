"""A folder that is written over hours has one writer."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from shoal.atomic_files import NO_LOCKS, make_folder
from shoal.errors import UserError, explained_disk_errors

log = logging.getLogger(__name__)


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Nobody else writes ``path`` while the block runs, whatever becomes of this process.

    Raises:
        UserError: another process is writing it.
    """
    with explained_disk_errors(path):
        make_folder(path.parent)
        lock_file = path.with_name(f".{path.name}.lock")
        handle = _locked(lock_file, path)
    try:
        yield
    finally:
        lock_file.unlink(missing_ok=True)
        handle.close()


def _locked(lock_file: Path, path: Path) -> IO[str]:
    """The open and locked ``lock_file``: no folder, because NFS locks only what is open for writing."""
    while True:
        handle = lock_file.open("a")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            raise UserError(
                f"{path}: is being written by another process; wait for it or choose another folder"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            log.warning("%s: this disk cannot lock files; start only one process that writes there", path)
            return handle
        if lock_file.exists() and os.path.samestat(os.fstat(handle.fileno()), lock_file.stat()):
            return handle
        handle.close()  # its last holder has just deleted it
