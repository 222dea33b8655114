"""Sources of text and conversations, and how they become tokens: drawn by weight, streamed where they are large."""

from __future__ import annotations

import difflib
import functools
import hashlib
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from huggingface_hub import HfApi, constants

from shoal.abilities import items as ability_items
from shoal.abilities import training_texts
from shoal.abilities.facts import RELATIONS
from shoal.abilities.forms import FORMS
from shoal.abilities.knowledge import facts_in
from shoal.atomic_files import fingerprint, known_hash, write_json
from shoal.data.chat import Chat, ImageRow, chat_of, check_template, column_of, tokenised
from shoal.data.general_text import docstrings, instructions, python_docs, readmes
from shoal.data.packing import (
    COUNTS,
    FIELDS,
    SOURCES,
    PackedRows,
    Row,
    TokenDocument,
    best_fit_rows,
    collect,
    draw,
    packed_rows,
    read_rows,
    rows_apart,
    rows_by_kind,
    split_rows,
    teaching_rows,
    write_rows,
)
from shoal.errors import UserError
from shoal.progress import progress
from shoal.recipe.section import MIXED, TEACHER_TEXT, DataSource, Packing
from shoal.task_words import ABILITIES

T = TypeVar("T")
Item = str | Chat | ImageRow
"""A document before it is tokenised."""
Encode = Callable[[ImageRow], tuple[list[int], np.ndarray]]
"""Token ids of a row of images, and which of them are learnt."""


def ability_texts(*abilities: str, one_form: bool) -> list[str]:
    """Prompts with answers of these abilities in equal parts, from the items that evaluation never sees."""
    return training_texts(num_texts=4000, seed=0, mix=dict.fromkeys(abilities, 1.0), one_form=one_form)


def ability_prompts() -> list[dict[str, str]]:
    """Questions of the three abilities in their trained forms with the final answer, no item of which evaluation sees.

    A short answer is what a teacher's own words can be compared with (distill.writing.keep).
    """
    all_facts = sum(len(facts_in("train", relation)) for relation in RELATIONS)
    asked = (
        item
        for ability, forms in FORMS.items()
        for form in forms
        if not form.twin
        for item in ability_items(
            ability,
            split="train",
            num_items=all_facts if ability == "knowledge" else PROMPTS_OF_FORM,
            seed=0,
            form=form.name,
        )
    )
    answers = {item.question: str(item.params["final"]) for item in asked}
    return [{"question": question, "answer": answer} for question, answer in answers.items()]


PROMPTS_OF_FORM = 500
"""Prompts of one form of retrieval or reasoning in `ability_prompts`; facts are as many as there are."""
BUNDLED: dict[str, Callable[[], list[str]]] = {
    "python_docs": lambda: python_docs(held_out=False),
    "python_docs_heldout": lambda: python_docs(held_out=True),
    "docstrings": docstrings,
    "readmes": readmes,
    "instructions": instructions,
}
for _name, _one_form in zip(MIXED, (False, True), strict=True):
    BUNDLED[_name] = functools.partial(ability_texts, *ABILITIES, one_form=_one_form)
    for _ability in ABILITIES:
        BUNDLED[f"{_name}_{_ability}"] = functools.partial(ability_texts, _ability, one_form=_one_form)
BUNDLED_ROWS: dict[str, Callable[[], list[dict[str, str]]]] = {"ability_prompts": ability_prompts}
"""Bundled sources of rows with columns, which are read as those of a file are."""
READERS = {".jsonl": "json", ".json": "json", ".txt": "text", ".csv": "csv", ".parquet": "parquet"}
"""File ending -> its reader in `datasets`; a .txt file is one document, which `datasets` would cut into lines."""
HELD_CHARACTERS = 32_000_000
"""Characters up to which a source is shuffled as a whole; a larger one streams through a buffer of this size."""
CHARACTERS_PER_TOKEN = 16
"""Characters: more than any tokenizer puts into a token of prose on average."""
BORDER_TOKENS = 64
"""Tokens at the end of a beginning that may be others where the text goes on."""
JOINED_ROWS = 16
"""Rows of one document that are put together again at a time: a book is not held as a whole."""
AT_ONCE = 256
CHARACTERS_AT_ONCE = 4_000_000
"""Most documents and characters tokenised together: fast tokenizers work through a list with all cores."""


