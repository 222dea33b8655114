"""Text sources, and how text becomes rows of tokens.

A packed row holds several documents back to back. `position_ids` start again at every document, and transformers' mask
functions read that as a border no attention crosses; the label at a border is ignored, since no document can know the
next.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import itertools
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal.artifact import fingerprint
from shoal.errors import UserError
from shoal.section import DataSource

log = logging.getLogger(__name__)

IGNORED = -100
HELD_OUT_SHARE = 8
"""One topic in eight of Python's documentation is kept for evaluation."""


def python_docs(*, held_out: bool) -> list[str]:
    """Python's documentation topics, split into training and held-out documents that share no paragraph.

    Topics quote each other (`compound` contains `if`), so the split is by topic first, and then every paragraph that a
    held-out document contains is taken out of the training documents.
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
        fresh = []
        for paragraph in paragraphs:
            if paragraph.strip() and paragraph.strip() not in seen:
                seen.add(paragraph.strip())
                fresh.append(paragraph)
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
READERS = {".jsonl": "json", ".json": "json", ".txt": "text", ".csv": "csv", ".parquet": "parquet"}
"""File ending -> its reader in `datasets`; a .txt file is one document, which `datasets` would cut into lines."""


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
        yield from _bundled(source.path)
        return
    if source.path == TEACHER_TEXT:
        raise UserError(
            f"data {TEACHER_TEXT!r}: is written while distilling, for distill.data only; name another source"
        )
    for where, row in _records(source):
        yield _text(row, source.column, where)


def load_labelled(source: DataSource, label_column: str) -> list[tuple[str, Any]]:
    """Text and label of every row of a file, folder or Hub data set, in order.

    Raises:
        UserError: nothing there, a missing column, or a row without text or label.
    """
    found: list[tuple[str, Any]] = []
    for number, (where, row) in enumerate(_records(source)):
        text, label = _text(row, source.column, where), _field(row, label_column, where)
        if not text.strip() or label is None:
            empty = source.column if not text.strip() else label_column
            raise UserError(f"data {where!r}: row {number} has nothing in column {empty!r}; fill it or leave it out")
        found.append((text, label))
    return found


def _records(source: DataSource) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row, with the file or data set that it comes from."""
    try:
        files = _local_files(source)
        if files is None:
            yield from ((source.path, row) for row in _hub_rows(source))
        for file in files or ():
            yield from ((str(file), row) for row in _file_rows(file))
    except UserError:
        raise
    except Exception as error:  # datasets raises a dozen unrelated types for "not there" and "not readable"
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"data {source.path!r}: cannot be read ({type(error).__name__}: {reason}); {_known_sources(source.path)}"
        ) from error


@functools.cache
def _bundled(name: str) -> tuple[str, ...]:
    return tuple(BUNDLED[name]())


def _local_files(source: DataSource) -> list[Path] | None:
    """The files of a local source; None where the path can only be a Hub id.

    Of a folder those that are named after the split (`train.jsonl`, `train-00000-of-00002.parquet`), else all.
    """
    path = Path(source.path).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and file.suffix.lower() in READERS)
        if not files:
            raise UserError(f"data {source.path!r}: the folder holds no {', '.join(READERS)} file; name one that does")
        of_split = [file for file in files if file.stem == source.split or file.stem.startswith(f"{source.split}-")]
        return of_split or files
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise UserError(f"data {source.path!r}: cannot read {path.suffix!r} files; use one of {', '.join(READERS)}")
        return [path]
    if source.path.startswith((".", "/", "~")) or path.suffix.lower() in READERS:
        raise UserError(f"data {source.path!r}: no such file or folder; {_known_sources(source.path)}")
    return None


def _file_rows(file: Path) -> Iterable[dict[str, Any]]:
    if file.stat().st_size == 0:
        raise UserError(f"data {str(file)!r}: the file is empty; name a source that holds text")
    reader = READERS[file.suffix.lower()]
    if reader == "text":
        return [{"text": file.read_text(encoding="utf-8")}]
    from datasets import load_dataset

    return load_dataset(reader, data_files=str(file), split="train", streaming=True)


def _hub_rows(source: DataSource) -> Iterable[dict[str, Any]]:
    from datasets import load_dataset
    from huggingface_hub import HfApi, constants

    if not constants.HF_HUB_OFFLINE:
        HfApi().dataset_info(source.path, timeout=10)  # load_dataset alone tries an unreachable Hub for half a minute
    return load_dataset(source.path, source.name, split=source.split, streaming=True)


def _text(row: dict[str, Any], column: str, where: str) -> str:
    text = _field(row, column, where)
    if text is not None and not isinstance(text, str):
        raise UserError(
            f"data {where!r}: column {column!r} holds {type(text).__name__}, not text; name a column of text"
        )
    return text or ""


def _field(row: dict[str, Any], column: str, where: str) -> Any:
    if column not in row:
        raise UserError(f"data {where!r}: has no column {column!r}; it has {', '.join(map(str, row))}")
    return row[column]


def _known_sources(name: str) -> str:
    known = [*BUNDLED, TEACHER_TEXT]
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"bundled sources are {', '.join(known)}"


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
    """``num_tokens`` tokens (rounded up to whole rows) of the sources by weight, as rows of ``sequence_length``.

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
                    yield document if document[-1:] == end else document + end
        if empty:
            raise UserError("data: every document tokenises to nothing; name a source that holds text")


def sources_fingerprint(sources: Sequence[DataSource]) -> str:
    """Hash of what bundled and local sources hold; of Hub sources only the description, their revision is not known."""
    parts = []
    for source in sources:
        content: Any = None
        if source.path in BUNDLED:
            content = texts_fingerprint(_bundled(source.path))
        elif source.path != TEACHER_TEXT:
            content = [[file.name, _file_hash(file)] for file in _local_files(source) or ()]
        parts.append([source.path, source.column, source.split, source.name, source.weight, content])
    return fingerprint(parts)


def _file_hash(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
