"""Evaluation items in text that a student learns from.

Code of eval is imported where it is used, so that a verb loads only what it runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from shoal.data import contamination
from shoal.data.packing import PackedRows
from shoal.data.streams import row_texts

from .run import Run

log = logging.getLogger(__name__)

OVERLAP_TOKENS = 50_000_000
"""So much of a text is searched for evaluation items at most: minutes, not hours."""


def search_of_rows(
    run: Run, text: str = "the training text"
) -> Callable[[PackedRows, PreTrainedTokenizerBase], dict[str, Any]]:
    """What looks for evaluation items, by task, in rows of ``text``."""
    from shoal.eval.evaluate import num_items
    from shoal.eval.harness.samples import item_texts
    from shoal.eval.tasks.load import tasks_of

    settings = run.recipe.eval

    def search(rows: PackedRows, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        tasks = tasks_of(settings)
        items = item_texts(tasks, num_items(tasks, settings))
        texts = (document for _, document in row_texts(rows, tokenizer, max_tokens=OVERLAP_TOKENS))
        overlaps = contamination.find_overlap(items, texts)
        if some := [f"{each.found} of {each.compared} of {task}" for task, each in overlaps.items() if each.found]:
            log.warning("evaluation items occur in %s: %s; their scores may be too high", text, ", ".join(some))
        return {
            "overlap": contamination.as_data(overlaps),
            "tokens_searched_for_overlap": min(rows.input_ids_NS.numel(), OVERLAP_TOKENS),
        }

    return search
