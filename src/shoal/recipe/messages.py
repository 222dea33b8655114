"""Why a recipe is refused: pydantic's problems by their place in the recipe, in the words of YAML."""

from __future__ import annotations

import dataclasses
import itertools
import re
import reprlib
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import ValidationError

from shoal.errors import UserError
from shoal.formatting import listed, meant
from shoal.recipe.field_words import field_word
from shoal.recipe.gone import gone
from shoal.recipe.not_together import contradictions
from shoal.recipe.section import Section, adapter, plain_value, types_of
from shoal.redaction import redacted, redacted_arguments
from shoal.yaml_text import own_yaml

S = TypeVar("S", bound=Section)

MOST_NAMED = 10
"""Known keys that are named, at most, where an unknown one is like none of them."""
MOST_TOLD = 10
"""Problems that are told at once."""
WORDS: dict[str, str] = own_yaml(__file__)
"""What is said instead of pydantic's message, by the problem's type: who writes YAML never heard of a tuple."""
OTHER_VALUES = {"gpu": "cuda", "disabled": "off"}
"""What other tools call a value -> the one here."""


def checked(kind: type[S], values: Any, *, source: str, overrides: Sequence[str] = ()) -> S:
    """The section ``kind`` that a plain mapping describes; ``overrides`` are already in it.

    Raises:
        UserError: naming every problem, each after ``source`` or the override that has set its place.
    """
    try:
        section = adapter(kind).validate_python(plain_value(values))
    except ValidationError as error:
        raise UserError(blamed(explained(error.errors(include_url=False), kind), source, overrides)) from error
    if problems := list(itertools.islice(contradictions(section), MOST_TOLD)):
        raise UserError(blamed(problems, source, overrides))
    return section


def blamed(problems: Sequence[str], source: str, overrides: Sequence[str]) -> str:
    """Every problem after what has set its place: the last override of it or of what it is in, else ``source``."""
    lines = []
    for problem in problems:
        place, _, what = problem.partition(":")
        # a section that nobody knows is there because an override has named a key in it, or because the file has
        is_unknown = what.startswith(" unknown key")
        keys = {override: override.partition("=")[0] for override in overrides}
        setters = [each for each, key in keys.items() if _is_in(place, key) or (is_unknown and _is_in(key, place))]
        lines.append(f"{quoted(setters[-1]) if setters else source}: {problem}")
    return "\n".join(lines)


def _is_in(place: str, key: str) -> bool:
    return f"{place}.".startswith(f"{key}.")


def quoted(override: str) -> str:
    """An override as messages name it, without secrets."""
    return f"override {redacted_arguments([override])[0]!r}"


def explained(problems: Sequence[Any], root: type[Section]) -> list[str]:
    """`place: what is wrong (got value)` of pydantic's problems with a section ``root``, one line per place; of the
    first MOST_TOLD places, and how many more.

    The branches of a choice between types are joined with `or`.
    """
    places: dict[str, list[str]] = {}
    got: dict[str, str] = {}
    more: list[str] = []
    for number, problem in enumerate(problems):
        within = len(problem["loc"])
        if problem["type"] == "too_short" and any(
            len(other["loc"]) > within and other["loc"][:within] == problem["loc"] for other in problems
        ):
            continue  # wrong entries are not counted, so that a list of them alone seems to be empty
        beside = {other["type"] for other in problems if other["loc"][:-1] == problem["loc"][:-1]}
        if "missing" in problem["type"] and "unexpected_keyword_argument" in beside:
            continue  # most often that key is this one, by another name
        place, message, got_value = _told(problem, root)
        if place not in places and len(places) == MOST_TOLD:
            more = [f"and {len(problems) - number:,} more problems"]
            break
        places.setdefault(place, []).append(message)
        if got_value:
            got[place] = f" (got {got_value})"
    told = {place: f"{' or '.join(dict.fromkeys(messages))}{got.get(place, '')}" for place, messages in places.items()}
    return [*(f"{place}: {words}" if place else words for place, words in told.items()), *more]


