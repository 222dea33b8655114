"""Rows of an image, a question and its answer, and what a model that reads images is given for one.

N rows, B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from shoal.atomic_files import fingerprint, known_hash
from shoal.data.chat import ASSISTANT, ImageRow, column_of, nothing_learnt, without_layout
from shoal.data.packing import IMAGES, NO_IMAGE, PackedRows
from shoal.data.sources import records
from shoal.errors import UserError
from shoal.models.anatomy import text_config
from shoal.models.load import Checkpoint, load_processor, reads_images
from shoal.recipe.section import DataSource, ImageQuestion


@dataclass(frozen=True)
class Asked:
    """One row as a model is given it."""

    inputs: dict[str, Tensor]
    """A batch of one: what the processor makes of image, prompt and answer."""
    num_answer: int
    """Tokens at the end that are the answer."""


def training_images(data: Sequence[DataSource]) -> dict[DataSource, list[ImageRow]]:
    """All rows of the sources of images among ``data``, in order, all images of which can be opened."""
    rows_of: dict[DataSource, list[ImageRow]] = {}
    for source in data:
        if isinstance(source.column, ImageQuestion):
            rows_of[source] = _image_rows(source, source.column, first=sum(map(len, rows_of.values())))
    return rows_of


def _image_rows(source: DataSource, column: ImageQuestion, *, first: int) -> list[ImageRow]:
    """The rows of ``source``, in order, whose numbers begin with ``first``.

    Raises:
        UserError: no such file or column, a row without an image or an answer, or an image that cannot be read.
    """
    rows, columns = list[ImageRow](), (column.image, column.prompt, column.completion)
    for number, (where, record) in enumerate(records(source)):
        row, named = f"distill.data: row {number} of {where}", f"{where!r} row {number}"
        image, prompt, answer = values = [column_of(record, column, named) for column in columns]
        if not all(isinstance(value, str) for value in values) or not image.strip() or not answer.strip():
            raise UserError(
                f"{row}: column {columns[0]!r} has no image, {columns[1]!r} no text or {columns[2]!r} no answer; "
                "fill in all three, or remove the row"
            )
        path = Path(image).expanduser()
        path = path if path.is_absolute() else Path(where).expanduser().parent / path
        with _readable(path, row), Image.open(path) as file:
            file.verify()
        rows.append(ImageRow(row, path, prompt, answer, first + number))
    if not rows:
        raise UserError(f"distill.data: {source.path} holds no rows; name a file with rows")
    return rows


@contextmanager
def _readable(path: Path, row: str) -> Iterator[None]:
    """Refuse what Pillow finds damaged."""
    try:
        yield
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"{row}: {path} cannot be read as an image ({reason}); name an image file, or remove the row"
        ) from error


def images_fingerprint(data: Sequence[DataSource]) -> str:
    """Content hash of the rows and images of all sources of images among ``data``, wherever they lie; raises as
    training_images does."""
    rows = (row for rows in training_images(data).values() for row in rows)
    return fingerprint([[known_hash(row.image), row.prompt, row.answer] for row in rows])


def _asked(row: ImageRow, prompt: str, answer: str, processor: Any, config: Any) -> Asked:
    """What the model is given for ``row``, of whose question and answer these are the texts."""
    longest, bos = getattr(text_config(config), "max_position_embeddings", None), processor.tokenizer.bos_token
    with _readable(row.image, row.where), Image.open(row.image) as file:  # for what only its pixels show
        image = file.convert("RGB")
    arguments: dict[str, Any] = {"images": [image], "return_tensors": "pt"}
    if bos and prompt.startswith(bos):  # a chat template has put it there
        arguments["add_special_tokens"] = False
    try:
        before, whole = (processor(text=text, **arguments) for text in (prompt, prompt + answer))
    except (ValueError, TypeError, KeyError, IndexError, ImportError) as error:
        raise UserError(
            f"{row.where}: the checkpoint's processor cannot take it ({error!r}); fix the row or the processor's files"
        ) from error
    ids = whole["input_ids"][0]
    # there the answer starts, or a token that it shares with the prompt
    pairs = zip(before["input_ids"][0].tolist(), ids.tolist(), strict=False)
    start = len([*takewhile(lambda pair: pair[0] == pair[1], pairs)])
    if start == len(ids) or (longest is not None and len(ids) > longest):
        raise UserError(
            f"{row.where}: takes {len(ids)} tokens with {len(ids) - start} of its answer {row.answer!r}, but the "
            f"model has {longest} positions; remove the row"
        )
    return Asked({name: value for name, value in whole.items() if isinstance(value, Tensor)}, len(ids) - start)


def _turn(prompt: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}


def _rendered(prompt: str, processor: Any) -> str:
    if getattr(processor, "chat_template", None):
        return processor.apply_chat_template([_turn(prompt)], add_generation_prompt=True)
    return f"{getattr(processor, 'image_token', '<image>')}{prompt}"


def _rendered_answer(row: ImageRow, prompt: str, processor: Any) -> str:
    """The answer behind the rendered ``prompt`` with what ends it: as the chat template writes the assistant's turn,
    and without one the end token."""
    if not getattr(processor, "chat_template", None):
        return row.answer + (processor.tokenizer.eos_token or "")
    reply = {"role": ASSISTANT, "content": [{"type": "text", "text": row.answer}]}
    whole = processor.apply_chat_template([_turn(row.prompt), reply])
    if not whole.startswith(prompt) or row.answer.strip() not in whole[len(prompt) :]:
        raise UserError(
            f"{row.where}: the processor's chat template does not write the answer after the question, so the "
            "answer's tokens cannot be identified; fix the template, or remove the row"
        )
    written = whole[len(prompt) :]
    return written[: without_layout(written, processor.tokenizer)]


def on_device(inputs: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """``inputs`` there, what is in floating point in ``dtype``."""
    dtypes = {name: dtype if value.is_floating_point() else value.dtype for name, value in inputs.items()}
    return {name: value.to(device, dtypes[name], non_blocking=True) for name, value in inputs.items()}


@dataclass(frozen=True)
class ImageReader:
    """What makes tokens and a model's inputs of a training's rows of images."""

    processor: Any
    config: Any
    """Configuration of the model that is asked."""
    rows: dict[DataSource, list[ImageRow]]

    @classmethod
    def of(cls, data: Sequence[DataSource], teacher: Checkpoint) -> ImageReader | None:
        """That of the sources of images among ``data``, for a model that ``teacher`` is; None where there are none.

        Raises:
            UserError: a model or processor that reads no images, or as training_images does.
        """
        if not any(source.has_images for source in data):
            return None
        if not reads_images(teacher.config):
            raise UserError(f"distill.data: {teacher.folder} does not read images; remove the sources with images")
        processor = load_processor(teacher.folder, trust_remote_code=teacher.load.trust_remote_code)
        return cls(processor, teacher.config, training_images(data))

    def asked(self, row: ImageRow) -> Asked:
        """What the model is given for ``row``, whose answer ends as it would end it."""
        prompt = _rendered(row.prompt, self.processor)
        question = _asked(row, prompt, _rendered_answer(row, prompt, self.processor), self.processor, self.config)
        answer_ids = question.inputs["input_ids"][0, -question.num_answer :].tolist()
        if getattr(self.config, "image_token_id", None) in answer_ids:
            raise UserError(f"{row.where}: the answer holds a token that stands for an image; change the answer")
        return question

    def tokens(self, row: ImageRow) -> tuple[list[int], np.ndarray]:
        """Token ids of ``row``, and which of them are learnt: its answer."""
        question = self.asked(row)
        ids = question.inputs["input_ids"][0].tolist()
        return ids, np.arange(len(ids)) >= len(ids) - question.num_answer

    def check(self, source: DataSource, *, sequence_length: int) -> None:
        """Read as little of a source of images as shows that something can be learnt from it."""
        if not any(len(self.tokens(row)[0]) <= sequence_length for row in self.rows[source]):
            raise nothing_learnt(source)


@dataclass(frozen=True)
class RowsWithImages(PackedRows):
    """Rows of which some hold an image, made into a model's inputs when they are asked for."""

    reader: ImageReader | None = None

    @classmethod
    def of(cls, rows: PackedRows, reader: ImageReader | None) -> PackedRows:
        """``rows`` with the inputs that ``reader`` makes; themselves without one."""
        if reader is None:
            return rows
        return cls(**{each.name: getattr(rows, each.name) for each in fields(PackedRows)}, reader=reader)

    def __getitem__(self, row: int) -> dict[str, Any]:
        row_fields: dict[str, Any] = super().__getitem__(row)
        number = NO_IMAGE if self.images_N is None else int(self.images_N[row])
        if number == NO_IMAGE:
            return row_fields
        assert self.reader is not None
        shown = next(rows[number - rows[0].number] for rows in self.reader.rows.values() if number <= rows[-1].number)
        inputs = self.reader.asked(shown).inputs
        ids_S = inputs["input_ids"][0]
        if not torch.equal(row_fields["input_ids"][: len(ids_S)], ids_S):
            raise UserError(f"{shown.where}: gives other tokens than at the start of the training; restore its image")
        return {**row_fields, IMAGES: inputs}


def stacked_with_images(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The micro-batch of these rows, all with an image: their planes (B, S), as long as the longest of them, and under
    IMAGES what the processor makes of all, its token ids left out.

    Rows one behind the other, with zeros where one is smaller: so processors fill up batches.
    """
    inputs = [row[IMAGES] for row in rows]
    together = {name: _filled_up([row_inputs[name] for row_inputs in inputs]) for name in inputs[0]}
    length = together.pop("input_ids").shape[1]
    planes = {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != IMAGES}
    cut = {name: plane if plane.ndim == 1 else plane[:, :length] for name, plane in planes.items()}
    return {**cut, IMAGES: together}


def _filled_up(parts: Sequence[Tensor]) -> Tensor:
    sizes = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    whole = parts[0].new_zeros(sum(map(len, parts)), *sizes)
    start = 0
    for part in parts:
        whole[(slice(start, start + len(part)), *(slice(size) for size in part.shape[1:]))] = part
        start += len(part)
    return whole
