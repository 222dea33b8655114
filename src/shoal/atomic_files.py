"""Files and folders that are whole or absent, whoever dies while they are written."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import hashlib
import json
import logging
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock, Timeout

from shoal.errors import UserError, explained_disk_errors

log = logging.getLogger(__name__)


def write_json(path: Path, value: Any, *, setting: str = "run_dir") -> None:
    """Write plain JSON as write_text does."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n", setting=setting)


def write_text(path: Path, text: str, *, setting: str = "run_dir") -> None:
    """Write a text file as written_file does."""
    with written_file(path, setting=setting) as temporary:
        try:
            temporary.write_text(text, encoding="utf-8")
        except FileNotFoundError as error:  # the folder is there, so it takes no files: /proc
            raise _not_made(path, error, setting) from error


def make_folder(path: Path, *, setting: str = "run_dir") -> None:
    """Make a folder and those above it, where they are not there; ``setting`` as in written_file.

    Raises:
        UserError: a file is in the way, or this place takes no folder of the user.
    """
    with explained_disk_errors(path, setting=setting):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # those above are made first, so it is this place that has none: /proc
            raise _not_made(path, error, setting) from error


def free_disk(path: Path) -> int:
    """Bytes free where ``path`` is, or will be once its folders are made."""
    parent = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(parent).free


def _not_made(path: Path, error: OSError, setting: str) -> UserError:
    return UserError(f"{path}: cannot be created ({error.strerror}); set {setting} to a folder you may write to")


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
def only_process(lock_file: Path, what: str, *, wait_s: float) -> Iterator[None]:
    """Keep every other process that asks for ``lock_file`` out while the block runs; the operating system lets go when
    this one dies. A negative ``wait_s`` waits for as long as it takes.

    Raises:
        UserError: another process is still in after ``wait_s``; ``what``, which it uses, is named.
    """
    lock = FileLock(lock_file, timeout=wait_s)
    try:
        refuse_no_lock(lock_file)
        lock.acquire()
        lock_file.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    except Timeout:
        holder = lock_file.read_text() or "another process"
        raise UserError(f"{what}: is in use by {holder}; wait for it, stop it, or choose another folder") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise UserError(
                f"{lock_file}: cannot be locked ({error.strerror}); remove it, or choose another folder"
            ) from error
        log.warning("%s: this disk cannot lock files; start only one shoal process in this folder", lock_file.parent)
    try:
        yield
    finally:
        lock.release()


def refuse_no_lock(lock_file: Path) -> None:
    """Refuse a link or a folder in place of ``lock_file``."""
    if lock_file.is_symlink() or (lock_file.is_file() and lock_file.stat().st_nlink > 1):
        raise UserError(f"{lock_file}: a link to another file, which locking would empty; remove the link")
    if lock_file.is_dir():
        raise UserError(f"{lock_file}: cannot be locked (Is a directory); remove it, or choose another folder")


@contextmanager
def written_folder(path: Path, *, key: str | None = None, setting: str = "run_dir") -> Iterator[Path]:
    """A hidden sibling folder that becomes ``path`` when the block ends well, and vanishes on an error.

    An existing ``path`` is replaced only then; ``setting`` is what a user can set to write elsewhere. With ``key``, a
    fingerprint of all that goes into it, what a killed process left is found by the next one with the same key; every
    other leftover of dead processes is deleted.

    Raises:
        UserError: another process writes it with the same key, or the disk cannot take it.
    """
    with explained_disk_errors(path, setting=setting):
        path = path.resolve() if path.is_symlink() else path  # a link to a larger disk stays, and the folder goes there
        make_folder(path.parent, setting=setting)
        aside = path.with_name(f".{path.name}.old")
        if aside.exists() and not path.exists():  # a process died between two renames
            aside.rename(path)
        folder = path.with_name(f".{path.name}.{key or uuid.uuid4().hex[:12]}.partial")
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
            if leftover != folder and (dead := _lock_of(leftover)) is not None:
                shutil.rmtree(leftover, ignore_errors=True)
                os.close(dead)
        folder.mkdir(exist_ok=True)
        lock = _lock_of(folder)
        if lock is None:
            raise UserError(f"{path}: is being written by another process; wait for it or choose another folder")
        try:
            yield folder
            for part in (*folder.rglob("*"), folder):  # what vouches for the folder is flushed, so this is before
                flush(part)
            _put_in_place(folder, path, aside)
        except BaseException as error:
            if key is None or isinstance(error, Exception):  # what was refused must not be found again
                shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            os.close(lock)


def _lock_of(folder: Path) -> int | None:
    """The descriptor that locks a folder until it is closed or its process dies; None = a living one holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        pass  # NFS cannot lock a folder; run directories are locked by a file
    return descriptor


def _put_in_place(folder: Path, path: Path, aside: Path) -> None:
    """Rename ``folder`` to ``path``. Where the disk can, it and what is there change places in one step, so that a
    process killed at any moment leaves the old or the new one there."""
    if not _exchanged(folder, path):
        shutil.rmtree(aside, ignore_errors=True)
        if path.exists():
            path.rename(aside)
        folder.rename(path)
        folder = aside
    shutil.rmtree(folder, ignore_errors=True)


def _exchanged(first: Path, second: Path) -> bool:
    """Whether both names now hold what the other one held: renameat2 of Linux, which Python does not offer.

    False where one of them holds nothing, and on systems and disks that cannot.
    """
    exchange = getattr(ctypes.CDLL(None), "renameat2", None)
    names = os.fsencode(first.absolute()), os.fsencode(second.absolute())  # so the descriptors 0 are not looked at
    return exchange is not None and exchange(0, names[0], 0, names[1], RENAME_EXCHANGE) == 0


def read_text(path: Path) -> str:
    """A file's text."""
    refuse_endless(path)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start:,}); save it as UTF-8") from error


def refuse_endless(path: Path) -> None:
    """Refuse to read a pipe or a device, which may have no end."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path}: is a pipe or a device, not a file; remove it")


def strict_json(text: str) -> Any:
    """The value of JSON that shoal has written, in which no number is NaN and no key stands twice."""

    def refuse(word: str) -> NoReturn:
        raise json.JSONDecodeError(word, text, 0)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        return value if len(value) == len(pairs) else refuse("a key stands there twice")

    return json.loads(text, parse_constant=refuse, object_pairs_hook=once)


def read_json(path: Path, remedy: str = "delete it and run its stage again") -> dict[str, Any]:
    """The mapping that a JSON file holds; empty where there is no file. ``remedy`` ends what is said of another one."""
    refuse_endless(path)
    try:
        body = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON ({error}); {remedy}") from error
    if not isinstance(body, dict):
        raise UserError(f"{path}: must be a mapping of settings, got {type(body).__name__}; {remedy}")
    return body


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


def fingerprint(value: object) -> str:
    """A short content hash of any JSON-ready value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cache_dir() -> Path:
    """Folder of what shoal keeps between runs: $SHOAL_CACHE, else shoal's folder in the user's cache; of a user without
    a home, one for temporary files."""
    if named := os.environ.get("SHOAL_CACHE"):
        return Path(named).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "shoal"
    try:
        return Path.home() / ".cache" / "shoal"
    except RuntimeError:  # no $HOME, and the system knows no such user
        return Path(tempfile.gettempdir()) / f"shoal-{os.geteuid()}"
