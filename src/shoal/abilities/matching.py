"""Whether written text gives the right answer: by its first words, a word in it, its number, or an option's letter."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MATCHING = 3
"""Raise it with every change, here or in what uses this, by which a written answer may be read otherwise: scores of two
versions are not compared. Evaluations that do not say theirs have the first."""
LETTERS = string.ascii_uppercase
NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|(?<![\w.])\.\d+)")
FIRST_NUMBER = re.compile(rf"^\W*?({NUMBER.pattern})(?!\w|\^|[.,:\u2013-]\d|\s*/\s*\d)")
"""A whole one: not the beginning of 3.5km, 3/4, 10:30 or 10-4."""
AMOUNT = re.compile(
    rf"(?P<sign>-?)\\[dt]?frac\s*\{{\s*(?P<top>{NUMBER.pattern})\s*\}}\s*\{{\s*(?P<bottom>{NUMBER.pattern})\s*\}}"
    rf"|(?P<first>{NUMBER.pattern})(?:(?P<by>\s*/\s*|:|\^\{{?)(?P<second>{NUMBER.pattern}))?"
)
"""A number, a fraction, or what has a number in it but is another one: a power, a time of day."""
STATED = re.compile(r"answer is|####", flags=re.IGNORECASE)
"""What stands before the answer of a worked solution."""
NO_NOUN = (
    r"(?=[^\S\n]*$|[^\w\s'\u2019/&-]|['\u2019/&-](?!\w)|\s+[(\[=:;\u2013\u2014-]"
    r"|\s+(?:is|because|since|as|and|or|but)\b)"
)
"""What follows "A" or "I" that is a letter: a mark, the end, or a word that stands behind no article."""
REJECTED = (
    r"(?i:\W*\b(?:(?:is|was|would be)\s+(?:not|wrong|incorrect)|(?:is|was)n['\u2019]t|can(?:not|['\u2019]t))\b"
    r"|\W*\?\W*no\b)"
)
"""What follows a letter that is not chosen. "B is false" may choose it: some questions ask which statement is."""
LETTER = re.compile(rf"^\W*([B-HJ-Z](?!\w)|[AI]{NO_NOUN})(?!{REJECTED})")
STATING = r"(?i:\b(?:answer|option|choice)\b[^\w\u2212-]*(?:is\b|would be\b)?)"
STATED_LETTER = re.compile(rf"{STATING}\W*([B-HJ-Zb-hj-z](?!\w)|[AIai]{NO_NOUN})(?!{REJECTED})")
STATED_TEXT = re.compile(rf"{STATING}[^\w\u2212-]*(.+)")


def first_line(text: str) -> str:
    """The first line that holds anything."""
    return text.strip().split("\n")[0].strip()


def plain(text: str) -> str:
    """Without case, punctuation and double spaces; signs that mean something (degrees, currencies) stay."""
    text, signs = text.casefold(), string.punctuation
    kept = "".join(" " if each in signs or unicodedata.category(each).startswith("P") else each for each in text)
    return " ".join(kept.split())


def starts(text: str, answers: Sequence[str]) -> bool:
    """The first line starts with an answer as whole words: models go on after it ("Paris, which is").

    An answer that is a number is compared as one: -3, 3.5, 3.5km and 3/4 are not 3.
    """
    line = first_line(text).replace("\u2212", "-")
    words, first_number = f"{_without_article(plain(line))} ", FIRST_NUMBER.match(line)
    return any(
        first_number is not None and value(first_number[1]) == value(answer)
        if NUMBER.fullmatch(answer.strip())
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
    """The number after "answer is" or "####", or else the last one of the text, equals an answer.

    Fractions (3/4, \\frac{3}{4}) have their value; a power or a time of day equals no number.
    """
    figures = amounts(_stated(text))[:1] or amounts(text)[-1:]
    return bool(figures) and value(figures[0]) is not None and value(figures[0]) in map(value, answers)


def stated(text: str, answers: Sequence[str]) -> bool:
    """What follows the first "answer is" starts with an answer; a text that never says so has given none."""
    return states_an_answer(text) and starts(_stated(text), answers)


def states_an_answer(text: str) -> bool:
    """Whether something follows an "answer is" or "####", right or wrong."""
    return bool(_stated(text))


def chosen_option(text: str, options: Sequence[str]) -> int | None:
    """Which option the first line names: by its letter ("B", "(B) Paris", "the answer is B") or by its text.

    A line that is an option's text, or says after "the answer is" nothing else, names this one whatever its first
    letter; a letter goes before text that only begins so. "A planet" has an article and no letter, and "B is wrong"
    does not choose B. None where no option is named, or by its text more than one.
    """
    line = first_line(text)
    told = [line, *(match[1] for match in [STATED_TEXT.search(line)] if match)]
    same = [index for index, option in enumerate(options) if any(_is_text_of(phrase, option) for phrase in told)]
    if len(same) == 1:
        return same[0]
    for pattern in (LETTER, STATED_LETTER):
        if (match := pattern.search(line)) and (index := LETTERS.index(match[1].upper())) < len(options):
            return index
    for phrase in told:
        named = [index for index, option in enumerate(options) if starts(phrase, [option])]
        longest = [index for index in named if len(options[index]) == max(len(options[other]) for other in named)]
        if len(longest) == 1:
            return longest[0]
    return None


def letter_pattern(letters: Iterable[str]) -> re.Pattern[str]:
    """Finds one of these letters, as chosen_option tells letters from articles, anywhere and in either case."""
    either = {case for letter in letters for case in (letter.upper(), letter.lower())}
    articles, others = (re.escape("".join(sorted(some))) for some in (either & set("AaIi"), either - set("AaIi")))
    forms = [f"[{others}](?!\\w)"] * bool(others) + [f"[{articles}]{NO_NOUN}"] * bool(articles)
    return re.compile(rf"(?<!\w)(?:{'|'.join(forms)})", re.MULTILINE)


def amounts(text: str) -> list[str]:
    """Every number and fraction in ``text``, as it is written; a power or a time of day in one piece."""
    return [match[0] for match in AMOUNT.finditer(text.replace("\u2212", "-"))]


def value(text: str) -> float | None:
    """Of the first number or fraction in ``text``; None where there is none, or one that has no plain value (2^4)."""
    match = AMOUNT.search(text)
    if match is None or (match["by"] or "/").strip() != "/":
        return None
    parts = match["top"] or match["first"], match["bottom"] or match["second"] or "1"
    top, bottom = (float(part.replace(",", "")) for part in parts)
    return (-top if match["sign"] else top) / bottom if bottom else None


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


def _is_text_of(text: str, option: str) -> bool:
    """A number is left to `starts`, and a single letter is an option's letter first."""
    wanted = _without_article(plain(option))
    return len(wanted) > 1 and not NUMBER.fullmatch(option.strip()) and _without_article(plain(text)) == wanted