def _told(problem: Any, root: type[Section]) -> tuple[str, str, str]:
    """The place of a problem, what is wrong there, and the value that was given where that says something."""
    kind, last = problem["type"], (problem["loc"] or ("",))[-1]
    keys, sections, others = _walk(problem["loc"], root)
    place = ".".join(map(str, keys))
    inside = problem["input"] if isinstance(problem["input"], dict) else {}
    match kind:
        case "unexpected_keyword_argument":
            beside, place = place, ".".join(map(str, [*keys, last]))
            if any(last in types_of(other) for other in others):
                [section] = sections
                own = next(field.name for field in dataclasses.fields(section) if field.default is dataclasses.MISSING)
                undone = f", or undo the other with {beside}.{own}=null" if own == "drop" else ""
                return place, f"excludes {beside}.{own}; give only one of them{undone}", ""
            known = list(dict.fromkeys(key for section in (*sections, *others) for key in types_of(section)))
            written = "" if str(last).isascii() else f", written {ascii(last)[1:-1]}"  # another o looks like an o
            return place, gone(place) or f"unknown key{written}; {meant_key(str(last), known, root)}", ""
        case "missing" | "missing_argument":
            return place, "is required; give it a value", ""
        case "union_tag_not_found":
            kinds = [get_args(get_type_hints(section)["kind"])[0] for section in sections]
            old = next((words for key in inside if (words := gone(f"{place}.{key}"))), None)
            return place, old or f"needs a kind: one of {', '.join(kinds)}", ""
        case "union_tag_invalid" | "literal_error":
            is_kind = kind == "union_tag_invalid"
            context = problem["ctx"]
            value, expected = context.get("tag", problem["input"]), context.get("expected_tags") or context["expected"]
            if words := gone(f"{place}.{value}"):
                return f"{place}.{value}", words, ""
            named = re.findall(r"'(.*?)'", expected)
            close = meant(OTHER_VALUES.get(str(value), str(value)), named, "", cutoff=0.6)
            # all of them: the closest in spelling may not be what was meant
            what = f"must be one of {expected}" if is_kind else demand(problem)
            return f"{place}.kind" if is_kind else place, what, "; ".join(filter(None, [_shown(last, value), close]))
        case "value_error":  # what a section says of itself
            return place, str(problem["ctx"]["error"]), ""
    if words := next(filter(None, (gone(f"{place}.{key}") for key in inside)), None):
        return place, words, ""
    form = ", as in '[13, 14]'" if kind == "tuple_type" and isinstance(problem["input"], str) else ""
    return place, demand(problem) + form, _shown(last, problem["input"])


def meant_key(word: str, known: Sequence[str], root: type[Section]) -> str:
    """What an unknown key may mean: the key that other tools call so, one that another section of ``root`` has, or the
    most alike of those ``known`` where it stands."""
    section, _, rest = word.partition(".")
    if rest and section in known:
        return f"a key in a section is nested: {section}: {{{rest}: ...}}"
    if get_close_matches(word.lower(), known, cutoff=0.8):
        return meant(word.lower(), known, "")
    if here := field_word(word):
        inside = f"{here}.{known[0]}"  # inside distill.data `dataset` can only mean what a source is: its path
        return f"here it is {known[0] if inside in all_places(root) else here}"
    elsewhere = [] if "kind" in known else [place for place in all_places(root) if place.endswith(f".{word}")]
    if elsewhere:
        return f"it is a key elsewhere: {listed(sorted(elsewhere, key=lambda place: place.count('.'))[:3], 'or')}"
    sought = sorted(known)  # what is as alike as another stands in the same order in every process
    close = sorted(get_close_matches(word, sought, n=MOST_NAMED, cutoff=0.0))
    nearest = known if len(known) <= MOST_NAMED else [*close, "..."]
    return meant(word, known, f"known keys are {', '.join(nearest)}")


@cache
def all_places(section: Any, before: str = "") -> tuple[str, ...]:
    """Every key of a class of sections, with those of the sections in it."""
    keys = [(before + key, sections_in(hint)) for key, hint in types_of(section).items()]
    inner = (place for key, sections in keys for each in sections for place in all_places(each, f"{key}."))
    return tuple(dict.fromkeys([*(key for key, _ in keys), *inner]))


def _shown(key: int | str, value: Any) -> str:
    """A value without secrets, not too long."""
    return reprlib.repr(redacted({key: value})[key])


def demand(problem: Any) -> str:
    """What one of pydantic's problems asks of a value, as what comes after the name of a setting."""
    message = re.sub(r"^(Input|Value|[Tt]uple|String) should ", "must ", problem["msg"])
    return WORDS.get(problem["type"]) or re.sub(r" after validation, not \d+", "", message)


def _walk(location: Sequence[int | str], root: type[Section]) -> tuple[list[int | str], list[Any], list[Any]]:
    """``location`` without the names of type branches that pydantic puts into it, the sections it may end in, and those
    that could stand in the place of the one it ends in, where their keys tell them apart."""
    sections: list[Any] = [root]
    others: list[Any] = []
    keys: list[int | str] = []
    for part in location:
        if isinstance(part, int):
            keys.append(part)
            continue
        tagged = [section for section in sections if part in get_args(get_type_hints(section).get("kind"))]
        named = [section for section in sections if section.__name__ == part]  # the tag of a type without a kind
        if len(sections) > 1 and (tagged or named):
            others = [section for section in sections if section not in named] if named else []
            sections = tagged or named
        elif values := [types[part] for types in map(types_of, sections) if part in types]:
            keys.append(part)
            others = []
            sections = [section for hint in values for section in sections_in(hint)]
    return keys, sections, others


def sections_in(hint: Any) -> list[Any]:
    """The classes of sections that a key of type ``hint`` may hold, itself or in a list."""
    if isinstance(hint, type) and issubclass(hint, Section):
        return [hint]
    return [section for argument in get_args(hint) for section in sections_in(argument)]
