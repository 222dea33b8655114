"""Answers of all variants, kept on disk as they come in, so that a long sweep goes on where it was stopped.

Every request is known by its content, so neither the order of the tasks nor the number of ranks matters: each rank
appends to a file of its own and reads those of all.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoal.errors import explained_disk_errors

log = logging.getLogger(__name__)


class Answers:
    """Request -> what every variant answered, in the order of the variants."""

    def __init__(self, folder: Path | None, identity: str, *, rank: int = 0) -> None:
        """``identity`` says of what model and variants; files of another identity are begun anew. None = not kept."""
        self._known: dict[str, list[Any]] = {}
        self._path = None if folder is None else folder / f"answers-{rank}.jsonl"
        self._identity = identity
        self._is_begun = False
        """Whether this rank's file holds answers of this identity."""
        if folder is not None:
            for path in sorted(folder.glob("answers-*.jsonl")):
                self._read(path)
            if self._known:
                log.info("sweep: goes on from %d requests that are answered already", len(self._known))

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def of(self, key: str, variant: int) -> Any:
        return self._known[key][variant]

    def add(self, keys: Sequence[str], answers: Sequence[list[Any]]) -> None:
        """Remember the answers of all variants to every request, on the disk too."""
        self._known.update(zip(keys, answers, strict=True))
        if self._path is None:
            return
        lines = [json.dumps([key, answer]) for key, answer in zip(keys, answers, strict=True)]
        with explained_disk_errors(self._path):
            if not self._is_begun:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                lines.insert(0, json.dumps({"identity": self._identity}))
            with self._path.open("a" if self._is_begun else "w", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
        self._is_begun = True

    def _read(self, path: Path) -> None:
        with explained_disk_errors(path):
            lines = path.read_text(encoding="utf-8").split("\n")
        found = [line for line in map(_parsed, lines) if line is not None]
        if not found or found[0] != {"identity": self._identity}:
            return  # not removed: another rank may be about to read it
        self._known.update(found[1:])
        if path != self._path:
            return
        self._is_begun = True
        if lines[-1]:  # a line that was being written when the process died
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")


def key_of(*parts: Any) -> str:
    """A short hash of a request's content."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _parsed(line: str) -> Any:
    try:
        return json.loads(line) if line else None
    except json.JSONDecodeError:
        return None
