"""Answers of models, kept on disk as they come in: what was stopped goes on from them, what is repeated is free.

Every answer is known by the content of its request, so neither the order of the tasks nor the number of ranks matters:
each rank appends to a file of its own and reads those of all.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoal.artifacts.artifact import Json
from shoal.atomic_files import fingerprint
from shoal.errors import explained_disk_errors

ENGINE = 1
"""Version of the engine; raise it with every change that gives other values for the same request."""


class ItemCache:
    """Request -> its answer, in memory and, with a folder, in ``<name>-<rank>.jsonl`` there.

    A file is one line that says whose answers it holds, and then one line per answer. It is only ever appended to, so a
    process that dies loses the answers of the batch it was at, and at most one line is torn; that one is skipped.
    """

    def __init__(
        self, folder: Path | None = None, identity: str = "", *, name: str | None = None, rank: int = 0
    ) -> None:
        """``identity`` says whose answers these are; a file called ``name`` (default: that identity) with answers of
        another one is begun anew."""
        name = name or identity
        self._known: dict[str, Json] = {}
        self._path = None if folder is None else folder / f"{name}-{rank}.jsonl"
        self._identity = identity
        self._is_begun = False
        """Whether this rank's file holds answers of this identity."""
        self._asked: set[str] = set()
        if folder is not None:
            for path in sorted(folder.glob(f"{name}-*.jsonl")):
                self._read(path)
        self._kept = frozenset(self._known)

    @property
    def num_asked(self) -> int:
        """Requests so far, each once."""
        return len(self._asked)

    @property
    def num_kept(self) -> int:
        """Requests so far whose answers were on the disk from the beginning, each once."""
        return len(self._asked & self._kept)

    def __len__(self) -> int:
        return len(self._known)

    def __getitem__(self, key: str) -> Json:
        return self._known[key]

    def missing(self, keys: Sequence[str]) -> list[int]:
        """Positions in ``keys`` of those without an answer, each once."""
        self._asked.update(keys)
        first: dict[str, int] = {}
        for index, key in enumerate(keys):
            if key not in self._known:
                first.setdefault(key, index)
        return list(first.values())

    def add(self, keys: Sequence[str], answers: Sequence[Json]) -> None:
        """Remember the answers to these requests, on the disk too."""
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
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")  # a damaged line is skipped
        entries = [entry for entry in map(_parsed, lines) if entry is not None]
        if not entries or entries[0] != {"identity": self._identity}:
            return  # not removed: another rank may be about to read it
        self._known.update(entries[1:])
        if path != self._path:
            return
        self._is_begun = True
        if lines[-1]:  # a line that was being written when the process died
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")


def key_of(*parts: Any) -> str:
    """A short hash of a request's content."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def identity_of(content: str, model: Any) -> str:
    """What the answers of ``model`` are known by: everything that shapes them and is no part of a request.

    ``content`` is the fingerprint of its configuration, tokenizer and weights. How many requests run together is left
    out: it moves a likelihood by rounding only.
    """
    generation = model.generation_config
    return fingerprint(
        {
            "content": content,
            "dtype": str(model.dtype),
            "attention": model.config._attn_implementation,
            "device": model.device.type,
            "generation": generation.to_diff_dict() if generation is not None else None,
            "engine": ENGINE,
            **versions(),
        }
    )


def versions() -> dict[str, str]:
    """Of the packages that answers come from."""
    return {package: importlib.metadata.version(package) for package in ("shoal", "torch", "transformers")}


def _parsed(line: str) -> Any:
    try:
        return json.loads(line) if line else None
    except json.JSONDecodeError:
        return None
