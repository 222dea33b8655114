"""Sources of text and conversations: bundled ones, files, folders, data sets on the Hub, and what a caller has."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, TypeVar

from huggingface_hub import HfApi, constants

from shoal.atomic_files import cache_dir, fingerprint, known_hash, write_json
from shoal.data.bundled import BUNDLED, BUNDLED_ROWS, SLOW, origin
from shoal.data.chat import Chat, ImageRow, chat_of, column_of
from shoal.errors import UserError
from shoal.formatting import meant
from shoal.recipe.distill import TrainingSource
from shoal.recipe.messages import checked
from shoal.recipe.section import AUTO, Column, Conversation, Data, DataSource, Messages, PromptCompletion, Section

log = logging.getLogger(__name__)

Given = str | Path | Mapping[str, Any] | Iterable[Any]
"""Data that a caller has: the name of a data set or of bundled text, or a source as a recipe has it, a mapping with
`path`; texts; or rows (mappings, such as those of `datasets.Dataset`) with columns that column_in finds. Rows are gone
through more than once, so they are no generator; a stream of `datasets` is one that has no length."""
CHARACTERS_PER_TOKEN = 16
"""Characters: more than any tokenizer puts into a token of prose on average."""
Source = TypeVar("Source", bound=DataSource)
Item = str | Chat | ImageRow
"""A document before it is tokenised."""
READERS = {".jsonl": "json", ".json": "json", ".txt": "text", ".csv": "csv", ".parquet": "parquet"}
"""File ending -> its reader in `datasets`; a .txt file is one document, which `datasets` would cut into lines."""


def load_texts(source: DataSource, *, max_characters: int | None = None) -> list[str]:
    """The documents of one source, in order; reading stops after ``max_characters``.

    Raises:
        UserError: nothing there, no such column, or no text in it.
    """
    texts: list[str] = []
    characters = 0
    for text in documents(source, text_only=True):
        if text is not None:
            texts.append(str(text))
            characters += len(str(text))
        if max_characters is not None and characters >= max_characters:
            break
    if not texts:
        raise nothing_in(source)
    return texts


NO_OPENING = "no text has the {} tokens that the teacher starts from; lower generate.prompt_tokens, or name other texts"


def to_write(source: TrainingSource, *, sequence_length: int) -> TrainingSource:
    """A source that the teacher writes, for rows of ``sequence_length``, with its columns."""
    found, how = opened(source), source.generate
    if how is not None and found.is_chat and how.max_new_tokens >= sequence_length:
        raise UserError(
            f"data {source.path!r}: generate.max_new_tokens: {how.max_new_tokens} leave no room for a question in a "
            f"row of {sequence_length}; lower it, or raise distill.sequence_length"
        )
    if how is not None and how.keep == "correct" and not found.is_chat:
        raise UserError(
            f"data {source.path!r}: holds texts, and generate.keep: correct compares answers; name conversations "
            "(`messages`, or `prompt` and `completion`), or set it to all"
        )
    if how is not None and not found.is_chat and local_files(source):
        longest = max(len(text.encode()) for text in load_texts(found, max_characters=1_000_000))
        if longest + 1 < how.prompt_tokens:  # no token but the first is less than a byte
            raise UserError(f"data {source.path!r}: {NO_OPENING.format(how.prompt_tokens)}")
    return found


def nothing_in(source: DataSource) -> UserError:
    """The refusal of a source without content."""
    match source.column:
        case Messages(messages=column) | PromptCompletion(prompt=column):
            content = f"conversation in column {column!r}"
        case column:
            content = f"text in column {column!r}" if column else "text"
    return UserError(f"data {source.path!r}: no {content} was found; name a source that has some")


def column_in(row: Any) -> Column:
    """The columns by the names that the field gives them, of which the first row of a source has these: conversations
    before text; None = it has none. A row may be a text."""
    if isinstance(row, str):
        return "text"
    names = set(row) if isinstance(row, Mapping) else set()
    if "messages" in names:
        return Messages(messages="messages")
    if {"prompt", "completion"} <= names:
        return PromptCompletion(prompt="prompt", completion="completion")
    return "text" if "text" in names else None


def with_column(source: Source, row: Any) -> Source:
    """``source`` with the columns that it names, or that ``row``, its first one, has.

    Raises:
        UserError: it names none, and the row has none of the known ones.
    """
    if source.column is not None:
        return source
    if (column := column_in(row)) is None:
        found = f"values of type {type(row).__name__}"
        if isinstance(row, Mapping):
            found = f"the columns {', '.join(map(str, row))}"
        raise UserError(
            f"data {source.path!r}: the first row holds {found}; give texts, or rows with `messages`, `prompt` and "
            "`completion`, or `text`, or name the source's `column`"
        )
    return replace(source, column=column)


def opened(source: Source) -> Source:
    """``source`` with its columns; without any where it is bundled text."""
    if source.path in BUNDLED:
        if source.column is not None:
            raise UserError(f"data {source.path!r}: holds texts without columns; remove column")
        local_files(source)
        return source
    if source.column is not None:
        return source
    first = next(records(source), None)
    if first is None:
        raise nothing_in(source)
    return with_column(source, first[1])


def documents(source: DataSource, *, text_only: bool = False) -> Iterator[str | Chat | None]:
    """Every row's text or conversation, in order; None for an empty one.

    Raises:
        UserError: nothing there, no such column, a column of another kind, or of anything but text with ``text_only``.
    """
    if source.path in BUNDLED:
        opened(source)
        yield from (text if text.strip() else None for text in _bundled(source.path))
        return
    rows = records(source)
    if (first := next(rows, None)) is None:
        return
    found = with_column(source, first[1])
    if text_only and not found.is_text:
        content = "images with questions" if found.has_images else "conversations"
        raise UserError(f"data {source.path!r}: holds {content}, which only distill.data uses; name its column of text")
    yield from documents_in(itertools.chain([first], rows), found)


def documents_in(rows: Iterable[tuple[str, Any]], source: DataSource) -> Iterator[str | Chat | None]:
    """The text or conversation of every row, which stands beside the name of what it is from; None for an empty one.
    The columns of ``source`` are known.

    Raises:
        UserError: a row without the column that ``source`` names, or with something else in it.
    """
    of_files = itertools.groupby(rows, itemgetter(0))
    for where, number, row in ((where, number, row) for where, own in of_files for number, (_, row) in enumerate(own)):
        place = f"{where!r} row {number}"
        if isinstance(source.column, Messages | PromptCompletion):
            yield chat_of(row, source.column, place)
        else:
            assert isinstance(source.column, str)
            text = _text(row, source.column, place)
            yield text if text.strip() else None


def records(source: DataSource) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row of a file, folder or Hub data set, with the file or data set that it comes from.

    Raises:
        UserError: nothing there, or what cannot be read.
    """
    if source.path in BUNDLED_ROWS:
        yield from ((source.path, row) for row in _bundled(source.path))
        return
    if source.path == AUTO:
        raise UserError(f"data {AUTO!r}: works only in measure.data and distill.data; name a source here")
    try:
        files = local_files(source)
        if files is None:
            yield from ((source.path, row) for row in _hub_rows(source))
        for file in files or ():
            yield from ((str(file), row) for row in _file_rows(file))
    except UserError:
        raise
    except Exception as error:  # datasets raises a dozen unrelated types for "not there" and "not readable"
        reason = str(error).strip().split("\n")[0][:200]
        is_here = Path(source.path).expanduser().exists()
        remedy = "fix the file, or remove it" if is_here else _known_sources(source.path)
        if isinstance(error, PermissionError):
            remedy = "change who may read it, or remove it"
        other, own = getattr(error, "filename", None), Path(source.path).expanduser().resolve()
        if is_here and other is not None and not Path(other).resolve().is_relative_to(own):
            remedy = "the file is not the cause; set HF_HOME and HF_DATASETS_CACHE to folders that you may write to"
        raise UserError(f"data {source.path!r}: cannot be read ({type(error).__name__}: {reason}); {remedy}") from error