def load_texts(source: DataSource, *, max_characters: int | None = None) -> list[str]:
    """The documents of one source, in order; reading stops after ``max_characters``.

    Raises:
        UserError: nothing there, no such column, or no text in it.
    """
    if source.is_chat:
        raise UserError(
            f"data {source.path!r}: holds conversations, and only distill.data can take those; name a column of text"
        )
    texts: list[str] = []
    characters = 0
    for text in documents(source):
        if text is not None:
            texts.append(str(text))
            characters += len(str(text))
        if max_characters is not None and characters >= max_characters:
            break
    if not texts:
        raise _nothing_in(source)
    return texts


def _nothing_in(source: DataSource) -> UserError:
    column = source.messages or source.prompt or source.column
    content = "conversation" if source.is_chat else "text"
    return UserError(f"data {source.path!r}: holds no {content} in column {column!r}; name a source that does")


def documents(source: DataSource) -> Iterator[str | Chat | None]:
    """Every row's text or conversation, in order; None for an empty one.

    Raises:
        UserError: nothing there, no such column, or a column of another kind.
    """
    if source.path in BUNDLED:
        yield from (text if text.strip() else None for text in _bundled(source.path))
        return
    if source.path == TEACHER_TEXT:
        raise UserError(
            f"data {TEACHER_TEXT!r}: is written while distilling, for distill.data only; name another source"
        )
    for number, (where, row) in enumerate(records(source)):
        if source.is_chat:
            yield chat_of(row, source, f"{where!r} row {number}")
        else:
            text = _text(row, source.column, where)
            yield text if text.strip() else None


def load_labelled(source: DataSource, label_column: str) -> list[tuple[str, Any]]:
    """Text and label of every row of a file, folder or Hub data set, in order.

    Raises:
        UserError: nothing there, a missing column, or a row without text or label.
    """
    labelled: list[tuple[str, Any]] = []
    for number, (where, row) in enumerate(records(source)):
        text, label = _text(row, source.column, where), column_of(row, label_column, repr(where))
        if not text.strip() or label is None:
            empty = source.column if not text.strip() else label_column
            raise UserError(f"data {where!r}: row {number} has nothing in column {empty!r}; fill it or leave it out")
        labelled.append((text, label))
    return labelled


