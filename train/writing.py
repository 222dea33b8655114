"""Text that the teacher writes itself, going on from openings of real documents."""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from shoal.artifact import write_text
from shoal.data import TEACHER_TEXT, load_texts
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