@functools.cache
def _bundled(name: str) -> tuple[Any, ...]:
    """All texts or rows of a bundled source; those that take seconds to make are kept for the next process."""
    make, file = {**BUNDLED, **BUNDLED_ROWS}[name], cache_dir() / "text" / f"{name}-{origin()}.json"
    if not name.startswith(SLOW):
        return tuple(make())
    with contextlib.suppress(OSError, ValueError):  # not there, or torn
        return tuple(json.loads(file.read_text(encoding="utf-8")))
    texts = make()
    try:
        write_json(file, texts, setting="SHOAL_CACHE")
    except UserError as error:
        log.info("data %r: is read and tokenised again every time: %s", name, error)
    return tuple(texts)


def local_files(source: DataSource) -> list[Path] | None:
    """The files of a local source; None of bundled text, and where the path can only be a Hub id.

    Of a folder those that are named after the split (`train.jsonl`, `train-00000-of-00002.parquet`), else all.
    """
    path, kinds, picks = Path(source.path).expanduser(), ", ".join(READERS), source.split != DataSource.split
    is_path = source.path.startswith((".", "/", "~")) or path.suffix.lower() in READERS or source.path.count("/") > 1
    files = sorted(path.glob("[!.]*")) if path.is_dir() else [path]  # hidden ones are of editors and file systems
    files = [file for file in files if file.is_file() and file.suffix.lower() in READERS]
    of_split = [file for file in files if file.stem == source.split or file.stem.startswith(f"{source.split}-")]
    is_bundled = source.path in BUNDLED or source.path in BUNDLED_ROWS
    problems = (
        (is_bundled and (picks or source.name is not None), "is bundled, and has no split and no name; remove them"),
        (not path.exists() and is_path, f"no such file or folder; {_known_sources(source.path)}"),
        (path.exists() and source.name is not None, "name is for the Hub and has no effect here; remove it"),
        (path.exists() and not path.is_dir() and not path.is_file(), "is a device or a pipe; name a regular file"),
        (path.is_dir() and not files, f"the folder holds no {kinds} file; name another folder"),
        (path.is_file() and not files, f"cannot read {path.suffix!r} files; use one of {kinds}"),
        (path.is_file() and picks, "is a single file, which has no splits; remove split"),
        (path.is_dir() and picks and not of_split, f"no file of the folder is named after the split {source.split!r}"),
    )
    if problem := next((words for is_so, words in problems if is_so), None):
        raise UserError(f"data {source.path!r}: {problem}")
    return ((path.is_dir() and of_split) or files) if path.exists() and not is_bundled else None


