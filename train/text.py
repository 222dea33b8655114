"""The text a student learns from, as packed rows on the disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from shoal.artifact import fingerprint, write_json, written_folder
from shoal.data import TEACHER_TEXT, PackedRows, load_texts, pack, texts_fingerprint
from shoal.recipe import Distill
from shoal.runtime import is_main

ROW_FILES = ("input_ids", "position_ids")


def training_rows(
    settings: Distill,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_rows: int,
    seed: int,
    teacher_text: Sequence[str],
    folder: Path,
    inputs: dict[str, Any],
) -> PackedRows:
    """Packed rows of all sources in their weights; ``teacher_text`` stands in for the source of that name.

    Rank 0 tokenises and packs once into ``folder``; every rank maps those files, also when training goes on later, so
    that a large budget costs no rank memory or a second tokenisation.
    """
    path = folder / f"rows-{fingerprint([inputs, num_rows, texts_fingerprint(teacher_text)])}"
    if is_main() and not path.exists():
        rows = _packed(settings, tokenizer, num_rows=num_rows, seed=seed, teacher_text=teacher_text)
        with written_folder(path) as unfinished:
            np.save(unfinished / "input_ids.npy", rows.input_ids_NS.numpy())
            np.save(unfinished / "position_ids.npy", rows.position_ids_NS.numpy())
            write_json(unfinished / "counts.json", rows.counts)
    if dist.is_initialized():
        dist.barrier()
    ids, positions = (torch.from_numpy(np.load(path / f"{name}.npy", mmap_mode="c")) for name in ROW_FILES)
    return PackedRows(ids, positions, json.loads((path / "counts.json").read_text()))


def _packed(
    settings: Distill, tokenizer: PreTrainedTokenizerBase, *, num_rows: int, seed: int, teacher_text: Sequence[str]
) -> PackedRows:
    sources = []
    total_weight = sum(source.weight for source in settings.data)
    for source in settings.data:
        if source.path == TEACHER_TEXT:
            texts = list(teacher_text)
        else:
            share = settings.num_tokens * source.weight / total_weight
            # a token is rarely longer than eight characters; read no more of a large source than can be used
            texts = load_texts(source, max_characters=int(16 * share) + 1_000_000)
        sources.append((source, texts))
    return pack(
        sources,
        tokenizer,
        sequence_length=settings.sequence_length,
        num_tokens=num_rows * settings.sequence_length,
        seed=seed,
    )