def records(source: DataSource) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row of a file, folder or Hub data set, with the file or data set that it comes from.

    Raises:
        UserError: nothing there, or what cannot be read.
    """
    if source.path in BUNDLED_ROWS:
        yield from ((source.path, row) for row in _bundled_rows(source.path))
        return
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
        is_here = Path(source.path).expanduser().exists()
        remedy = "mend the file, or leave it out" if is_here else _known_sources(source.path)
        raise UserError(f"data {source.path!r}: cannot be read ({type(error).__name__}: {reason}); {remedy}") from error


@functools.cache
def _bundled(name: str) -> tuple[str, ...]:
    return tuple(BUNDLED[name]())


@functools.cache
def _bundled_rows(name: str) -> tuple[dict[str, str], ...]:
    return tuple(BUNDLED_ROWS[name]())


def _local_files(source: DataSource) -> list[Path] | None:
    """The files of a local source; None where the path can only be a Hub id.

    Of a folder those that are named after the split (`train.jsonl`, `train-00000-of-00002.parquet`), else all.
    """
    path = Path(source.path).expanduser()
    if path.exists() and source.name is not None:
        raise UserError(f"data {source.path!r}: name is of data sets on the Hub and has no effect here; leave it out")
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and file.suffix.lower() in READERS)
        if not files:
            raise UserError(f"data {source.path!r}: the folder holds no {', '.join(READERS)} file; name one that does")
        of_split = [file for file in files if file.stem == source.split or file.stem.startswith(f"{source.split}-")]
        if source.split != DataSource.split and not of_split:
            raise UserError(
                f"data {source.path!r}: no file of the folder is named after the split {source.split!r} (it holds "
                f"{', '.join(file.name for file in files[:5])}); leave split out to read all"
            )
        return of_split or files
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise UserError(f"data {source.path!r}: cannot read {path.suffix!r} files; use one of {', '.join(READERS)}")
        if source.split != DataSource.split:
            raise UserError(f"data {source.path!r}: is one file, of which split selects nothing; leave split out")
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

    if not constants.HF_HUB_OFFLINE:
        HfApi().dataset_info(source.path, timeout=10)  # load_dataset alone tries an unreachable Hub for half a minute
    return load_dataset(source.path, source.name, split=source.split, streaming=True)


def _text(row: dict[str, Any], column: str, where: str) -> str:
    text = column_of(row, column, repr(where))
    if text is not None and not isinstance(text, str):
        raise UserError(
            f"data {where!r}: column {column!r} holds {type(text).__name__}, not text; name a column of text"
        )
    return text or ""


def _known_sources(name: str) -> str:
    known = [*BUNDLED, *BUNDLED_ROWS, TEACHER_TEXT]
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"bundled sources are {', '.join(known)}"


def texts_fingerprint(texts: Sequence[str]) -> str:
    """Content hash of documents in order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(len(text).to_bytes(8, "little") + text.encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Layout:
    """How packed rows are laid out, besides their length."""

    folder: Path | None = None
    """Rows go to files there as they are made, and the result maps them; None = they stay in memory."""
    with_sources: bool = False
    """They say of every token which source it is from."""
    groups: Sequence[int] | None = None
    """Of every source the group whose documents share rows with its own; None = all do."""
    encode_image: Encode | None = None
    """Makes tokens of the rows of a source of images, each of which has a row for itself, padded; what is longer than
    that is dropped."""
    rows_per_step: int = 1
    """So many rows in succession hold images all or none."""


def pack(
    sources: Sequence[tuple[DataSource, Iterable[Item | None] | None]],
    tokenizer: Any,
    *,
    sequence_length: int,
    num_tokens: int | None,
    seed: int,
    packing: Packing = "split",
    layout: Layout = Layout(),
) -> PackedRows:
    """``num_tokens`` tokens (rounded up to whole rows) of the sources by weight, as rows of ``sequence_length``.

    A source is read as a stream, or stands for the documents beside it, which can be gone through more than once. They
    are drawn in a seeded order that does not depend on ``num_tokens``: the rows of a smaller budget begin those of a
    larger one. A source that runs out starts again in a new order: small data is repeated, never silently shortened.
    ``num_tokens`` None = all documents once, until a source has run out; the last rows are padded.

    Raises:
        UserError: a source that gives nothing to learn, or cannot be read.
    """
    names = source_names([source for source, _ in sources])
    counts = {name: dict.fromkeys((*FIELDS, "dropped"), 0) for name in names}
    has_images = any(source.has_images for source, _ in sources)
    assert not has_images or (layout.folder and num_tokens is not None), "only files hold which image a row has"
    num_rows = None if num_tokens is None else -(-num_tokens // sequence_length)
    # what best_fit leaves out of a document is counted, and of a conversation any part may be the one that teaches
    enough = None if packing == "best_fit" or num_rows is None else num_rows * sequence_length
    streams = []
    for index, (name, (source, given)) in enumerate(zip(names, sources, strict=True)):
        limit = sequence_length if packing == "best_fit" or source.has_images else None
        encode = layout.encode_image if source.has_images else None
        cut = (limit, enough)
        streams.append(_documents(source, given, tokenizer, seed + index, cut, count=counts[name], encode_image=encode))
    padded = packing == "best_fit" or num_rows is None or has_images
    ends = (tokenizer.pad_token_id, tokenizer.eos_token_id) if padded else ()
    padding_id = next((token for token in ends if token is not None), 0)
    fill = functools.partial(
        best_fit_rows if packing == "best_fit" else split_rows, length=sequence_length, padding_id=padding_id
    )
    rows = _filled(streams, [source.weight for source, _ in sources], fill, layout, once=num_rows is None)
    if has_images:
        rows = rows_by_kind(rows, layout.rows_per_step)
    marked = padded or any(source.assistant_only for source, _ in sources)
    without = [*(() if marked else ("supervised",)), *(() if layout.with_sources else (SOURCES,))]
    with progress("text: rows packed", total=num_rows, unit="rows") as step:
        rows = _counted(teaching_rows(rows, names, counts), step)
        if layout.folder is None or num_rows is None:
            planes = collect(rows, num_rows, sequence_length, without=without)
            return packed_rows({name: torch.from_numpy(plane) for name, plane in planes.items()}, counts)
        write_rows(layout.folder, rows, num_rows, sequence_length, without=without)
    for name, (source, _) in zip(names, sources, strict=True):
        if source.has_images and not counts[name]["documents"]:
            raise UserError(
                f"data {name!r}: its share of {num_rows} rows is less than the {layout.rows_per_step} of an optimizer "
                "step, which hold images all or none, so none would be learnt; raise its weight or num_tokens, or "
                "lower batch_size"
            )
    write_json(layout.folder / COUNTS, counts)
    return read_rows(layout.folder)


def _filled(
    streams: Sequence[Iterator[TokenDocument]],
    weights: Sequence[float],
    fill: Callable[[Iterable[tuple[int, TokenDocument]]], Iterator[Row]],
    layout: Layout,
    *,
    once: bool,
) -> Iterator[Row]:
    """Rows of the documents by weight; ``once``: until a source has run out."""
    if layout.groups is not None and len(set(layout.groups)) > 1:
        return rows_apart(streams, weights, layout.groups, fill)
    drawn = draw(streams, weights)
    return fill(itertools.takewhile(lambda document: document[1].epoch == 0, drawn) if once else drawn)


def _counted(items: Iterable[T], step: Callable[[], object]) -> Iterator[T]:
    for item in items:
        step()
        yield item


def source_names(sources: Sequence[DataSource]) -> list[str]:
    """The path of every source, with a number where several share one."""
    often, seen, names = Counter(source.path for source in sources), Counter[str](), []
    for source in sources:
        seen[source.path] += 1
        names.append(source.path if often[source.path] == 1 else f"{source.path} ({seen[source.path]})")
    return names


def check_source(source: DataSource, tokenizer: Any, *, sequence_length: int, packing: Packing = "split") -> None:
    """Read as little of the source as shows that something can be learnt from it.

    Raises:
        UserError: it cannot be read, its column is missing or of another kind, its conversations cannot be rendered, or
            nothing in it is learnt.
    """
    limit = sequence_length if packing == "best_fit" else None
    _refuse_impossible(source, tokenizer)
    count, has_items = Counter[str](), False
    items = (item for item in documents(source) if item is not None)
    for item in items:
        has_items = True
        learnt = _tokenised([item], source, tokenizer, epoch=0, limit=limit, enough=sequence_length, count=count)
        if next(learnt, None) is not None:
            return
    raise _nothing_learnt(source) if has_items else _nothing_in(source)


def _refuse_impossible(source: DataSource, tokenizer: Any) -> None:
    if not source.is_chat:
        return
    if source.path in (*BUNDLED, TEACHER_TEXT):
        raise UserError(
            f"data {source.path!r}: holds text, not conversations; leave messages, prompt and completion out"
        )
    check_template(tokenizer, source.path)


def _nothing_learnt(source: DataSource) -> UserError:
    if source.has_images:
        return UserError(
            f"data {source.path!r}: no image with its question and answer fits into a row; raise sequence_length"
        )
    if source.is_chat:
        return UserError(
            f"data {source.path!r}: no conversation has a token that is learnt (an answer of the assistant, and within "
            "the row where packing is best_fit); name another column, raise sequence_length, or set loss_on: all"
        )
    return UserError(f"data {source.path!r}: every document tokenises to nothing; name a source that holds text")


def _documents(
    source: DataSource,
    given: Iterable[Item | None] | None,
    tokenizer: Any,
    seed: int,
    cut: tuple[int | None, int | None],
    *,
    count: dict[str, int],
    encode_image: Encode | None,
) -> Iterator[TokenDocument]:
    """The source's documents without end, in another order every epoch; ``cut`` has the most tokens of one, and so many
    of a text that are asked for."""
    limit, enough = cut
    if encode_image is None:
        _refuse_impossible(source, tokenizer)
    for epoch, items in _epochs(source, given, seed=seed, count=count):
        nothing = True
        for document in (
            _tokenised(items, source, tokenizer, epoch=epoch, limit=limit, enough=enough, count=count)
            if encode_image is None
            else _of_images(items, encode_image, epoch=epoch, limit=limit or 0, count=count)
        ):
            nothing = False
            yield document
        if nothing:
            raise _nothing_learnt(source)


def _epochs(
    source: DataSource, given: Iterable[Item | None] | None, *, seed: int, count: dict[str, int]
) -> Iterator[tuple[int, Iterable[Item]]]:
    """Every epoch's documents in its order: of a small source any order, of a large one as far as the buffer mixes."""

    def read(*, counting: bool) -> Iterator[Item]:
        for item in documents(source) if given is None else given:
            if item is not None:
                yield item
            elif counting:
                count["dropped"] += 1

    reader = read(counting=True)
    held, size = _take(reader, HELD_CHARACTERS)
    if not held:
        raise _nothing_in(source)
    for epoch in itertools.count():
        order = random.Random(f"{seed}/{epoch}")
        if size < HELD_CHARACTERS:
            chosen = list(range(len(held)))
            order.shuffle(chosen)
            yield epoch, (held[index] for index in chosen)
        elif epoch == 0:
            reader, held = itertools.chain(held, reader), []  # the buffer is all that is kept
            yield epoch, _mixed(reader, order)
        else:
            yield epoch, _mixed(read(counting=False), order)


def _take(items: Iterator[Item], characters: int, *, most: int | None = None) -> tuple[list[Item], int]:
    """Items until they have so many characters or are ``most``; the last may go beyond."""
    taken, size = [], 0
    while size < characters and len(taken) != most and (item := next(items, None)) is not None:
        taken.append(item)
        size += _size(item)
    return taken, size


def _size(item: Item) -> int:
    return len(item) if isinstance(item, str) else item.num_characters


def _mixed(items: Iterator[Item], order: random.Random) -> Iterator[Item]:
    """Drawn at random from a buffer of HELD_CHARACTERS that is filled up again after every draw."""
    held, size = _take(items, HELD_CHARACTERS)
    while held:
        place = order.randrange(len(held))
        held[place], held[-1] = held[-1], held[place]
        item = held.pop()
        more, added = _take(items, HELD_CHARACTERS - size + _size(item))
        held += more
        size += added - _size(item)
        yield item


def _of_images(
    items: Iterable[Item], encode: Encode, *, epoch: int, limit: int, count: dict[str, int]
) -> Iterator[TokenDocument]:
    """Documents of rows of images that are at most ``limit`` tokens long; the others are counted as dropped once."""
    for item in items:
        assert isinstance(item, ImageRow)
        ids, supervised = encode(item)
        document = TokenDocument(np.asarray(ids, np.int32), supervised, epoch, image=item.number)
        if len(document) <= limit and document.teaches:
            yield document
        elif epoch == 0:
            count["dropped"] += 1


def _tokenised(
    items: Iterable[Item],
    source: DataSource,
    tokenizer: Any,
    *,
    epoch: int,
    limit: int | None,
    enough: int | None,
    count: dict[str, int],
) -> Iterator[TokenDocument]:
    """Documents with something to learn, cut to ``limit`` tokens; the others are counted as dropped once.

    Of a text no more than its first ``enough`` tokens are asked for.
    """
    encoded = _chats(items, source, tokenizer) if source.is_chat else _texts(items, tokenizer, enough)
    for ids, supervised in encoded:
        document = TokenDocument(np.asarray(ids, np.int32), supervised, epoch).cut(limit or len(ids))
        if document.teaches:
            yield document
        elif epoch == 0:
            count["dropped"] += 1


def _chats(items: Iterable[Item], source: DataSource, tokenizer: Any) -> Iterator[tuple[list[int], np.ndarray]]:
    for item in items:
        assert isinstance(item, Chat)
        yield tokenised(item, tokenizer, assistant_only=source.assistant_only)


def first_tokens(text: str, encode: Callable[[str], list[T]], count: int) -> list[T]:
    """The first ``count`` tokens of ``text``, or all of them, from little more of it than they take.

    A single line can have millions of characters. A tokenizer joins letters within words, so a text that ends early
    changes the tokens at its end alone: of a beginning, the last BORDER_TOKENS are not believed.
    """
    size = CHARACTERS_PER_TOKEN * (count + BORDER_TOKENS)
    while size < len(text):
        ids = encode(text[:size])
        if len(ids) >= count + BORDER_TOKENS:
            return ids[:count]
        size *= 4
    return encode(text)[:count]


class CutOff(str):
    """A text that stops where its writer had to, in the middle: nobody is to learn that it ends there."""


def _texts(items: Iterable[Item], tokenizer: Any, enough: int | None) -> Iterator[tuple[list[int], np.ndarray]]:
    """Token lists with start (where the model has one it adds) and end token; of long texts the beginning."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    most = None if enough is None else CHARACTERS_PER_TOKEN * (enough + BORDER_TOKENS)
    items = iter(items)
    while batch := _take(items, CHARACTERS_AT_ONCE, most=AT_ONCE)[0]:
        short = [text for text in batch if most is None or _size(text) <= most]
        tokenised_short = iter(tokenizer(short)["input_ids"] if short else ())
        for text in batch:
            ids = (
                next(tokenised_short)
                if most is None or _size(text) <= most
                else first_tokens(str(text), lambda part: tokenizer(part)["input_ids"], enough or 0)
            )
            whole = ids if not ids or ids[-1:] == end or isinstance(text, CutOff) else ids + end
            yield whole, np.ones(len(whole), bool)


def row_texts(rows: PackedRows, tokenizer: Any, *, max_tokens: int | None = None) -> Iterator[tuple[int, str]]:
    """What is in the first rows, document by document, with the row where each begins; None = in all of them.

    A document that rows split is put together again, JOINED_ROWS rows at a time, the last of which comes twice.
    """
    length = rows.input_ids_NS.shape[1]
    last = len(rows) if max_tokens is None else math.ceil(max_tokens / length)
    is_split = any(counts["split"] for counts in rows.counts.values())
    held: list[int] = []
    begun = 0
    for row, (ids, positions) in enumerate(zip(rows.input_ids_NS[:last], rows.position_ids_NS[:last], strict=True)):
        borders = [*(positions == 0).nonzero().flatten().tolist(), length]
        for start, end in itertools.pairwise(borders):
            piece = ids[start:end].tolist()
            goes_on = is_split and start == 0 and held[-1:] not in ([], [tokenizer.eos_token_id])
            if not goes_on or len(held) > JOINED_ROWS * length:
                if held:
                    yield begun, tokenizer.decode(held, skip_special_tokens=True)
                held, begun = (held[-length:], row - 1) if goes_on else ([], row)
            held += piece
    if held:
        yield begun, tokenizer.decode(held, skip_special_tokens=True)


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
            content = fingerprint(_bundled_rows(source.path))
        elif source.path != TEACHER_TEXT:
            content = [[file.name, known_hash(file)] for file in _local_files(source) or ()]
        parts.append([*source.text_settings.values(), content])
    return fingerprint(parts)
