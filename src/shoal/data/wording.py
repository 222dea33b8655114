"""Wording of evaluation forms in training text: the fixed words around what differs from item to item.

`contamination` finds items and takes what many of them share for wording, which shows nothing. Of a form that no
training text may have, the wording is what has to be found. It is known from the templates that render the items.

A template's fixed text is looked for with a slot standing for up to SLOT characters, and for many lines where a line
break is beside it. Letter case, spaces, line breaks and the kind of quotation marks do not matter. Such a piece has
points: WORD for a word, LINK for one of the words that join others in any English text, MARK for a mark, and FREE, less
than none, for a slot inside. A piece of TELLING points shows the form by itself. Of the others, which any text may
hold, different ones have to come to as many within WINDOW characters.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from string import Formatter
from typing import Any

from shoal.abilities.words import table

WORD, LINK, MARK, FREE = 5, 2, 1, -3
"""Points of a word, of a word of LINKS, of a mark and of a slot with text on both sides."""
SHORTEST = 3
"""Letters of the shortest word that counts as one."""
MOST_MARKS = 6
"""Points of a piece's marks at most: brackets and quotation marks come in pairs."""
LEAST = 7
"""Points of a piece that is looked for at all."""
TELLING = 13
"""Points from which on wording is no chance."""
SLOT = 80
"""Characters that a slot inside a piece stands for at most."""
WINDOW = 2000
"""Characters within which pieces are counted together: about a row of 512 tokens."""
EXCERPT = 80
PLACES = 10
"""Places that are told of each form."""
FEWEST_ITEMS, MOST_ITEMS, MOST_TOKENS = 5, 20, 2000
"""Items that show what all have in common, and words and marks of each that are compared."""
LINKS = frozenset(
    table(
        """
    a about after all also am an and another any are as at be because been before between both but by can could did do
    does done down each every few first for from get gets give given go goes had has have he her here him his how i if
    in into is it its just last less let like made make many may me more most much must my new next no not now of off
    on one only or other our out over own per same say says she should so some such take than that the their them then
    there these they this those three through to too two under up us use used very was we were what when where which
    while who whom whose why will with would yes yet you your
    known well answer answers question questions
    """
    )
)
"""Words that join others, and the labels of questions."""
_SLOT = "\0"
_BLOCK = re.compile(rf"\n\s*(?={_SLOT})|(?<={_SLOT})\s*\n")
"""A line break beside a slot, which may stand for many lines there."""
_TOKEN = re.compile(r"[^\W_]+|_+|[^\w\s]")
_ALIKE = str.maketrans({**dict.fromkeys("“”„«»‘’‚`", '"'), "'": '"', **dict.fromkeys("‐‑‒–—−", "-")})


@dataclass(frozen=True)
class Place:
    """Where a form's wording was found."""

    number: int
    """Number of the document, or of the row in which it begins."""
    excerpt: str
    """At most EXCERPT characters from there on, on one line."""


@dataclass(frozen=True)
class Wording:
    """Documents that hold the wording of one form."""

    found: int
    places: tuple[Place, ...]
    """The first ones."""


@dataclass(frozen=True)
class _Piece:
    """Runs of a template with slots between them, or the one that tells by itself."""

    points: int
    anchor: str
    """Its longest run of fixed characters, without spaces, which is quick to look for."""
    pattern: re.Pattern[str]


class WordingSearch:
    """Looks for the wording of forms in documents that pass by."""

    def __init__(self, templates: Mapping[str, Sequence[str]]) -> None:
        """``templates`` are those of str.format that render the items of each form."""
        pieces = {form: _pieces(of_form) for form, of_form in templates.items()}
        self._pieces = {
            form: of_form for form, of_form in pieces.items() if sum(piece.points for piece in of_form) >= TELLING
        }
        self._found = dict.fromkeys(self._pieces, 0)
        self._places: dict[str, list[Place]] = {form: [] for form in self._pieces}

    def passing(self, documents: Iterable[tuple[int, str]]) -> Iterator[str]:
        """The documents without their numbers, each looked through before it goes on."""
        for number, document in documents:
            plain = _plain(document)
            for form, start in self._found_in(plain):
                self._found[form] += 1
                if len(self._places[form]) < PLACES:
                    self._places[form].append(Place(number, _excerpt(plain[start:])))
            yield document

    @property
    def result(self) -> dict[str, Wording]:
        """What was found so far, by form; a form whose wording any text may hold cannot be found, and is not there."""
        return {form: Wording(self._found[form], tuple(places)) for form, places in self._places.items()}

    def _found_in(self, document: str) -> Iterator[tuple[str, int]]:
        """Forms whose wording the document has, with the character where it begins."""
        squeezed = _squeezed(document)
        for form, pieces in self._pieces.items():
            if (start := _first(document, [piece for piece in pieces if piece.anchor in squeezed])) is not None:
                yield form, start


