"""The text a student learns from, as packed rows on the disk."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from shoal.atomic_files import fingerprint, written_folder
from shoal.data.image_rows import ImageReader, RowsWithImages
from shoal.data.packing import SOURCES, PackedRows, read_rows
from shoal.data.sources import opened, texts_fingerprint
from shoal.data.streams import Layout, Written, pack
from shoal.inference.vllm import check_vllm, end_engine, vllm_dtype, vllm_engine
from shoal.models.load import Checkpoint
from shoal.ranks import is_main
from shoal.recipe.distill import Distill, Generate, Recorded, sources_that_ask
from shoal.recipe.recipe import Recipe
from shoal.recipe.section import Shapes, shaping_keys
from shoal.runtime import agreed, device, everyone_sees

from .engine.arguments import num_rows, rows_per_step
from .teacher.recording import rows_from
from .writing import Writer, transformers_writer, vllm_writer, write_texts

log = logging.getLogger(__name__)


def teacher_texts(
    teacher: Checkpoint, tokenizer: PreTrainedTokenizerBase, settings: Distill, folder: Path, *, inputs: dict[str, Any]
) -> dict[int, list[Written]]:
    """What the teacher writes in place of the sources with `generate`, by their numbers, kept in ``folder``."""
    seed = inputs["seed"]
    # a copy of the teacher of its own, freed before training
    model = cache(lambda: teacher.model(device=device()))
    engine = cache(lambda: vllm_engine(teacher, seed=seed))

    def written(number: int, how: Generate) -> list[Written]:
        keys = ("model", *shaping_keys(Recipe, Shapes.TEXT))
        known_by = {key: inputs[key] for key in keys if key in inputs}
        by_vllm = how.backend == "vllm"
        if by_vllm and teacher.load.dtype == "stored" and vllm_dtype(teacher) == "float32":
            known_by["dtype"] = "float32"  # texts of before, named after what is stored, were written in float16

        def load_writer() -> Writer:
            if by_vllm:
                check_vllm(f"distill.data.{number}.generate.backend")  # what is written already is read without it
                return vllm_writer(engine(), teacher, tokenizer, how, seed=seed)
            return transformers_writer(model(), tokenizer, how, seed=seed)

        return write_texts(
            settings, number, tokenizer, folder=folder, inputs=known_by, seed=seed, load_writer=load_writer
        )

    texts = {n: written(n, source.generate) for n, source in enumerate(settings.data) if source.generate is not None}
    if engine.cache_info().currsize:
        end_engine(engine())
    return texts


def sources_apart(settings: Distill) -> list[bool] | None:
    """Of each source whether the teacher is asked of its rows, if those of which it is not are rows of their own."""
    asked = None if isinstance(settings.teacher, Recorded) else sources_that_ask(settings)
    flags = [asked is None or number in asked for number in range(len(settings.data))]
    return None if all(flags) or not any(flags) else flags


def rows_to_train_on(
    tokenizer: PreTrainedTokenizerBase,
    settings: Distill,
    texts: Mapping[int, Sequence[str]],
    folder: Path,
    *,
    inputs: dict[str, Any],
    images: ImageReader | None = None,
) -> PackedRows:
    """The packed rows of the budget, kept in ``folder``; ``texts`` stand for the sources of these numbers, and
    what ``images`` has read for the sources of images.

    Sources of which no loss term asks the teacher have rows of their own, which it need not read. Not so those of a
    recorded teacher: what is recorded serves other loss terms too.

    Rank 0 tokenises and packs once into ``folder``, row by row; every rank maps those files, also when training goes on
    later, so that a large budget costs no rank memory or a second tokenisation.
    """
    shaped, rows = {"model": inputs["model"], **rows_from(inputs)}, num_rows(settings)
    identity = [shaped, rows, settings.packing, {number: texts_fingerprint(own) for number, own in texts.items()}]
    if images is not None:
        identity.append(rows_per_step(settings))
    if (apart := sources_apart(settings)) is not None:
        identity.append({"asks the teacher": apart})
    path = folder / f"rows-{fingerprint([*identity, SOURCES] if settings.by_source else identity)}"
    if is_main() and (num_tokens := rows * settings.sequence_length) > 1.1 * settings.budget and not path.exists():
        log.info(
            "distill.num_tokens: %s is rounded up to %s (whole optimizer steps of all ranks)",
            f"{settings.budget:,}",
            f"{num_tokens:,}",
        )
    agreed(lambda: path.exists() or _pack(tokenizer, settings, texts, path, inputs["seed"], images, apart))
    everyone_sees(path)
    return RowsWithImages.of(read_rows(path), images)


def _pack(
    tokenizer: PreTrainedTokenizerBase,
    settings: Distill,
    texts: Mapping[int, Sequence[str]],
    path: Path,
    seed: int,
    images: ImageReader | None,
    apart: Sequence[bool] | None,
) -> None:
    shown = {} if images is None else images.rows
    sources = [
        (opened(source), texts[number]) if number in texts else (source, shown.get(source))
        for number, source in enumerate(settings.data)
    ]
    with written_folder(path) as unfinished:
        rows = pack(
            sources,
            tokenizer,
            sequence_length=settings.sequence_length,
            num_tokens=num_rows(settings) * settings.sequence_length,
            seed=seed,
            packing=settings.packing,
            layout=Layout(
                unfinished,
                with_sources=settings.by_source,
                groups=apart,
                encode_image=None if images is None else images.tokens,
                rows_per_step=rows_per_step(settings),
            ),
        )
    for name, count in rows.counts.items():
        if count["repeats"]:
            times = "once" if count["repeats"] == 1 else f"{count['repeats']} times"
            log.info("%s is smaller than its share of the tokens and is repeated %s", name, times)


class StepSampler(Sampler[int]):
    """Rows as they are packed, step by step, and inside of a step those that ask the teacher behind the others.

    A step holds the same rows as without that, and its loss is their sum. The Trainer deals a step out micro-batch by
    micro-batch, in each rank by rank. So all ranks run the teacher in the same micro-batches, but for one in which they
    have as many rows each that ask it, give or take one: a step takes as long as its slowest rank.
    """

    def __init__(self, asks_N: NDArray[np.bool_], *, rows: int, ranks: int, micro_batches: int) -> None:
        """``asks_N``: whether the teacher is asked of a row. A step has ``micro_batches`` of ``rows`` rows on every
        rank."""
        super().__init__()
        self._asks_N = asks_N
        self._shape = (micro_batches, rows, ranks)

    def __len__(self) -> int:
        return len(self._asks_N)

    def __iter__(self) -> Iterator[int]:
        per_step = int(np.prod(self._shape))
        for start in range(0, len(self), per_step):
            yield from (start + self._dealt(self._asks_N[start : start + per_step])).tolist()

    def _dealt(self, asks: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Places of a step's rows in the order in which they are dealt."""
        order = asks.argsort(kind="stable")
        if asks.all() or not asks.any() or asks.size != np.prod(self._shape):
            return order
        # one to each rank in turn, until all have their micro-batch
        return order.reshape(self._shape).swapaxes(1, 2).ravel()
