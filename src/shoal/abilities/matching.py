"""Whether written text gives the right answer: by its first words, a word in it, its number, or an option's letter."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

MATCHING = 1
"""Raise it with every change, here or in what uses this, by which a written answer may be read otherwise: scores of two
versions are not compared. Evaluations that do not say theirs have the first."""
LETTERS = string.ascii_uppercase
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
FIRST_NUMBER = re.compile(rf"^\W*?({NUMBER.pattern})(?!\w)")
STATED = re.compile(r"answer is|####", flags=re.IGNORECASE)
"""What stands before the answer of a worked solution."""
LETTER = re.compile(r"^\W*([A-Z])(?:\W|$)")
STATED_LETTER = re.compile(
    r"\b(?:answer|option|choice)\b\W*(?:is\b|would be\b)?\W*\(?([A-Z])\)?(?:\W|$)", re.IGNORECASE
)


def first_line(text: str) -> str:
    """The first line that holds anything."""
    return text.strip().split("\n")[0].strip()


def plain(text: str) -> str:
    """Without case, punctuation and double spaces."""
    kept = "".join(" " if character in string.punctuation else character for character in text.casefold())
    return " ".join(kept.split())


def starts(text: str, answers: Sequence[str]) -> bool:
    """The first line starts with an answer as whole words: models go on after it ("Paris, which is").

    An answer that is a number is compared as one: -3 and 3.5 are not 3.
    """
    line = first_line(text).replace("\u2212", "-")
    words, found = f"{_without_article(plain(line))} ", FIRST_NUMBER.match(line)
    return any(
        _value(found[1]) == _value(answer)
        if found and NUMBER.fullmatch(answer.strip())
        else words.startswith(f"{_without_article(plain(answer))} ")
        for answer in answers
        if plain(answer)
    )


def contains(text: str, answers: Sequence[str]) -> bool:
    """An answer stands in the first line as whole words."""
    line = f" {plain(first_line(text))} "
    return any(f" {plain(answer)} " in line for answer in answers if plain(answer))


def exact(text: str, answers: Sequence[str]) -> bool:
    """The first line is an answer, but for case and spaces; punctuation counts."""
    line = " ".join(first_line(text).casefold().split())
    return any(line == " ".join(answer.casefold().split()) for answer in answers)


def number(text: str, answers: Sequence[str]) -> bool:
    """The number after "answer is" or "####", or else the last one of the text, equals an answer."""
    found = NUMBER.findall(_stated(text))[:1] or NUMBER.findall(text)[-1:]
    return bool(found) and any(_value(found[0]) == _value(answer) for answer in answers)


def stated(text: str, answers: Sequence[str]) -> bool:
    """What follows the first "answer is" starts with an answer; a text that never says so has given none."""
    return states_an_answer(text) and starts(_stated(text), answers)


def states_an_answer(text: str) -> bool:
    """Whether something follows an "answer is" or "####", right or wrong."""
    return bool(_stated(text))


def chosen_option(text: str, options: Sequence[str]) -> int | None:
    """Which option the first line names: by its letter ("B", "(B) Paris", "the answer is B") or, else, by its text.

    None where it names none, or by its text more than one.
    """
    line = first_line(text)
    for pattern in (LETTER, STATED_LETTER):
        if (found := pattern.search(line)) and (index := LETTERS.find(found[1].upper())) < len(options):
            return index
    named = [index for index, option in enumerate(options) if starts(line, [option])]
    longest = [index for index in named if len(options[index]) == max(len(options[other]) for other in named)]
    return longest[0] if len(longest) == 1 else None


def lettered_prompt(doc: Mapping[str, Any]) -> str:
    """The question with its options under letters."""
    options = [f"{letter}. {option.strip()}" for letter, option in zip(LETTERS, doc["options"], strict=False)]
    return "\n".join([doc["question"], *options, "Answer:"])


def letters_of(doc: Mapping[str, Any]) -> list[str]:
    """The letters of its options."""
    return list(LETTERS[: len(doc["options"])])


def _stated(text: str) -> str:
    parts = STATED.split(text, maxsplit=1)
    return parts[1].lstrip(" :") if len(parts) > 1 else ""


def _without_article(text: str) -> str:
    return re.sub(r"^(the|a|an) (?=.)", "", text)


def _value(text: str) -> float | None:
    found = NUMBER.search(text)
    return float(found[0].replace(",", "")) if found else None
