"""What a run directory is told to remember while a verb works in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shoal.errors import EXIT_USER_ERROR, UserError
from shoal.ranks import is_main
from shoal.recipe.remembered import memory_in, memory_of, take_back
from shoal.redaction import redacted

from .launch import LaunchEnded


@contextmanager
def remembering(run_dir: Path, said: dict[str, Any]) -> Iterator[str | None]:
    """The Run.memory of what a recipe and overrides have ``said``; None on the ranks that write nothing.

    It is kept from when the run directory is locked, so that a run that is killed is remembered, too; what is refused,
    here or by launched ranks, is forgotten again.
    """
    if not is_main():
        yield None
        return
    memory, before = memory_of(redacted(said)), memory_in(run_dir)
    try:
        yield memory
    except (UserError, LaunchEnded) as error:
        if isinstance(error, UserError) or error.code == EXIT_USER_ERROR:
            take_back(run_dir, memory, before)
        raise
