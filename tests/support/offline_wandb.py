"""What a W&B run that was tracked offline holds, read from its files without W&B's service."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK, HEADER, PREAMBLE = 32768, 7, 7
WHOLE, LAST = 1, 4
"""Kinds of pieces with which a record ends."""


@dataclass
class Tracked:
    """All offline sessions of a run directory, in the order in which they were made."""

    ids: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    artifacts: dict[str, Any] = field(default_factory=dict)
    """The last version's record by name; metadata as JSON."""
    arguments: list[str] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)
    """By their path in the run."""

    def table(self, name: str) -> list[dict[str, Any]]:
        """The rows of the table that was logged last under ``name``."""
        path = [row[f"{name}/path"] for row in self.history if f"{name}/path" in row][-1]
        body = json.loads(self.files[path].read_text())
        return [dict(zip(body["columns"], row, strict=True)) for row in body["data"]]

    def content(self, artifact: str) -> dict[str, str]:
        """The texts in an artifact, by path."""
        entries = self.artifacts[artifact].manifest.contents
        return {entry.path: Path(entry.local_path).read_text() for entry in entries if entry.local_path}


def read_tracked(run_dir: Path) -> Tracked:
    """What is recorded under ``run_dir``/wandb."""
    found = Tracked()
    for folder in sorted((run_dir / "wandb").glob("offline-run-*")):
        found.files |= {str(file.relative_to(folder / "files")): file for file in (folder / "files").rglob("*")}
        (file,) = folder.glob("*.wandb")
        for record in records(file):
            _add(found, record)
    return found


def records(file: Path) -> Iterator[Any]:
    """The records of a transaction log: pieces, each under a header of 7 bytes, in blocks of 32 KB."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    written, at, whole = file.read_bytes(), PREAMBLE, b""
    while at + HEADER <= len(written):
        if (left := BLOCK - at % BLOCK) < HEADER:
            at += left
            continue
        length, kind = struct.unpack("<HB", written[at + 4 : at + HEADER])
        whole += written[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (WHOLE, LAST):
            yield Record.FromString(whole)
            whole = b""


def _add(found: Tracked, record: Any) -> None:
    match record.WhichOneof("record_type"):
        case "run":
            found.ids.append(record.run.run_id)
            found.config |= _values(record.run.config.update)
        case "config":
            found.config |= _values(record.config.update)
        case "summary":
            found.summary |= _values(record.summary.update)
        case "history":
            found.history.append(_values(record.history.item))
        case "artifact":
            found.artifacts[record.artifact.name] = record.artifact
        case "environment":
            found.arguments += record.environment.args


def _values(items: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
