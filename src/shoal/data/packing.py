"""Tokenised documents packed into rows of one length, in memory or straight to disk.

A row holds several documents back to back. `position_ids` start again at every document, and transformers' mask
functions read that as a border no attention crosses; the label at a border is ignored, since no document can know the
next.

N rows, S sequence.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from shoal.atomic_files import read_json
from shoal.errors import UserError
from shoal.formatting import bytes_text
from shoal.machine import available_memory

Drawn = TypeVar("Drawn", bound=Sized)
IGNORED = -100
ROW = "row"
"""Key under which a row says which one it is."""
SOURCES = "sources"
"""Key under which a row says which source every token is from, where that matters."""
IMAGES = "images"
"""Key under which a row says what a model is given with its tokens to see their image, where they have one."""
NO_IMAGE = -1
OPEN_ROWS = 16
"""Rows that bfd keeps open at one time to find a place for the next document; more would waste less padding, but
hold back more of the sources with short documents."""
MOST_DISCARDED = 1000
"""Rows in succession without a learnt token after which packing gives up."""
FIELDS: tuple[str, ...] = ("documents", "tokens", "supervised", "split", "truncated", "padding", "repeats")
PLANES = {"input_ids": "<i4", "position_ids": "<i4", "supervised": "|b1", SOURCES: "<i2"}
COUNTS = "counts.json"
TOKEN_BYTES = 8
"""Bytes of one token in memory: id and position."""


def require_room(num_tokens: int, setting: str) -> None:
    """Refuse more tokens than fit into memory."""
    if (needed := TOKEN_BYTES * num_tokens) > available_memory():
        raise UserError(
            f"{setting}: {num_tokens:,} tokens take {bytes_text(needed)} of memory, but only "
            f"{bytes_text(available_memory())} are free; lower it"
        )


@dataclass(frozen=True)
class TokenDocument:
    """One document as token ids."""

    ids: np.ndarray
    supervised: np.ndarray
    """Mask of the tokens that are learnt; the first never is, whatever it says here."""
    epoch: int = 0
    """Number of times its source had been used up before."""
    truncated: int = 0
    """Number of tokens that were cut off its end."""
    image: int = NO_IMAGE
    """Number of the row of images that it is; such a document has a row for itself."""

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, length: int) -> TokenDocument:
        """Its first ``length`` tokens."""
        beyond = max(0, len(self) - length)
        return replace(self, ids=self.ids[:length], supervised=self.supervised[:length], truncated=beyond)

    @property
    def teaches(self) -> bool:
        """Whether it has a learnt token that others come before."""
        return bool(self.supervised[1:].any())


@dataclass(frozen=True)
class PackedRows:
    """Rows of exactly S tokens. N rows, S sequence. 32-bit, and possibly memory-mapped: a token costs eight bytes, and
    one more for `supervised` and two for `sources` where there are such."""

    input_ids_NS: Tensor
    position_ids_NS: Tensor
    """Positions, which restart at 0 with every document."""
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    """Counts by source: FIELDS, and `dropped` documents."""
    supervised_NS: Tensor | None = None
    """Mask of the tokens that are learnt (bool); None = all. A document's first never is."""
    sources_NS: Tensor | None = None
    """Number of the source that every token is from (int16); None = it does not matter. Padding says 0."""
    images_N: Tensor | None = None
    """Number of the row of images that a row holds, or NO_IMAGE; None = all rows are text."""

    def __len__(self) -> int:
        return len(self.input_ids_NS)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        input_ids, position_ids = self.input_ids_NS[row].long(), self.position_ids_NS[row].long()
        ignored = position_ids == 0
        if self.supervised_NS is not None:
            ignored |= ~self.supervised_NS[row]
        labels = input_ids.masked_fill(ignored, IGNORED)
        number = torch.tensor(row)
        sources = {} if self.sources_NS is None else {SOURCES: self.sources_NS[row]}
        return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels, ROW: number, **sources}

    def first(self, num_rows: int) -> PackedRows:
        """Its first rows, with the counts of all."""
        supervised, sources = (x if x is None else x[:num_rows] for x in (self.supervised_NS, self.sources_NS))
        ids_NS, positions_NS = self.input_ids_NS[:num_rows], self.position_ids_NS[:num_rows]
        return PackedRows(ids_NS, positions_NS, self.counts, supervised, sources)

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens, of where documents begin and of what is learnt; not of where the text is from."""
        digest = hashlib.sha256()
        for plane in (self.input_ids_NS, self.position_ids_NS, self.supervised_NS):
            if plane is not None:
                digest.update(np.ascontiguousarray(plane.numpy()).data.cast("B"))
        return digest.hexdigest()[:16]


class Row:
    """A row being filled, and what of which source is in it."""

    def __init__(self, length: int) -> None:
        self.input_ids = np.zeros(length, np.int32)
        self.position_ids = np.zeros(length, np.int32)
        self.supervised = np.zeros(length, bool)
        self.sources = np.zeros(length, np.int16)
        self.filled = 0
        self.counts: dict[int, dict[str, int]] = {}
        self.last_source = 0
        self.image = NO_IMAGE

    @property
    def room(self) -> int:
        return len(self.input_ids) - self.filled

    def __len__(self) -> int:
        return self.filled

    def add(self, source: int, document: TokenDocument, start: int = 0, again: int | None = None) -> int:
        """Put in what fits of the document from ``start`` on, behind ``again`` if an earlier row holds its beginning;
        the number of tokens of the document that did."""
        lead = 1 if start and again is not None else 0
        size = min(self.room - lead, len(document) - start)
        place = slice(self.filled, self.filled + lead + size)
        self.input_ids[place] = [again] * lead + document.ids[start : start + size].tolist()
        self.position_ids[place] = np.arange(lead + size)
        self.supervised[place] = [False] * lead + document.supervised[start : start + size].tolist()
        self.supervised[self.filled] = False
        self.sources[place] = source
        count = self.counts.setdefault(source, dict.fromkeys(FIELDS, 0))
        count["documents"] += start == 0
        count["tokens"] += lead + size
        count["supervised"] += int(self.supervised[place].sum())
        count["split"] += start + size < len(document)
        count["truncated"] += document.truncated if start == 0 else 0
        count["repeats"] = max(count["repeats"], document.epoch)
        self.filled += lead + size
        self.last_source = source
        return size

    def close(self, padding_id: int) -> Row:
        """Fill the rest with a document of padding that is not learnt."""
        self.counts[self.last_source]["padding"] += self.room
        self.input_ids[self.filled :] = padding_id
        self.position_ids[self.filled :] = np.arange(self.room)
        self.filled = len(self.input_ids)
        return self


def draw(streams: Sequence[Iterator[Drawn]], weights: Sequence[float]) -> Iterator[tuple[int, Drawn]]:
    """Documents, or rows, with the number of their source; next is the one that is furthest behind its share of tokens.

    So the weights are exact within a document at every length, without randomness.
    """
    drawn, total = [0] * len(streams), sum(weights)
    while True:
        turn = min(range(len(streams)), key=lambda index: drawn[index] * total / weights[index])
        document = next(streams[turn])
        drawn[turn] += len(document)
        yield turn, document


def split_rows(
    documents: Iterable[tuple[int, TokenDocument]], length: int, padding_id: int, start_id: int | None = None
) -> Iterator[Row]:
    """Rows filled to the last token; what does not fit goes on in the next row. The last one, where documents end, is
    padded.

    A document that begins with ``start_id`` has it again in every row that goes on with it. Models that have always
    read that token first predict badly without it (Gemma 3 270M: 0.1 to 0.5 nats per token worse), and a student would
    learn that. The first token of the rest is learnt from the start token alone, one of a row.
    """
    row = Row(length)
    for source, document in documents:
        if document.image != NO_IMAGE:
            yield _row_of_image(source, document, length, padding_id)
            continue
        start, again = 0, start_id if document.ids[0] == start_id else None
        while start < len(document):
            start += row.add(source, document, start, again)
            if not row.room:
                yield row
                row = Row(length)
    if row.filled:
        yield row.close(padding_id)


def best_fit_rows(documents: Iterable[tuple[int, TokenDocument]], length: int, padding_id: int) -> Iterator[Row]:
    """Rows of whole documents: each goes where it leaves the least room, and the fullest row leaves when none has any.

    No document may be longer than a row. Only those that were drawn before decide, so a longer budget begins with the
    rows of a shorter one.
    """
    rows: list[Row] = []
    for source, document in documents:
        if document.image != NO_IMAGE:
            yield _row_of_image(source, document, length, padding_id)
            continue
        row = min((row for row in rows if row.room >= len(document)), key=lambda row: row.room, default=None)
        if row is None:
            if len(rows) == OPEN_ROWS:
                fullest = min(range(OPEN_ROWS), key=lambda index: rows[index].room)
                yield rows.pop(fullest).close(padding_id)
            row = Row(length)
            rows.append(row)
        row.add(source, document)
        if not row.room:
            rows.remove(row)
            yield row.close(padding_id)
    yield from (row.close(padding_id) for row in rows)


def _row_of_image(source: int, document: TokenDocument, length: int, padding_id: int) -> Row:
    row = Row(length)
    row.add(source, document)
    row.image = document.image
    return row.close(padding_id)


def rows_by_kind(rows: Iterable[Row], size: int) -> Iterator[Row]:
    """The rows in groups of ``size``, the rows of an optimizer step, which hold images all or none, as the rows come.

    All ranks then run the same modules in every micro-batch, however they share a step. LLaVA's training code groups
    its batches by modality too. A row in which nothing is learnt goes through at once: teaching_rows leaves it out.
    """
    waiting: dict[bool, list[Row]] = {True: [], False: []}
    for row in rows:
        if not row.supervised.any():
            yield row
            continue
        group = waiting[row.image != NO_IMAGE]
        group.append(row)
        if len(group) == size:
            yield from group
            group.clear()


def rows_apart(
    streams: Sequence[Iterator[TokenDocument]],
    weights: Sequence[float],
    groups: Sequence[int],
    fill: Callable[[Iterable[tuple[int, TokenDocument]]], Iterator[Row]],
) -> Iterator[Row]:
    """Rows that ``fill`` makes of the documents of one group of sources each; ``groups`` are the sources' own. Groups
    have their shares of the rows as sources have theirs of the documents."""

    def of_group(numbers: list[int], own: list[float]) -> Iterator[Row]:
        drawn = draw([streams[number] for number in numbers], own)
        return fill((numbers[turn], document) for turn, document in drawn)

    members = [[number for number, own in enumerate(groups) if own == group] for group in sorted(set(groups))]
    own_weights = [[weights[number] for number in numbers] for numbers in members]
    shares = [sum(own) for own in own_weights]
    for _, row in draw([of_group(*pair) for pair in zip(members, own_weights, strict=True)], shares):
        yield row


def teaching_rows(rows: Iterable[Row], names: Sequence[str], counts: dict[str, dict[str, int]]) -> Iterator[Row]:
    """The rows in which something is learnt; ``counts`` grows with each. So no batch can be without a learnt token.

    Raises:
        UserError: a long succession of rows in which nothing is learnt.
    """
    discarded = 0
    for row in rows:
        if row.supervised.any():
            discarded = 0
            for source, added in row.counts.items():
                count = counts[names[source]]
                for key, value in added.items():
                    count[key] = max(count[key], value) if key == "repeats" else count[key] + value
            yield row
            continue
        discarded += 1
        for source, added in row.counts.items():
            counts[names[source]]["truncated"] += added["tokens"]
        if discarded == MOST_DISCARDED:
            raise UserError(
                f"data {', '.join(map(repr, names))}: {discarded:,} rows in succession hold no token to train on; "
                "raise sequence_length, set packing: bfd, or set loss_on: all"
            )


def collect(
    rows: Iterable[Row], num_rows: int | None, length: int, *, without: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """The first ``num_rows`` rows in memory, by plane; those named in ``without`` are left out. None = all rows."""
    if num_rows is None:
        rows = list(rows)
        num_rows = len(rows)
    planes = {name: np.empty((num_rows, length), dtype) for name, dtype in PLANES.items() if name not in without}
    for index, row in enumerate(itertools.islice(rows, num_rows)):
        for name, plane in planes.items():
            plane[index] = getattr(row, name)
    return planes


def write_rows(folder: Path, rows: Iterable[Row], num_rows: int, length: int, *, without: Collection[str] = ()) -> None:
    """The first ``num_rows`` rows as one .npy file per plane, appended one by one: memory does not grow. Planes that
    ``without`` names are left out; that of images is there where a row has one."""
    images: list[int] = []
    with ExitStack() as stack:
        files = {}
        for name, dtype in PLANES.items():
            if name not in without:
                files[name] = stack.enter_context((folder / f"{name}.npy").open("wb"))
                header: dict[str, Any] = {"descr": dtype, "fortran_order": False, "shape": (num_rows, length)}
                np.lib.format.write_array_header_1_0(files[name], header)
        for row in itertools.islice(rows, num_rows):
            images.append(row.image)
            for name, file in files.items():
                file.write(getattr(row, name).astype(PLANES[name], copy=False).tobytes())
    if any(image != NO_IMAGE for image in images):
        np.save(folder / f"{IMAGES}.npy", np.array(images, np.int32))


def read_rows(folder: Path) -> PackedRows:
    """Rows written by `write_rows`, mapped instead of read, with the counts that lie beside them in COUNTS."""
    planes = {
        name: torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c"))
        for name in (*PLANES, IMAGES)
        if (folder / f"{name}.npy").is_file()
    }
    return packed_rows(planes, read_json(folder / COUNTS))


def packed_rows(planes: Mapping[str, Tensor], counts: dict[str, dict[str, int]]) -> PackedRows:
    """The rows of these planes, by the names in PLANES."""
    optional = planes.get("supervised"), planes.get(SOURCES), planes.get(IMAGES)
    return PackedRows(planes["input_ids"], planes["position_ids"], counts, *optional)
