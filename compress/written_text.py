"""Whether a written text holds an answer at all, and whether it ends in a loop: how removing layers breaks writing."""

from __future__ import annotations

import re
from collections.abc import Sequence

from shoal.loops import ends_in_loop


def malformed_share(texts: Sequence[str], targets: Sequence[str]) -> float:
    """Share of texts from which no answer can be read, whatever the task's own rule of matching is.

    INFERRED: a text that is empty, or holds nothing of the kind that every target of the task holds: where all targets
    are one letter, none of these letters as a word of its own; where all hold a digit, no digit; else neither letter
    nor digit.
    """
    pattern = _answer_pattern([target.strip() for target in targets])
    return sum(pattern.search(text) is None for text in texts) / len(texts)


def repeating_share(texts: Sequence[str]) -> float:
    """Share of texts that end in a loop."""
    return sum(ends_in_loop(text) for text in texts) / len(texts)


def _answer_pattern(targets: Sequence[str]) -> re.Pattern[str]:
    if targets and all(len(target) == 1 and target.isalpha() for target in targets):
        return re.compile(rf"\b[{''.join(sorted(set(targets)))}]\b", re.IGNORECASE)
    if targets and all(any(character.isdigit() for character in target) for target in targets):
        return re.compile(r"\d")
    return re.compile(r"[^\W_]")
