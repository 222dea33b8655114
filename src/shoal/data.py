"""Text sources, and how text becomes rows of tokens.

A packed row holds several documents back to back. `position_ids` start again at every document, and transformers' mask
functions read that as a border no attention crosses; the label at a border is ignored, since no document can know the next.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal.artifact import fingerprint
from shoal.errors import UserError
from shoal.recipe import DataSource

log = logging.getLogger(__name__)

IGNORED = -100
HELD_OUT_SHARE = 8
"""One topic in eight of Python's documentation is kept for evaluation."""


def python_docs(*, held_out: bool) -> list[str]:
    """Python's documentation topics, split into training and held-out documents that share no paragraph.

    Topics quote each other (`compound` contains `if`), so the split is by topic first, and then every paragraph that a held-out
    document contains is taken out of the training documents.
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    ours = [name for name in names if int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0]
    kept_back = {paragraph.strip() for name in ours for paragraph in topics[name].split("\n\n")}
    if held_out:
        return _without_repeats(topics[name].split("\n\n") for name in ours)
    others = (
        [p for p in topics[name].split("\n\n") if p.strip() not in kept_back] for name in names if name not in ours
    )
    return _without_repeats(others)


def _without_repeats(documents: Any) -> list[str]:
    """Documents joined from paragraphs, each paragraph only where it is first seen."""
    seen: set[str] = set()
    joined = []
    for paragraphs in documents:
        fresh = [p for p in paragraphs if p.strip() and p.strip() not in seen]
        seen.update(p.strip() for p in fresh)
        if fresh:
            joined.append("\n\n".join(fresh))
    return joined


def ability_texts() -> list[str]:
    """Prompts with answers of the three abilities, from the items that evaluation never sees."""
    from shoal.abilities import training_texts

    return training_texts(num_texts=4000, seed=0)


BUNDLED: dict[str, Callable[[], list[str]]] = {
    "python_docs": lambda: python_docs(held_out=False),
    "python_docs_heldout": lambda: python_docs(held_out=True),
    "ability_texts": ability_texts,
}
TEACHER_TEXT = "teacher_text"
"""Name of the source that the teacher writes itself before training starts."""


def load_texts(source: DataSource, *, max_characters: int | None = None) -> list[str]:
    """The documents of one source, in order; reading stops after ``max_characters``.

    Raises:
        UserError: nothing there, no such column, or no text in it.
    """
    texts: list[str] = []
    characters = 0
    for text in _iterate(source):
        if text.strip():
            texts.append(text)
            characters += len(text)
        if max_characters is not None and characters >= max_characters:
            break
    if not texts:
        raise UserError(f"data {source.path!r}: holds no text in column {source.column!r}; name a source that does")
    return texts


def _iterate(source: DataSource) -> Iterator[str]:
    if source.path in BUNDLED:
        return iter(BUNDLED[source.path]())
    return _read_dataset(source)


def _read_dataset(source: DataSource) -> Iterator[str]:
    from datasets import load_dataset

    path = Path(source.path).expanduser()
    kinds = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet", ".csv": "csv"}
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in kinds)
        preferred = [file for file in files if file.stem == source.split] or files
        if not preferred:
            raise UserError(f"data {source.path!r}: the folder holds no {', '.join(kinds)} file")
        path = preferred[0]
    if path.is_file():
        if path.suffix not in kinds:
            raise UserError(f"data {source.path!r}: cannot read {path.suffix!r} files; use one of {', '.join(kinds)}")
        if path.stat().st_size == 0:
            raise UserError(f"data {source.path!r}: the file is empty; name a source that holds text")
        arguments: dict[str, Any] = {"path": kinds[path.suffix], "data_files": str(path), "split": "train"}
    elif source.path.startswith((".", "/", "~")) or path.suffix in kinds:
        raise UserError(
            f"data {source.path!r}: no such file or folder; bundled sources are {', '.join([*BUNDLED, TEACHER_TEXT])}"
        )
    else:
        arguments = {"path": source.path, "name": source.name, "split": source.split}
    try:
        rows = load_dataset(streaming=True, **arguments)
        for row in rows:
            if source.column not in row:
                columns = ", ".join(map(str, row))
                raise UserError(f"data {source.path!r}: has no column {source.column!r}; it has {columns}")
            yield str(row[source.column])
    except UserError:
        raise
    except Exception as error:  # datasets raises a dozen unrelated types for "not there" and "not readable"
        known = ", ".join([*BUNDLED, TEACHER_TEXT])
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"data {source.path!r}: cannot be read ({type(error).__name__}: {reason}); bundled sources are {known}"
        ) from error


def texts_fingerprint(texts: Sequence[str]) -> str:
    """Content hash of documents in order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(len(text).to_bytes(8, "little") + text.encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class PackedRows:
    """Rows of exactly S tokens. N rows, S sequence. 32-bit, and possibly memory-mapped: a token costs eight bytes."""

    input_ids_NS: Tensor
    position_ids_NS: Tensor
    """Restart at 0 with every document."""
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    """Per source: documents, tokens, split (documents cut at a row's end)."""

    def __len__(self) -> int:
        return len(self.input_ids_NS)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        input_ids, position_ids = self.input_ids_NS[row].long(), self.position_ids_NS[row].long()
        return {"input_ids": input_ids, "position_ids": position_ids, "labels": _labels(input_ids, position_ids)}

    @property
    def labels_NS(self) -> Tensor:
        """The token itself where it may be predicted from the ones before it, IGNORED at every document's start."""
        return _labels(self.input_ids_NS.long(), self.position_ids_NS)

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.input_ids_NS.numpy().tobytes())
        digest.update(self.position_ids_NS.numpy().tobytes())
        return digest.hexdigest()[:16]