def _file_rows(file: Path) -> Iterable[dict[str, Any]]:
    if file.stat().st_size == 0:
        raise UserError(f"data {str(file)!r}: the file is empty; name a file with text")
    reader = READERS[file.suffix.lower()]
    if reader == "text":
        return [{"text": file.read_text(encoding="utf-8")}]
    if reader == "json":
        _refuse_deep(file)
    from datasets import config, load_dataset

    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # what it says of a torn file, shoal does
    had, config.TORCH_AVAILABLE = config.TORCH_AVAILABLE, "torch" in sys.modules  # which it would load for its workers
    try:
        return load_dataset(reader, data_files=str(file), split="train", streaming=True)
    finally:
        config.TORCH_AVAILABLE = had


def _refuse_deep(file: Path, most: int = 500) -> None:
    """Refuse JSON that nests deeper in its first 16 MB: its reader recurses, and would end the process."""
    with file.open("rb") as handle:
        for line in handle.readlines(2**24):
            if line.count(b"[") + line.count(b"{") > most:
                brackets = re.sub(rb'"(?:[^"\\]|\\.)*"|[^][{}]', b"", line)
                if max(itertools.accumulate(1 if bracket in b"[{" else -1 for bracket in brackets), default=0) > most:
                    raise UserError(f"data {str(file)!r}: nests deeper than {most}; flatten it, or remove it")


def _hub_rows(source: DataSource) -> Iterable[dict[str, Any]]:
    from datasets import load_dataset

    if not constants.HF_HUB_OFFLINE:
        HfApi().dataset_info(source.path, timeout=10)  # load_dataset alone tries an unreachable Hub for half a minute
    return load_dataset(source.path, source.name, split=source.split, streaming=True)


def _text(row: Any, column: str, where: str) -> str:
    text = column_of(row, column, where)
    if text is not None and not isinstance(text, str):
        raise UserError(f"data {where}: column {column!r} holds {type(text).__name__}, not text; name a column of text")
    return text or ""


def _known_sources(name: str) -> str:
    known = [*BUNDLED, *BUNDLED_ROWS]
    return meant(name, known, f"bundled sources are {', '.join(known)}", cutoff=0.6)


