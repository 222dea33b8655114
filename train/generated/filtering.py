"""Which written texts are worth training on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from shoal.abilities.knowledge import stated_facts
from shoal.abilities.matching import AMOUNT, amounts, value
from shoal.data.repetition import ends_in_loop

OUTCOMES = ("written", "empty", "looping", "repeated", "evaluation fact", "wrong", "kept")


def sifted(records: Iterable[dict[str, Any]], *, keep: str) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The records worth training on, and how many were left out for which reason, each for the first that applies."""
    counts: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
    seen: set[str] = set()
    kept = []
    for record in records:
        counts["written"] += 1
        reason = _reason_against(record, seen, keep=keep)
        counts[reason or "kept"] += 1
        if reason is None:
            seen.add(record["text"])
            kept.append(record)
    return kept, dict(counts)


def _reason_against(record: dict[str, Any], seen: set[str], *, keep: str) -> str | None:
    written = record["written"]
    if not written.strip():
        return "empty"
    if ends_in_loop(written):
        return "looping"
    if record["text"] in seen:
        return "repeated"
    if not without_evaluation_facts([record["text"]]):
        return "evaluation fact"
    if keep == "correct" and not answers_alike(written, record["answer"]):
        return "wrong"
    return None


MARKED = re.compile(r"####(.*)|\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
ESCAPE = re.compile(r"\\(?=[$%\s]|$)")
WITH_UNIT = re.compile(rf"({AMOUNT.pattern})(?:\s*\\text\{{[^{{}}]*\}}|(?:\s+[^\W\d_]+)*)")
"""An amount, and behind it at most words: `10-4` and `\\sqrt{4}` end in a number that they are not."""


def answers_alike(written: str, answer: str) -> bool:
    """Whether both come to the same final answer.

    That is what the data's answer marks by `####` or \\boxed{}, else its last number, else its last line. Of what was
    written the same is looked at: what it marks, else its last number where a number is asked for, else its last line,
    which may end in the answer where that is plain words. What is marked counts as a number only if it is one, with a
    unit or behind `=` too. A fraction is a number; a power or a time of day is one piece and equals only itself.
    """
    written, answer = (text.replace("\u2212", "-") for text in (written, answer))
    wanted = _marked(answer)
    numbers = _numbers(answer if wanted is None else wanted)
    if numbers and wanted in (None, numbers[-1]):
        marked = _marked(written)
        stated = _lone_number(marked) if marked else _numbers(written)
        return bool(stated) and _equal(stated[-1], numbers[-1])
    wanted = wanted or _last_line(answer)
    stated_last = _marked(written) or _last_line(written)
    return bool(wanted) and (_bare(wanted) == _bare(stated_last) or _ends_in(stated_last, wanted))


def _marked(text: str) -> str | None:
    matches = MARKED.findall(text)
    # what stands before .5 is its point
    return "".join(matches[-1]).lstrip(" $%").rstrip(" $%.") if matches else None


def _lone_number(marked: str) -> list[str]:
    last = ESCAPE.sub("", marked.replace("{,}", ",")).rsplit("=", 1)[-1]
    number = WITH_UNIT.fullmatch(last.strip(" $"))
    return [number[1]] if number else []


def _last_line(text: str) -> str:
    return text.strip().rsplit("\n", 1)[-1]


def _numbers(text: str) -> list[str]:
    """Every number and fraction in ``text``; of `10-4` the second is 4."""
    return amounts(re.sub(r"(?<=\d)-", "- ", text))


def _equal(one: str, other: str) -> bool:
    """Whether two pieces that `amounts` has read have the same value, or where there is none the same characters."""
    if value(one) is None or value(other) is None:
        return re.sub(r"[\s,{]", "", one) == re.sub(r"[\s,{]", "", other)
    return value(one) == value(other)


def _bare(text: str) -> str:
    return "".join(text.casefold().split()).strip(".")


def _ends_in(text: str, answer: str) -> bool:
    """Whether ``text`` ends in the words of ``answer``, without a "not" right before them; never for formulas."""
    words = _plain(answer)
    before, separator, rest = _plain(text).rpartition(words)
    whole = bool(separator) and not rest and not (before[-1:].isalnum() or before.endswith("-"))
    return whole and PLAIN_WORDS.fullmatch(words) is not None and NEGATED.search(before) is None


PLAIN_WORDS = re.compile(r"[^\W\d_]+(?:[ '\u2019-][^\W\d_]+)*")
NEGATED = re.compile(r"(?:\bnot|n['\u2019]t)(?: \w+)?\W*$")


def _plain(text: str) -> str:
    """Without case, double spaces and what may stand around words."""
    return " ".join(text.casefold().split()).strip(" .!*`\"'\u201c\u201d")


def without_evaluation_facts(texts: Sequence[str]) -> list[str]:
    """The documents in which the teacher did not happen to write an answer that shoal's knowledge tasks ask for."""
    stated = stated_facts("eval")
    return [text for text in texts if not any(sentence in text for sentence in stated)]
