"""The text a student learns from: named sources, and text that the teacher writes itself."""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from shoal.artifact import fingerprint, write_json, write_text, written_folder
from shoal.data import TEACHER_TEXT, PackedRows, load_texts, pack, texts_fingerprint
from shoal.errors import UserError
from shoal.recipe import Distill
from shoal.runtime import is_main
from shoal.section import DataSource

log = logging.getLogger(__name__)

OPENING_TOKENS = 24
"""Tokens of a real document that the teacher goes on from."""
WRITTEN_TOKENS = 232
"""Most tokens it writes after them."""
BATCH = 16
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


def wants_teacher_text(data: Sequence[DataSource]) -> bool:
    """Whether the teacher has to write before training."""
    return any(source.path == TEACHER_TEXT for source in data)


def written_by_teacher(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Distill,
    *,
    file: Path,
    inputs: dict[str, Any],
    seed: int,
) -> list[str]:
    """Documents that the teacher goes on writing from the openings of the prose sources, about
    ``settings.teacher_text_tokens`` tokens; kept in ``file`` and read back when ``inputs`` are the same.

    Sampled at temperature 1 over the whole vocabulary, so that the text has the teacher's own distribution: there the
    student's mistakes are made, and there the teacher's targets are most exact.

    Raises:
        UserError: no other source to take openings from.
    """
    if file.is_file():
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["inputs"] == inputs:
            return kept["texts"]
    openings = _openings(settings.data, tokenizer, seed=seed)
    num_texts = math.ceil(settings.teacher_text_tokens / (OPENING_TOKENS + WRITTEN_TOKENS))
    chosen = [openings[i % len(openings)] for i in range(num_texts)]
    log.info("the teacher writes %d documents of up to %d tokens", num_texts, OPENING_TOKENS + WRITTEN_TOKENS)
    texts: list[str] = []
    # none of the checkpoint's own penalties and filters
    neutral = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=tokenizer.eos_token_id)
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    for start in tqdm(range(0, num_texts, BATCH), desc="teacher text", unit="batch", disable=not is_main()):
        batch = torch.tensor(chosen[start : start + BATCH], device=teacher.device)
        written = teacher.generate(  # pyright: ignore[reportCallIssue]
            input_ids=batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=WRITTEN_TOKENS,
            generation_config=neutral,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts += tokenizer.batch_decode(written, skip_special_tokens=True)
    torch.set_rng_state(generator_state)
    kept = without_evaluation_facts(texts)
    if len(kept) < len(texts):
        log.info("teacher text: %d documents that state an evaluation fact were left out", len(texts) - len(kept))
    texts = kept
    if is_main():
        write_text(file, json.dumps({"inputs": inputs, "texts": texts}, ensure_ascii=False))
    return texts


def without_evaluation_facts(texts: Sequence[str]) -> list[str]:
    """The documents in which the teacher did not happen to write an answer that shoal's knowledge tasks ask for."""
    from shoal.abilities.knowledge import stated_facts

    stated = stated_facts("eval")
    return [text for text in texts if not any(sentence in text for sentence in stated)]


def _openings(data: Sequence[DataSource], tokenizer: PreTrainedTokenizerBase, *, seed: int) -> list[list[int]]:
    # ability prompts make it state facts of the kinds that evaluation asks for
    others = [source for source in data if source.path not in (TEACHER_TEXT, "ability_texts")]
    if not others:
        raise UserError(f"distill.data: {TEACHER_TEXT!r} needs a source of prose beside it to take openings from")
    openings = []
    for source in others:
        for text in load_texts(source, max_characters=1_000_000):
            ids = tokenizer(text[:1000])["input_ids"]
            if len(ids) >= OPENING_TOKENS:
                openings.append(ids[:OPENING_TOKENS])
    random.Random(seed).shuffle(openings)
    if not openings:
        raise UserError(f"distill.data: no document of the other sources has {OPENING_TOKENS} tokens to open with")
    return openings
