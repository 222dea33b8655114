"""How sources become rows of tokens: drawn by weight, streamed where they are large."""

from __future__ import annotations

import functools
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

from shoal.atomic_files import write_json
from shoal.data.bundled import BUNDLED
from shoal.data.chat import Chat, ImageRow, check_template, nothing_learnt, tokenised
from shoal.data.packing import (
    COUNTS,
    FIELDS,
    NO_IMAGE,
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
from shoal.data.sources import CHARACTERS_PER_TOKEN, Item, documents, nothing_in, opened, size_of, source_names
from shoal.errors import UserError
from shoal.progress import each
from shoal.recipe.distill import Packing
from shoal.recipe.section import DataSource

T = TypeVar("T")
Encode = Callable[[ImageRow], tuple[list[int], np.ndarray]]
"""Token ids of a row of images, and which of them are learnt."""
HELD_CHARACTERS = 32_000_000
"""Characters up to which a source is shuffled as a whole; a larger one streams through a buffer of this size."""
BORDER_TOKENS = 64
"""Tokens at the end of a beginning that may be others where the text goes on."""
JOINED_ROWS = 16
"""Rows of one document that are put together again at a time: a book is not held as a whole."""
AT_ONCE = 256
CHARACTERS_AT_ONCE = 4_000_000
"""Most documents and characters tokenised together: fast tokenizers work through a list with all cores."""


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
    packing: Packing = "wrapped",
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
    sources = [(source if given is not None else opened(source), given) for source, given in sources]
    names = source_names([source for source, _ in sources])
    counts = {name: dict.fromkeys((*FIELDS, "dropped"), 0) for name in names}
    has_images = any(source.has_images for source, _ in sources)
    assert not has_images or (layout.folder and num_tokens is not None), "only files can hold images"
    num_rows = None if num_tokens is None else -(-num_tokens // sequence_length)
    # what bfd leaves out of a document is counted, and of a conversation any part may be the one that teaches
    enough = None if packing == "bfd" or num_rows is None else num_rows * sequence_length
    streams = []
    for index, (name, (source, given)) in enumerate(zip(names, sources, strict=True)):
        limit = sequence_length if packing == "bfd" or source.has_images else None
        encode = layout.encode_image if source.has_images else None
        reading = _Reading(source, tokenizer, limit, enough, encode)
        streams.append(reading.stream(given, seed=seed + index, count=counts[name]))
    padded = packing == "bfd" or num_rows is None or has_images
    ends = (tokenizer.pad_token_id, tokenizer.eos_token_id) if padded else ()
    padding_id = next((token for token in ends if token is not None), 0)
    filling = best_fit_rows if packing == "bfd" else functools.partial(split_rows, start_id=start_token(tokenizer))
    fill = functools.partial(filling, length=sequence_length, padding_id=padding_id)
    rows = _filled(streams, [source.weight for source, _ in sources], fill, layout, once=num_rows is None)
    if has_images:
        rows = rows_by_kind(rows, layout.rows_per_step)
    marked = padded or any(source.assistant_only for source, _ in sources)
    without = [*(() if marked else ("supervised",)), *(() if layout.with_sources else (SOURCES,))]
    rows = each(teaching_rows(rows, names, counts), "text: rows packed", total=num_rows, unit="rows")
    if layout.folder is None or num_rows is None:
        planes = collect(rows, num_rows, sequence_length, without=without)
        return packed_rows({name: torch.from_numpy(plane) for name, plane in planes.items()}, counts)
    write_rows(layout.folder, rows, num_rows, sequence_length, without=without)
    for name, (source, _) in zip(names, sources, strict=True):
        if source.has_images and not counts[name]["documents"]:
            raise UserError(
                f"data {name!r}: its share of {num_rows} rows is less than the {layout.rows_per_step} of an "
                "optimizer step (the rows of a step hold images either all or not at all), so none would be trained "
                "on; raise its weight or num_tokens, or lower batch_size"
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


def check_source(source: DataSource, tokenizer: Any, *, sequence_length: int, packing: Packing = "wrapped") -> None:
    """Read as little of the source as shows that something can be learnt from it.

    Raises:
        UserError: it cannot be read, its column is missing or of another kind, its conversations cannot be rendered, or
            nothing in it is learnt.
    """
    source = opened(source)
    if source.path in BUNDLED:  # there is text, and some takes seconds to make
        return
    reading = _Reading(source, tokenizer, sequence_length if packing == "bfd" else None, sequence_length)
    if source.is_chat:
        check_template(tokenizer.chat_template, source.path, is_fast=tokenizer.is_fast)
    has_items = False
    items = (item for item in documents(source) if item is not None)
    for item in items:
        has_items = True
        if any(True for _ in reading.documents([item], epoch=0, count=Counter())):
            return
    raise nothing_learnt(source) if has_items else nothing_in(source)


@dataclass(frozen=True)
class _Reading:
    """How the documents of a source become tokens."""

    source: DataSource
    tokenizer: Any
    limit: int | None
    """Most tokens of a document, which is cut to them; a row of an image that has more is left out."""
    enough: int | None
    """Tokens of a text that are asked for at most."""
    encode_image: Encode | None = None

    def stream(
        self, given: Iterable[Item | None] | None, *, seed: int, count: dict[str, int]
    ) -> Iterator[TokenDocument]:
        """The source's documents without end, in another order every epoch."""
        if self.source.is_chat:
            check_template(self.tokenizer.chat_template, self.source.path, is_fast=self.tokenizer.is_fast)
        for epoch, items in _epochs(self.source, given, seed=seed, count=count):
            nothing = True
            for document in self.documents(items, epoch=epoch, count=count):
                nothing = False
                yield document
            if nothing:
                raise nothing_learnt(self.source)

    def documents(self, items: Iterable[Item], *, epoch: int, count: dict[str, int]) -> Iterator[TokenDocument]:
        """Those with something to learn; the others are counted as dropped once."""
        for ids, supervised, image in self._encoded(items):
            document = TokenDocument(np.asarray(ids, np.int32), supervised, epoch, image=image)
            fits = self.limit is None or len(ids) <= self.limit
            if not fits and image == NO_IMAGE:
                document, fits = document.cut(self.limit or 0), True
            if fits and document.teaches:
                yield document
            elif epoch == 0:
                count["dropped"] += 1

    def _encoded(self, items: Iterable[Any]) -> Iterator[tuple[list[int], np.ndarray, int]]:
        """Token ids, which of them are learnt, and the number of the image."""
        if self.encode_image is not None:
            yield from ((*self.encode_image(item), item.number) for item in items)
        elif self.source.is_chat:
            yield from ((*self._of_chat(item), NO_IMAGE) for item in items)
        else:
            yield from ((ids, np.ones(len(ids), bool), NO_IMAGE) for ids in _texts(items, self.tokenizer, self.enough))

    def _of_chat(self, item: Chat | Written) -> tuple[list[int], np.ndarray]:
        if isinstance(item, Written):
            return item.tokens(self.tokenizer)
        return tokenised(item, self.tokenizer, assistant_only=self.source.assistant_only)


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
        raise nothing_in(source)
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
        size += size_of(item)
    return taken, size


def _mixed(items: Iterator[Item], order: random.Random) -> Iterator[Item]:
    """Drawn at random from a buffer of HELD_CHARACTERS that is filled up again after every draw."""
    held, size = _take(items, HELD_CHARACTERS)
    while held:
        place = order.randrange(len(held))
        held[place], held[-1] = held[-1], held[place]
        item = held.pop()
        more, added = _take(items, HELD_CHARACTERS - size + size_of(item))
        held += more
        size += added - size_of(item)
        yield item


def start_token(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts before every text, or None: a `bos_token` alone may belong to chats only."""
    added = tokenizer("")["input_ids"][:1]
    return tokenizer.bos_token_id if added == [tokenizer.bos_token_id] else None


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


class Written(str):
    """A text that the teacher has written."""

    cut_off = False
    """It stops where its writer had to, in the middle: nobody is to learn that it ends there."""
    num_asked = 0
    """Characters at its beginning that are not learnt: what was asked."""

    def tokens(self, tokenizer: Any) -> tuple[list[int], np.ndarray]:
        """Token ids of a conversation, without a start token that its template does not give it, and which of them are
        learnt."""
        encoded = tokenizer(str(self), add_special_tokens=False, return_offsets_mapping=True)
        ids, ends = encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]
        if not self.cut_off and tokenizer.eos_token_id not in (None, *ids[-1:]):
            ids, ends = [*ids, tokenizer.eos_token_id], [*ends, len(self) + 1]
        return ids, np.array([end > self.num_asked for end in ends], bool)


def _texts(items: Iterable[Item], tokenizer: Any, enough: int | None) -> Iterator[list[int]]:
    """Token lists with start (where the model has one it adds) and end token; of long texts the beginning."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    most = None if enough is None else CHARACTERS_PER_TOKEN * (enough + BORDER_TOKENS)
    items = iter(items)
    while batch := _take(items, CHARACTERS_AT_ONCE, most=AT_ONCE)[0]:
        short = [text for text in batch if most is None or size_of(text) <= most]
        tokenised_short = iter(tokenizer(short)["input_ids"] if short else ())
        for text in batch:
            ids = (
                next(tokenised_short)
                if most is None or size_of(text) <= most
                else first_tokens(str(text), lambda part: tokenizer(part)["input_ids"], enough or 0)
            )
            yield ids if not ids or ids[-1:] == end or (isinstance(text, Written) and text.cut_off) else ids + end


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