def find_wording(templates: Mapping[str, Sequence[str]], documents: Iterable[tuple[int, str]]) -> dict[str, Wording]:
    """Per form, in which of the numbered documents its wording stands."""
    search = WordingSearch(templates)
    for _ in search.passing(documents):
        pass
    return search.result


def shared_wording(texts: Sequence[str]) -> tuple[str, ...]:
    """What all items of a task have in common, as templates: its wording, where no templates are known."""
    plain = sorted((_plain(text).casefold() for text in texts), key=len)
    if len(plain) < FEWEST_ITEMS:
        return ()
    tokens, *others = (_TOKEN.findall(text)[:MOST_TOKENS] for text in plain[:MOST_ITEMS])
    spaced = [f" {' '.join(other)} " for other in others]
    runs: list[str] = []
    start = 0
    while start < len(tokens):
        end = start
        while end < len(tokens) and all(f" {' '.join(tokens[start : end + 1])} " in other for other in spaced):
            end += 1
        runs.append(" ".join(tokens[start:end]).replace("{", "{{").replace("}", "}}"))
        start = max(end, start + 1)
    return tuple(run for run in runs if run)


def as_data(wordings: Mapping[str, Wording]) -> dict[str, dict[str, Any]]:
    """The result as JSON keeps it."""
    return {form: asdict(wording) for form, wording in wordings.items()}


def _first(document: str, pieces: Sequence[_Piece]) -> int | None:
    """Where a piece that tells by itself begins, or one of several that do together."""
    if sum(piece.points for piece in pieces) < TELLING:
        return None
    places = [(match.start(), piece) for piece in pieces for match in piece.pattern.finditer(document)]
    last: dict[_Piece, int] = {}
    for start, piece in sorted(places, key=lambda place: place[0]):
        last[piece] = start
        if piece.points >= TELLING:
            return start
        near = [other for other, place in last.items() if start - place <= WINDOW]
        if sum(other.points for other in near) >= TELLING:
            return last[max(near, key=lambda other: other.points)]
    return None


def _pieces(templates: Iterable[str]) -> tuple[_Piece, ...]:
    """What is looked for of one form, each once."""
    pieces: dict[str, _Piece] = {}
    for template in templates:
        slotted = "".join(text + _SLOT * (name is not None) for text, name, *_ in Formatter().parse(_plain(template)))
        for piece in _BLOCK.split(slotted):
            for runs in _parts(f" {piece.strip()} ".split(_SLOT)):
                points = _points(runs)
                if points >= LEAST:
                    pattern = _pattern(runs)
                    anchor = max(map(_squeezed, runs), key=len)
                    pieces[pattern] = _Piece(points, anchor, re.compile(pattern, re.IGNORECASE | re.DOTALL))
    return tuple(pieces.values())


def _parts(runs: Sequence[str]) -> list[list[str]]:
    """The runs of fixed characters that tell by themselves, each alone; all together where there is none."""
    return [[run] for run in runs if _points([run]) >= TELLING] or [list(runs)]


def _points(runs: Sequence[str]) -> int:
    """How little chance it takes to explain these runs, one after the other."""
    tokens = [token for run in runs for token in _TOKEN.findall(run.casefold())]
    words = [token for token in tokens if token.isalnum()]
    links = [word for word in words if word in LINKS or len(word) < SHORTEST]
    slots = sum(1 for run in runs if run.strip()) - 1
    marks = min(len(tokens) - len(words), MOST_MARKS)
    return WORD * (len(words) - len(links)) + LINK * len(links) + MARK * marks + FREE * max(slots, 0)


def _pattern(runs: Sequence[str]) -> str:
    """A regular expression for these runs with slots between them."""
    fixed = [(run, _TOKEN.findall(run)) for run in runs if run.strip()]
    pattern = ""
    for index, (run, tokens) in enumerate(fixed):
        before, after = (
            r"\s*" if not token.isalnum() else r"\s+" if edge.isspace() else ""
            for token, edge in ((tokens[0], run[0]), (tokens[-1], run[-1]))
        )
        if index > 0:
            pattern += f".{{1,{SLOT}}}?{before}"
        elif before == r"\s+":
            pattern += r"(?<!\w)"
        for token, following in pairwise(tokens):
            pattern += re.escape(token) + (r"\s+" if token.isalnum() and following.isalnum() else r"\s*")
        pattern += re.escape(tokens[-1])
        if index < len(fixed) - 1:
            pattern += after
        elif after == r"\s+":
            pattern += r"(?!\w)"
    return pattern


def _plain(text: str) -> str:
    """In one Unicode form, with one kind of quotation marks and dashes."""
    return (text if text.isascii() else unicodedata.normalize("NFKC", text)).translate(_ALIKE)


def _squeezed(text: str) -> str:
    return "".join(text.casefold().split())


def _excerpt(text: str) -> str:
    plain = " ".join(text[: 2 * EXCERPT].split())
    return plain if len(plain) <= EXCERPT else f"{plain[: EXCERPT - 3]}..."
