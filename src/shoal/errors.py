"""What a user can fix, and how it is said."""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_USER_ERROR = 2


class UserError(ValueError):
    """Wrong input. The message names the argument, the problem, the value and the fix.

    The command line prints the message without a traceback and exits with code 2. Any other exception is a defect of
    shoal: please report its traceback.

    Example:
        >>> shoal.cut_model(model, [99])
        Traceback (most recent call last):
        shoal.errors.UserError: ...
    """


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of the system for a disk that takes no more."""
UNUSABLE = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EIO)
_FULL_TEXTS = (
    *(f"os error {number}" for number in DISK_FULL),  # safetensors
    *(os.strerror(number) for number in DISK_FULL),
    "requested and",  # numpy: "102400 requested and 57344 written"
    "PytorchStreamWriter failed",
    "iostream error",  # torch.save, where its last bytes do not fit: "basic_ios::clear: iostream error"
    "inline_container",  # torch.save: "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"
)

NO_ANSWER = (json.JSONDecodeError, KeyError, TypeError, AttributeError)
"""What huggingface_hub raises where something else than a Hub has answered."""
NO_TOKEN = "no Hugging Face token was found; run `hf auth login`"
NO_HUB = "the server that answers is not a Hub ({}); check the network, and HF_ENDPOINT"


def not_encoded(what: str) -> str:
    """The message for a name or an argument that is no text in the encoding of the locale."""
    return (
        f"{what}: contains letters that the encoding of this locale ({sys.getfilesystemencoding()}) does not have; "
        "set LC_ALL=C.UTF-8 or PYTHONUTF8=1, or use other letters"
    )


@contextmanager
def explained_paths() -> Iterator[None]:
    """Turn a path that the system can have nowhere, not in this locale, or does not let this user at, into a UserError;
    what reads or writes it need not look for that."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise UserError(f"{error.filename}: cannot be a path ({error.strerror}); choose another name") from error
        if error.filename is None or error.errno not in UNUSABLE:
            raise
        remedy = "change who may read and write it, or choose another place"
        raise UserError(f"{error.filename}: cannot be used ({error.strerror}); {remedy}") from error
    except RuntimeError as error:
        if "Symlink loop" in str(error):  # pathlib's, too
            raise UserError(f"{error}: the link leads to itself; remove it, or choose another name") from error
        if "home directory" not in str(error):  # pathlib's, of a path that begins with ~
            raise
        raise UserError("~: this user has no home folder; set HOME, or write the full path") from error
    except UnicodeEncodeError as error:
        raise UserError(not_encoded(repr(error.object))) from error


def _close_files_of(error: BaseException) -> None:
    """Let go of what the frames of ``error`` hold, and of those it came from: torch.save leaves its file open in them,
    and a deleted file that is open takes room on the full disk for as long as somebody keeps the error."""
    held: BaseException | None = error
    while held is not None:
        traceback.clear_frames(held.__traceback__)
        held = held.__context__


@contextmanager
def explained_disk_errors(path: str | os.PathLike[str], *, setting: str = "run_dir") -> Iterator[None]:
    """Turn a full or read-only disk under ``path`` into a UserError that says to change ``setting``.

    safetensors and torch wrap the operating system's error in types of their own, so the text is looked at as well.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = str(error)
        number = error.errno if isinstance(error, OSError) else None
        if number in DISK_FULL or any(known in text for known in _FULL_TEXTS):
            _close_files_of(error)
            raise UserError(
                f"{path}: the disk is full, or your quota or file size limit is reached; no half-written file was "
                f"left. Free some space or set {setting} to another disk, then run the same command again"
            ) from error
        if number in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UserError(
                f"{path}: cannot be written ({text}); set {setting} to a folder you may write to"
            ) from error
        if number in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            kind = "folder" if number == errno.EISDIR else "file"
            raise UserError(
                f"{path}: a {kind} with this name exists ({text}); set {setting} to another folder"
            ) from error
        raise