def _labels(input_ids: Tensor, position_ids: Tensor) -> Tensor:
    return input_ids.masked_fill(position_ids == 0, IGNORED)


def pack(
    sources: Sequence[tuple[DataSource, Sequence[str]]],
    tokenizer: Any,
    *,
    sequence_length: int,
    num_tokens: int,
    seed: int,
) -> PackedRows:
    """``num_tokens`` tokens of text (rounded up to whole rows), in the sources' weights, as rows of ``sequence_length``.

    Documents are drawn in a seeded order; one that does not fit a row's rest goes on in the next row as a document of
    its own. A source that runs out starts again in a new order: small data is repeated, never silently shortened.

    Raises:
        UserError: a source that tokenises to nothing.
    """
    num_rows = -(-num_tokens // sequence_length)
    total = num_rows * sequence_length
    ids, positions = np.empty(total, np.int32), np.empty(total, np.int32)
    total_weight = sum(source.weight for source, _ in sources)
    streams = [_documents(texts, tokenizer, seed=seed + index) for index, (_, texts) in enumerate(sources)]
    counts = [{"documents": 0, "tokens": 0, "split": 0} for _ in sources]
    filled = 0
    while filled < total:
        # the source that is furthest behind its share goes next: exact weights at every length, no randomness
        turn = min(range(len(sources)), key=lambda i: counts[i]["tokens"] * total_weight / sources[i][0].weight)
        document = next(streams[turn])
        counts[turn]["documents"] += 1
        start = 0
        while start < len(document) and filled < total:
            room = sequence_length - filled % sequence_length
            part = document[start : start + room]
            ids[filled : filled + len(part)] = part
            positions[filled : filled + len(part)] = np.arange(len(part))
            start += len(part)
            filled += len(part)
            counts[turn]["split"] += start < len(document)
        counts[turn]["tokens"] += start
    shape = (num_rows, sequence_length)
    return PackedRows(
        torch.from_numpy(ids.reshape(shape)),
        torch.from_numpy(positions.reshape(shape)),
        {source.path: count for (source, _), count in zip(sources, counts, strict=True)},
    )


def _documents(texts: Sequence[str], tokenizer: Any, *, seed: int) -> Iterator[list[int]]:
    """Token lists with start (where the model has one it adds) and end token, endless, reshuffled every epoch."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    at_once = 256  # fast tokenizers work through a list with all cores
    for epoch in itertools.count():
        order = list(range(len(texts)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        empty = True
        for start in range(0, len(order), at_once):
            batch = [texts[index] for index in order[start : start + at_once]]
            for document in tokenizer(batch)["input_ids"]:
                if document:
                    empty = False
                    yield document + end
        if empty:
            raise UserError("data: every document tokenises to nothing; name a source that holds text")


def sources_fingerprint(sources: Sequence[DataSource]) -> str:
    """Content hash for bundled and local sources, the description for Hub ones (their revision is in the cache, not here)."""
    parts = []
    for source in sources:
        path = Path(source.path).expanduser()
        content: Any = None
        if source.path in BUNDLED:
            content = texts_fingerprint(BUNDLED[source.path]())
        elif path.is_file():
            with path.open("rb") as handle:
                content = hashlib.file_digest(handle, "sha256").hexdigest()
        parts.append([source.path, source.column, source.split, source.name, source.weight, content])
    return fingerprint(parts)
