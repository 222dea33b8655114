"""The text a student learns from, as packed rows on the disk."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from shoal.atomic_files import fingerprint, written_folder
from shoal.data.image_rows import ImageReader, RowsWithImages
from shoal.data.packing import SOURCES, PackedRows, read_rows
from shoal.data.sources import pack, texts_fingerprint
from shoal.inference.vllm import check_vllm, vllm_dtype
from shoal.models.load import Checkpoint
from shoal.recipe.distill import Distill, sources_that_ask
from shoal.recipe.recipe import Recipe
from shoal.recipe.section import TEACHER_TEXT, Shapes, shaping_keys
from shoal.runtime import agreed, device

from .engine.arguments import num_rows, rows_per_step
from .generated.writing import Writer, transformers_writer, vllm_writer, wants_teacher_text, write_texts
from .teacher.recording_plan import rows_from

log = logging.getLogger(__name__)


def teacher_texts(
    teacher: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    settings: Distill,
    folder: Path,
    *,
    inputs: dict[str, Any],
) -> Sequence[str]:
    """What the teacher writes for the source `teacher_text`, kept in ``folder``; none where the recipe has no such."""
    seed = inputs["seed"]
    if not wants_teacher_text(settings.data):
        return ()
    known_by = {key: inputs[key] for key in ("model", *shaping_keys(Recipe, Shapes.TEXT))}
    by_vllm = settings.writing.backend == "vllm"
    if by_vllm and teacher.load.dtype == "stored" and vllm_dtype(teacher) == "float32":
        known_by["dtype"] = "float32"  # texts of before, named after what is stored, were written in float16

    def load_writer() -> Writer:
        if by_vllm:
            check_vllm("distill.writing.backend")  # what is written already is read without it, and by all ranks
            return vllm_writer(teacher, tokenizer, settings.writing, seed=seed)
        # a copy of the teacher of its own, freed before training
        writer = teacher.model(device=device())
        return transformers_writer(writer, tokenizer, settings.writing, seed=seed)

    return write_texts(
        settings.writing,
        tokenizer,
        data=settings.data,
        folder=folder,
        inputs=known_by,
        seed=seed,
        load_writer=load_writer,
    )


def rows_to_train_on(
    tokenizer: PreTrainedTokenizerBase,
    settings: Distill,
    texts: Sequence[str],
    folder: Path,
    *,
    inputs: dict[str, Any],
    images: ImageReader | None = None,
    for_recording: bool = False,
) -> PackedRows:
    """The packed rows of the budget, kept in ``folder``; ``texts`` stand for the source `teacher_text`, and what
    ``images`` has read for the sources of images.

    ``for_recording``: as training_rows says.
    """
    return training_rows(
        settings,
        tokenizer,
        num_rows=num_rows(settings),
        seed=inputs["seed"],
        teacher_text=texts,
        folder=folder,
        inputs={"model": inputs["model"], **rows_from(inputs)},
        images=images,
        for_recording=for_recording,
    )


def sources_apart(settings: Distill) -> list[bool] | None:
    """Of each source whether the teacher is asked of its rows, if those of which it is not are rows of their own."""
    asked = None if settings.teacher.recorded is not None else sources_that_ask(settings)
    flags = [asked is None or number in asked for number in range(len(settings.data))]
    return None if all(flags) or not any(flags) else flags


def training_rows(
    settings: Distill,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_rows: int,
    seed: int,
    teacher_text: Sequence[str],
    folder: Path,
    inputs: dict[str, Any],
    images: ImageReader | None = None,
    for_recording: bool = False,
) -> PackedRows:
    """Packed rows of all sources in their weights; ``teacher_text`` stands in for the source of that name, ``images``
    for those of images.

    Sources of which no loss term asks the teacher have rows of their own, which it need not read. Not so rows
    ``for_recording``, nor those of a recorded teacher: what is recorded serves other loss terms too.

    Rank 0 tokenises and packs once into ``folder``, row by row; every rank maps those files, also when training goes on
    later, so that a large budget costs no rank memory or a second tokenisation.
    """
    identity = [inputs, num_rows, settings.packing, texts_fingerprint(teacher_text)]
    if images is not None:
        identity.append(rows_per_step(settings))
    images_of = {} if images is None else images.rows
    apart = None if for_recording else sources_apart(settings)
    if apart is not None:
        identity.append({"asks the teacher": apart})
    path = folder / f"rows-{fingerprint([*identity, SOURCES] if settings.by_source else identity)}"

    def pack_once() -> None:
        if path.exists():
            return
        num_tokens = num_rows * settings.sequence_length
        if num_tokens > 1.1 * settings.num_tokens:
            log.info(
                "distill.num_tokens: %s is rounded up to %s, whole optimizer steps of all ranks",
                f"{settings.num_tokens:,}",
                f"{num_tokens:,}",
            )
        with written_folder(path) as unfinished:
            rows = pack(
                [
                    (source, teacher_text if source.path == TEACHER_TEXT else images_of.get(source))
                    for source in settings.data
                ],
                tokenizer,
                sequence_length=settings.sequence_length,
                num_tokens=num_tokens,
                seed=seed,
                packing=settings.packing,
                folder=unfinished,
                with_sources=settings.by_source,
                encode_image=None if images is None else images.tokens,
                rows_per_step=rows_per_step(settings),
                groups=apart,
            )
        for name, count in rows.counts.items():
            if count["repeats"]:
                times = "once" if count["repeats"] == 1 else f"{count['repeats']} times"
                log.info("%s is smaller than its share of the budget and is repeated %s", name, times)

    agreed(pack_once)
    return RowsWithImages.of(read_rows(path), images)
