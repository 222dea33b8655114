"""What a user can fix, and how it is said."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_USER_ERROR = 2


class UserError(ValueError):
    """Wrong input: the message names what is wrong, the value and the remedy.

    The command line prints the message without a traceback and exits with code 2; every other exception is a defect of
    ours and keeps its traceback.
    """


@contextmanager
def explained_disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn a full or read-only disk under ``path`` into a UserError.

    safetensors and torch wrap the operating system's error in types of their own, so the text is looked at as well.
    """
    try:
        yield
    except Exception as error:
        text = str(error)
        number = error.errno if isinstance(error, OSError) else None
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text or "os error 28" in text:
            raise UserError(
                f"{path}: the disk is full; nothing was left half-written there. "
                "Free some space or set run_dir to another disk, then run the same command again"
            ) from error
        if number in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UserError(f"{path}: cannot be written ({text}); set run_dir to a folder you may write to") from error
        raise
