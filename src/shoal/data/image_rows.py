"""Rows of an image, a question and its answer, and what a model that reads images is given for one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from shoal.atomic_files import file_hash, fingerprint
from shoal.data.chat import column_of
from shoal.data.sources import records
from shoal.errors import UserError
from shoal.models.anatomy import text_config
from shoal.recipe.measure import ImageRows
from shoal.recipe.section import DataSource


@dataclass(frozen=True)
class ImageRow:
    """One row."""

    where: str
    """File and number, for messages."""
    image: Path
    prompt: str
    answer: str


@dataclass(frozen=True)
class Asked:
    """One row as a model is given it."""

    inputs: dict[str, Tensor]
    """A batch of one: what the processor makes of image, prompt and answer."""
    num_answer: int
    """Tokens at the end that are the answer."""


def load_image_rows(settings: ImageRows) -> list[ImageRow]:
    """The first ``settings.num_rows`` rows, in order, all images of which can be opened.

    Raises:
        UserError: no such file or column, a row without an image or an answer, or an image that cannot be read.
    """
    rows: list[ImageRow] = []
    for number, (where, record) in enumerate(islice(records(DataSource(settings.path)), settings.num_rows)):
        row, named = f"measure.images: row {number} of {where}", f"{where!r} row {number}"
        image, prompt, answer = (
            column_of(record, column, named) for column in (settings.image, settings.prompt, settings.answer)
        )
        if not isinstance(image, str) or not image.strip():
            raise UserError(f"{row}: names no image in column {settings.image!r}; every row needs one: leave it out")
        if not isinstance(prompt, str) or not isinstance(answer, str) or not answer.strip():
            raise UserError(f"{row}: needs text in {settings.prompt!r} and an answer in {settings.answer!r}; mend it")
        path = Path(image).expanduser()
        path = path if path.is_absolute() else Path(where).expanduser().parent / path
        _refuse_unreadable(path, row)
        rows.append(ImageRow(row, path, prompt, answer))
    if not rows:
        raise UserError(f"measure.images: {settings.path} holds no row; name a file that does")
    return rows


def _refuse_unreadable(path: Path, row: str) -> None:
    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises for damage
        reason = str(error).split("\n")[0]
        raise UserError(
            f"{row}: {path} cannot be read as an image ({reason}); name an image file, or leave the row out"
        ) from error


def image_rows_fingerprint(rows: Sequence[ImageRow]) -> str:
    """Content hash of rows and images, wherever they lie."""
    return fingerprint([[file_hash(row.image), row.prompt, row.answer] for row in rows])


def asked(rows: Sequence[ImageRow], processor: Any, config: Any) -> Iterator[Asked]:
    """What the model of ``config`` is given for each row, made when it is asked for.

    The prompt is rendered with the chat template where there is one, else it stands behind the image.

    Raises:
        UserError: a processor that takes no such text, or a row longer than the model's positions.
    """
    longest = getattr(text_config(config), "max_position_embeddings", None)
    for row in rows:
        with Image.open(row.image) as file:
            image = file.convert("RGB")
        prompt, bos = _rendered(row.prompt, processor), processor.tokenizer.bos_token
        given: dict[str, Any] = {"images": [image], "return_tensors": "pt"}
        if bos and prompt.startswith(bos):  # a chat template has put it there
            given["add_special_tokens"] = False
        try:
            before, whole = (processor(text=text, **given) for text in (prompt, prompt + row.answer))
        except (ValueError, TypeError, KeyError, IndexError, ImportError) as error:
            raise UserError(
                f"{row.where}: the checkpoint's processor cannot take it ({error!r}); mend the row or the processor's "
                "files"
            ) from error
        ids, start = whole["input_ids"][0], _common(before["input_ids"][0], whole["input_ids"][0])
        if start == len(ids):
            raise UserError(f"{row.where}: the processor makes no token of its answer {row.answer!r}; leave it out")
        if longest is not None and len(ids) > longest:
            raise UserError(
                f"{row.where}: takes {len(ids)} tokens, and the model has {longest} positions; leave it out"
            )
        yield Asked({name: value for name, value in whole.items() if isinstance(value, Tensor)}, len(ids) - start)


def _rendered(prompt: str, processor: Any) -> str:
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return f"{getattr(processor, 'image_token', '<image>')}{prompt}"


def _common(one: Tensor, other: Tensor) -> int:
    """How many tokens both begin with: there the answer starts, or a token that it shares with the prompt."""
    size = min(len(one), len(other))
    differ = (one[:size] != other[:size]).nonzero()
    return int(differ[0]) if len(differ) else size


def on_device(inputs: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """``inputs`` there, what is in floating point in ``dtype``."""
    return {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in inputs.items()}
