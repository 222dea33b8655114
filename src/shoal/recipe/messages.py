"""Why a recipe is refused: pydantic's problems by their place in the recipe, in the words of YAML."""

from __future__ import annotations

import dataclasses
import difflib
import re
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import ValidationError

from shoal.errors import UserError
from shoal.recipe.gone import gone
from shoal.recipe.section import Section, adapter
from shoal.redaction import redacted, redacted_arguments

S = TypeVar("S", bound=Section)

NOT_HERE = {
    "image": "data holds text alone here: images are learnt from (distill.data), and measured by `shoal lab vision`"
}
"""Keys that are asked for where shoal has nothing for them -> what it has."""
WORDS = {
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number, got a number with a fractional part",
    "float_type": "must be a number",
    "bool_type": "must be a boolean",
    "string_type": "must be a string",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping of settings",
    "dataclass_type": "must be a mapping of settings",
    "model_attributes_type": "must be a mapping of settings",
}
"""What is said instead of pydantic's message, by the problem's type: who writes YAML never heard of a tuple."""


def checked(
    kind: type[S],
    values: Any,
    *,
    source: str,
    overrides: Sequence[str] = (),
    contradictions: Callable[[S], Iterable[str]] = lambda section: (),
) -> S:
    """The section ``kind`` that a plain mapping describes.

    ``contradictions`` gives `place: what is wrong` of what single fields cannot express; ``overrides`` are already in
    ``values``.

    Raises:
        UserError: naming every problem, each after ``source`` or the override that has set its place.
    """
    try:
        section = adapter(kind).validate_python(values)
    except ValidationError as error:
        raise UserError(blamed(explained(error.errors(), kind), source, overrides)) from error
    if problems := list(contradictions(section)):
        raise UserError(blamed(problems, source, overrides))
    return section


def of_arguments(
    kind: type[S],
    given: Mapping[str, Any],
    *,
    taken: Collection[str],
    source: str,
    contradictions: Callable[[S], Iterable[str]] = lambda section: (),
) -> S:
    """The section ``kind`` that the arguments ``given`` of the function ``source`` describe, which has a use for the
    keys ``taken``.

    Raises:
        UserError: as checked does; a key that only a run directory has a use for.
    """
    section: Any = kind
    known = {field.name for field in dataclasses.fields(section)}
    if useless := [name for name in given if name in known and name not in taken]:
        raise UserError(
            f"{source}: {useless[0]}: is for run directories, and has no use for a model in memory; leave it out, or "
            "give a whole recipe to shoal.run"
        )
    return checked(kind, given, source=source, contradictions=contradictions)


def blamed(problems: Sequence[str], source: str, overrides: Sequence[str]) -> str:
    """Every problem after what has set its place: the last override of it or of what it is in, else ``source``."""
    lines = []
    for problem in problems:
        place = problem.partition(":")[0]
        keys = [override.partition("=")[0] for override in overrides]
        # a section that nobody knows is there because an override has named a key in it, or because the file has
        sets = _is_in if ": unknown key" not in problem else _is_in_either
        setters = [override for override, key in zip(overrides, keys, strict=True) if sets(place, key)]
        lines.append(f"{quoted(setters[-1])}: {problem}" if setters else f"{source}: {problem}")
    return "\n".join(lines)


def _is_in(place: str, key: str) -> bool:
    return f"{place}.".startswith(f"{key}.")


def _is_in_either(place: str, key: str) -> bool:
    return _is_in(place, key) or _is_in(key, place)


def quoted(override: str) -> str:
    """An override as messages name it, without secrets."""
    return f"override {redacted_arguments([override])[0]!r}"


def explained(problems: Sequence[Any], root: type[Section]) -> list[str]:
    """`place: what is wrong (got value)` of pydantic's problems with a section ``root``, one line per place.

    The branches of a choice between types are joined with `or`.
    """
    places: dict[str, list[str]] = {}
    got: dict[str, str] = {}
    for problem in problems:
        place, message, value = _told(problem, root)
        if problem["type"] == "too_short" and any(_is_inside(other["loc"], problem["loc"]) for other in problems):
            continue  # wrong entries are not counted, so that a list of them alone seems to be empty
        places.setdefault(place, []).append(message)
        if value:
            got[place] = value
    told = {place: f"{' or '.join(messages)}{got.get(place, '')}" for place, messages in places.items()}
    return [f"{place}: {words}" if place else words for place, words in told.items()]


