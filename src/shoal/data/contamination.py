"""Evaluation items that are found in training text, by the words they share with it.

An item counts as found where a document holds any 13 words in succession of it, as GPT-3 counted (Brown et al. 2020,
arXiv:2005.14165, appendix C), or the whole of an item that is shorter. Letter case and punctuation do not matter. What
many items of a task have in common is the task's own wording, and shows nothing.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

NUM_WORDS = 13
FEWEST_WORDS = 5
"""Words of the shortest item that is looked for; a shorter one would be found by chance."""
COMMON = 3
"""Items of one task up to which an n-gram is their own; one of more is the wording of the prompt."""
EXAMPLES = 20
_SIGNS = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_SIGNS}]|[^\W_{_SIGNS}]+")
"""A run of letters and digits; Chinese, Japanese and Korean signs one by one, as no spaces part their words."""

Words = tuple[str, ...]


@dataclass(frozen=True)
class Overlap:
    """Items of one task that were found in the training text."""

    items: int
    compared: int
    """Number of items with words of their own that are long enough to look for."""
    found: int
    examples: tuple[int, ...]
    """Indices of the first items that were found."""


def find_overlap(tasks: Mapping[str, Sequence[str]], documents: Iterable[str]) -> dict[str, Overlap]:
    """Per task, which of its items' texts share NUM_WORDS words in succession with a document.

    Documents are looked through one at a time; what is kept is the n-grams of the items.
    """
    owners, compared = _grams(tasks)
    shortest = min(map(len, owners), default=1)
    lengths: dict[Words, set[int]] = defaultdict(set)  # of all n-grams that begin with the same words
    for gram in owners:
        lengths[gram[:shortest]].add(len(gram))
    hits: dict[str, set[int]] = {task: set() for task in tasks}
    for words in map(words_of, documents):
        for start, beginning in enumerate(zip(*(words[skip:] for skip in range(shortest)), strict=False)):
            for length in lengths.get(beginning, ()):
                for task, index in owners.get(tuple(words[start : start + length]), ()):
                    hits[task].add(index)
    return {
        task: Overlap(len(items), compared[task], len(hits[task]), tuple(sorted(hits[task])[:EXAMPLES]))
        for task, items in tasks.items()
    }


def as_data(overlaps: Mapping[str, Overlap]) -> dict[str, dict[str, Any]]:
    """The result as JSON keeps it."""
    return {task: asdict(overlap) for task, overlap in overlaps.items()}


def words_of(text: str) -> list[str]:
    """The words of a text, without case and punctuation, in one Unicode form."""
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return _WORD.findall(plain.casefold())


def _grams(tasks: Mapping[str, Sequence[str]]) -> tuple[dict[Words, list[tuple[str, int]]], dict[str, int]]:
    """Every n-gram that is looked for with the items it belongs to, and how many items of a task have one."""
    owners: dict[Words, list[tuple[str, int]]] = defaultdict(list)
    compared: dict[str, int] = {}
    for task, items in tasks.items():
        of_task: dict[Words, list[int]] = defaultdict(list)
        for index, text in enumerate(items):
            words = words_of(text)
            length = min(NUM_WORDS, len(words))
            if length >= FEWEST_WORDS:
                for start in range(len(words) - length + 1):
                    holders = of_task[tuple(words[start : start + length])]
                    if holders[-1:] != [index]:
                        holders.append(index)
        special = {gram: holders for gram, holders in of_task.items() if len(holders) <= COMMON}
        compared[task] = len({index for holders in special.values() for index in holders})
        for gram, holders in special.items():
            owners[gram] += [(task, index) for index in holders]
    return dict(owners), compared
