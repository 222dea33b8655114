"""Evaluation items, and wording that no training text may have, in text that a student learns from.

Code of eval is imported where it is used, so that a verb loads only what it runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from shoal.abilities.forms import twin_wordings
from shoal.data import contamination, wording
from shoal.data.packing import PackedRows
from shoal.data.sources import BUNDLED, row_texts

from .run import Run

log = logging.getLogger(__name__)

OVERLAP_TOKENS = 50_000_000
"""So much of a text is searched for evaluation items and wording at most: minutes, not hours."""
PLACES_TOLD = 3
"""Places of one form's wording that the log tells; distill.json and plan.json have more."""


def search_of_rows(
    run: Run, text: str = "the training text"
) -> Callable[[PackedRows, PreTrainedTokenizerBase], dict[str, Any]] | None:
    """What looks for evaluation items, by task, and for the wording of twins and untrained abilities in rows of
    ``text``; None where the recipe does not want it."""
    from shoal.eval.evaluate import num_items
    from shoal.eval.harness.item_texts import item_texts
    from shoal.eval.tasks.load import tasks_of

    settings = run.recipe.eval
    if not run.recipe.distill.overlap:
        return None

    def search(rows: PackedRows, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        tasks = tasks_of(settings)
        items = item_texts(tasks, num_items(tasks, settings))
        column_of = {name: (task.config.metadata or {}).get("column") for name, task in tasks.items()}
        untrained = [name for name, column in column_of.items() if column in ("twin", "out")]
        own = {name: wording.shared_wording(items[name]) for name in untrained}  # nothing where forms are several
        looked_for = wording.WordingSearch(twin_wordings() | own)
        texts = looked_for.passing(row_texts(rows, tokenizer, max_tokens=OVERLAP_TOKENS))
        overlaps = contamination.find_overlap(items, texts)
        if some := [f"{each.found} of {each.compared} of {task}" for task, each in overlaps.items() if each.found]:
            log.warning("evaluation items stand in %s: %s; their scores may flatter", text, ", ".join(some))
        if told := [_told(form, each) for form, each in looked_for.result.items() if each.found]:
            sources = [name for name in rows.counts if name not in BUNDLED] or rows.counts
            log.warning(
                "the wording of twin forms or untrained abilities stands in %s of %s: %s; scores in these forms may "
                "flatter, as they tell what is learnt only where no training text has them; take such text out",
                text,
                ", ".join(sources),
                "; ".join(told),
            )
        return {
            "overlap": contamination.as_data(overlaps),
            "wording": wording.as_data(looked_for.result),
            "tokens_searched_for_overlap": min(rows.input_ids_NS.numel(), OVERLAP_TOKENS),
        }

    return search


def _told(form: str, occurrences: wording.Wording) -> str:
    """How often and where a form's wording was found."""
    places = ", ".join(f"row {place.number}: {place.excerpt!r}" for place in occurrences.places[:PLACES_TOLD])
    return f"{form} (documents: {occurrences.found}; {places}{', ...' * (occurrences.found > PLACES_TOLD)})"