def texts_fingerprint(texts: Sequence[str]) -> str:
    """Content hash of documents in order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(len(text).to_bytes(8, "little") + text.encode())
    return digest.hexdigest()[:16]


def source_names(sources: Sequence[DataSource]) -> list[str]:
    """The path of every source, with a number where several share one."""
    often, seen, names = Counter(source.path for source in sources), Counter[str](), []
    for source in sources:
        seen[source.path] += 1
        names.append(source.path if often[source.path] == 1 else f"{source.path} ({seen[source.path]})")
    return names


def sources_fingerprint(sources: Sequence[DataSource]) -> str:
    """Hash of what bundled and local sources hold; of Hub sources only the description, their revision is not known.

    Raises:
        UserError: no such file or folder, or a file of an unknown kind.
    """
    parts = []
    for source in sources:
        content: Any = None
        if source.path in BUNDLED:
            content = texts_fingerprint(_bundled(source.path))
        elif source.path in BUNDLED_ROWS:
            content = fingerprint(_bundled(source.path))
        else:
            content = [[file.name, known_hash(file)] for file in local_files(source) or ()]
        parts.append([*source.text_settings.values(), content])
    return fingerprint(parts)


@dataclass(frozen=True)
class Documents:
    """The texts or conversations of a data set in memory, in order, anew in every pass; None for an empty one."""

    rows: Iterable[Any]
    source: DataSource
    """Columns that are read, and tokens that are learnt."""
    characters: int | None = None
    """Characters after which a stream is left; None = all are read."""

    def __iter__(self) -> Iterator[str | Chat | None]:
        rows = ({"text": row} if isinstance(row, str) else row for row in self.rows)
        read = 0
        for document in documents_in(((self.source.path, row) for row in rows), self.source):
            if self.characters is not None and read >= self.characters:
                return
            read += size_of(document) if document is not None else 0
            yield document


def size_of(item: Item) -> int:
    """Characters of a document."""
    return len(item) if isinstance(item, str) else item.num_characters


@dataclass(frozen=True)
class _Sources(Section):
    data: Data


def is_source(data: Given) -> bool:
    """Whether ``data`` names or describes a source, instead of being texts or rows."""
    if isinstance(data, tuple):
        return any(isinstance(one, DataSource) for one in data)
    return isinstance(data, str | Path) or (isinstance(data, Mapping) and "path" in data)


def is_stream(data: Given) -> bool:
    """Whether ``data`` are rows of which nobody knows how many there are."""
    return not is_source(data) and not hasattr(data, "__len__")


def sources_of(
    data: Given,
    *,
    name: str = "data",
    loss_on: Literal["assistant", "all"] | None = None,
    num_tokens: int | None = None,
) -> list[tuple[DataSource, Documents | None]]:
    """The sources that ``data`` is, as shoal.data.streams.pack takes them; of a stream as much as ``num_tokens`` need.

    Raises:
        UserError: as documents_of does, or a source that is none.
    """
    if is_source(data):
        if loss_on is not None:
            raise UserError(f"data {name!r}: a source sets loss_on itself; remove loss_on from the arguments")
        return [(source, None) for source in checked(_Sources, {"data": data}, source=name).data]
    documents = documents_of(data, name=name, loss_on=loss_on)
    if is_stream(data):
        if num_tokens is None:
            raise UserError(f"data {name!r}: is a stream without an end; set num_tokens (for a trainer: max_steps)")
        documents = replace(documents, characters=CHARACTERS_PER_TOKEN * num_tokens)
    return [(documents.source, documents)]


def documents_of(
    dataset: Given, *, name: str = "dataset", loss_on: Literal["assistant", "all"] | None = None
) -> Documents:
    """The documents of ``dataset``, which is called ``name`` in messages; its first row tells the columns.

    Of conversations the assistant's tokens are learnt, or all of them with ``loss_on="all"``.

    Raises:
        UserError: it is empty, can be gone through only once, or its rows have none of the known columns; ``loss_on``
            is no such word, or says something of conversations, and there are none.
    """
    is_table = hasattr(dataset, "to_dict") and hasattr(dataset, "iloc")
    has_rows = isinstance(dataset, Iterable) and getattr(dataset, "shape", None) != ()  # a number of torch's has none
    if is_table or isinstance(dataset, str | Path | Mapping | Iterator | Set) or not has_rows:
        remedy = "datasets.Dataset.from_pandas converts a frame" if is_table else "choose one of its splits"
        raise UserError(
            f"data {name!r}: is {type(dataset).__name__}; give a list of texts, or a data set with rows ({remedy})"
        )
    for first in dataset:
        source, given = with_column(DataSource(name), first), {"loss_on": "assistant" if loss_on is None else loss_on}
        break
    else:
        raise nothing_in(DataSource(name))
    learnt = checked(Messages, {"messages": "messages", **given}, source=f"data {name!r}").loss_on
    if isinstance(source.column, Conversation):
        source = replace(source, column=replace(source.column, loss_on=learnt))
    elif loss_on == "assistant":
        raise UserError("loss_on: assistant needs conversations; give rows with messages, or prompt and completion")
    return Documents(dataset, source)
