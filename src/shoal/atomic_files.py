"""Files and folders that are whole or absent, whoever dies while they are written."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from shoal.errors import UserError, explained_disk_errors


def write_json(path: Path, value: Any, *, setting: str = "run_dir") -> None:
    """Write plain JSON as write_text does."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n", setting=setting)


def write_text(path: Path, text: str, *, setting: str = "run_dir") -> None:
    """Write a text file as written_file does."""
    with written_file(path, setting=setting) as temporary:
        temporary.write_text(text, encoding="utf-8")


def make_folder(path: Path, *, setting: str = "run_dir") -> None:
    """Make a folder and those above it, where they are not there; ``setting`` as in written_file.

    Raises:
        UserError: a file is in the way, or this place takes no folder of the user.
    """
    with explained_disk_errors(path, setting=setting):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # those above are made first, so it is this place that has none: /proc
            raise UserError(
                f"{path}: cannot be made ({error.strerror}); set {setting} to a folder you may write to"
            ) from error


@contextmanager
def written_file(path: Path, *, setting: str = "run_dir") -> Iterator[Path]:
    """A temporary name that becomes ``path`` when the block ends well: readers see the old or the new, never half.

    What was written there is on the disk before it gets its name; ``setting`` is what a user can set to write
    elsewhere.
    """
    with explained_disk_errors(path, setting=setting):
        make_folder(path.parent, setting=setting)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
        try:
            yield temporary
            flush(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


RENAME_EXCHANGE = 2
"""Of linux/fs.h."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What disks answer that cannot lock files: Lustre without -o flock, NFS without lockd."""


def flush(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def written_folder(path: Path, *, setting: str = "run_dir") -> Iterator[Path]:
    """A temporary sibling folder that becomes ``path`` when the block ends well, and vanishes when it does not.

    An existing ``path`` is replaced only then; ``setting`` is what a user can set to write elsewhere. Several processes
    may do this at once: the last one to finish wins, and each removes only the leftovers of dead ones.
    """
    with explained_disk_errors(path, setting=setting):
        make_folder(path.parent, setting=setting)
        remove_leftovers(path)
        temporary, lock = _locked_folder(path)
        try:
            yield temporary
            for part in (*temporary.rglob("*"), temporary):  # what vouches for the folder is flushed, so this is before
                flush(part)
            put_in_place(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(lock)


def _locked_folder(path: Path) -> tuple[Path, int]:
    """A new temporary sibling of ``path`` and the descriptor that holds its lock.

    The operating system lets go of the lock when the process dies, however it dies; a process number in the name would
    say nothing to another machine or container on the same disk.
    """
    while True:
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
        temporary.mkdir()
        try:
            descriptor = os.open(temporary, os.O_RDONLY)
        except FileNotFoundError:
            continue  # another process took it for a leftover
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)  # it is just being removed, for the same reason
            continue
        except OSError:
            return temporary, descriptor  # NFS cannot lock a folder: then nobody removes it, dead or alive
        if temporary.exists():
            return temporary, descriptor
        os.close(descriptor)


def remove_leftovers(path: Path) -> None:
    """Delete the temporary siblings of ``path`` that dead processes left, and put back what one had moved aside, lest a
    second failure lose it."""
    for aside in path.parent.glob(f".{glob.escape(path.name)}.*.old"):
        if path.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # another process was faster
                aside.rename(path)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        try:
            descriptor = os.open(leftover, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue  # gone meanwhile, or no folder
        with contextlib.suppress(OSError):  # a living process holds it, or this disk cannot lock
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(leftover, ignore_errors=True)
        os.close(descriptor)


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename ``temporary`` to ``path`` in place of what is there.

    Where the disk can, the two change places in one step, so that a process killed at any moment leaves the old one or
    the new one there. Else what is there is moved aside first, as often as others put something there.
    """
    if _exchanged(temporary, path):
        shutil.rmtree(temporary, ignore_errors=True)
        return
    aside = temporary.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.old")
    while True:
        with contextlib.suppress(FileNotFoundError):
            path.rename(aside)
        try:
            temporary.rename(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                if aside.exists():
                    aside.rename(path)
                raise
        else:
            shutil.rmtree(aside, ignore_errors=True)
            return
        shutil.rmtree(aside, ignore_errors=True)


def _exchanged(first: Path, second: Path) -> bool:
    """Whether both names now hold what the other one held: renameat2 of Linux, which Python does not offer.

    False where one of them holds nothing, and on systems and disks that cannot.
    """
    exchange = getattr(ctypes.CDLL(None), "renameat2", None)
    names = os.fsencode(first.absolute()), os.fsencode(second.absolute())  # so the descriptors 0 are not looked at
    return exchange is not None and exchange(0, names[0], 0, names[1], RENAME_EXCHANGE) == 0


def read_text(path: Path) -> str:
    """A file's text.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start:,}); save it as UTF-8") from error


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, however large it is."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_hash(path: Path) -> str:
    """The same, read once for every state of the file: identities ask for it again and again."""
    state = path.stat()
    return _hash_of_state(path.resolve(), state.st_mtime_ns, state.st_size)


@cache
def _hash_of_state(path: Path, _changed_at: int, _size: int) -> str:
    return file_hash(path)


def file_hashes(place: Path) -> list[tuple[str, str]]:
    """(path from ``place``, SHA-256) of every file under it that is not hidden; of a file its own, without a path."""
    if place.is_file():
        return [("", known_hash(place))]
    paths = sorted(path.relative_to(place) for path in place.rglob("*") if path.is_file())
    return [(str(path), known_hash(place / path)) for path in paths if not any(part[0] == "." for part in path.parts)]


def fingerprint(value: object) -> str:
    """A short content hash of any JSON-ready value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cache_dir() -> Path:
    """Folder of what shoal keeps between runs: $SHOAL_CACHE, else shoal's folder in the user's cache; of a user without
    a home, one for temporary files."""
    if named := os.environ.get("SHOAL_CACHE"):
        return Path(named)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "shoal"
    try:
        return Path.home() / ".cache" / "shoal"
    except RuntimeError:  # no $HOME, and the system knows no such user
        return Path(tempfile.gettempdir()) / f"shoal-{os.geteuid()}"