def _told(problem: Any, root: type[Section]) -> tuple[str, str, str]:
    """The place of a problem, what is wrong there, and the value that was given where that says something."""
    *parents, last = problem["loc"] or ("",)
    if problem["type"] == "unexpected_keyword_argument":
        keys, sections = _walk(parents, root)
        known = [field.name for section in sections for field in dataclasses.fields(section)]
        close = difflib.get_close_matches(str(last), known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(known)}"
        place = _joined([*keys, last])
        return place, gone(place) or f"unknown key; {NOT_HERE.get(str(last), hint)}", ""
    keys, sections = _walk(problem["loc"], root)
    place = _joined(keys)
    match problem["type"]:
        case "missing" | "missing_argument":
            return place, f"is required; add it to the file, or to the command as {place}=VALUE", ""
        case "union_tag_not_found":
            kinds = [get_args(get_type_hints(section)["kind"])[0] for section in sections]
            return place, f"needs a kind: one of {', '.join(kinds)}", ""
        case "union_tag_invalid":
            expected, tag = problem["ctx"]["expected_tags"], problem["ctx"]["tag"]
            if words := gone(f"{place}.{tag}"):
                return f"{place}.{tag}", words, ""
            close = difflib.get_close_matches(tag, re.findall(r"'(.*?)'", expected), n=1, cutoff=0.6)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            # all of them: the closest in spelling may not be what was meant
            return f"{place}.kind", f"must be one of {expected}", f" (got {tag!r}{hint})"
        case "literal_error" if words := gone(f"{place}.{problem['input']}"):
            return f"{place}.{problem['input']}", words, ""
        case "value_error":  # what a section says of itself
            return place, str(problem["ctx"]["error"]), ""
        case kind:
            value = reprlib.repr(redacted({last: problem["input"]})[last])
            form = ", as in '[13, 14]'" if kind == "tuple_type" and isinstance(problem["input"], str) else ""
            return place, demand(problem) + form, f" (got {value})"


def demand(problem: Any) -> str:
    """What one of pydantic's problems asks of a value, as what comes after the name of a setting."""
    return WORDS.get(problem["type"]) or _as_demand(problem["msg"])


def _as_demand(message: str) -> str:
    """Pydantic's "Input should be greater than 0" as what comes after the name of a setting."""
    message = re.sub(r"^(Input|Value|[Tt]uple|String) should ", "must ", message)
    return re.sub(r" after validation, not \d+", "", message)


def _joined(keys: Sequence[int | str]) -> str:
    return ".".join(map(str, keys))


def _is_inside(location: Sequence[int | str], outer: Sequence[int | str]) -> bool:
    return len(location) > len(outer) and tuple(location[: len(outer)]) == tuple(outer)


def _walk(location: Sequence[int | str], root: type[Section]) -> tuple[list[int | str], list[Any]]:
    """``location`` without the names of type branches that pydantic puts into it, and the sections it may end in."""
    sections: list[Any] = [root]
    keys: list[int | str] = []
    for part in location:
        if isinstance(part, int):
            keys.append(part)
            continue
        hints = [get_type_hints(section, include_extras=True) for section in sections]
        tagged = [section for section, hint in zip(sections, hints, strict=True) if part in get_args(hint.get("kind"))]
        if len(sections) > 1 and tagged:
            sections = tagged
        elif values := [hint[part] for hint in hints if part in hint]:
            keys.append(part)
            sections = [section for hint in values for section in sections_in(hint)]
    return keys, sections


def sections_in(hint: Any) -> list[Any]:
    """The classes of sections that a key of type ``hint`` may hold, itself or in a list."""
    if isinstance(hint, type) and issubclass(hint, Section):
        return [hint]
    return [section for argument in get_args(hint) for section in sections_in(argument)]
