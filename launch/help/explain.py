"""`shoal explain`: what a key of a recipe means, its default and what it may be.

All of it is pydantic's JSON schema of the sections, whose descriptions are the docstrings of the keys.
"""

from __future__ import annotations

import argparse
import difflib
import re
import textwrap
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import yaml
from pydantic import TypeAdapter

from shoal.errors import UserError
from shoal.formatting import listed
from shoal.recipe.field_words import field_word
from shoal.recipe.gone import gone
from shoal.recipe.keys import documented
from shoal.recipe.recipe import Recipe
from shoal.recipe.section import TOO_LARGE, Section

WIDTH = 120
"""Columns of a text for a terminal."""
UNBROKEN: dict[str, Any] = {"break_on_hyphens": False, "break_long_words": False}
"""Lines are broken between words only, so that names can be copied."""
CLOSE = 5
"""Keys that are named, at most, of those that a wrong one may mean."""
WORDS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}
"""Type -> what a YAML file gives for it."""
LIMITS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


@cache
def schema() -> dict[str, Any]:
    """The JSON schema of a recipe, described by the docstrings of its keys."""
    whole = TypeAdapter(Recipe).json_schema()
    for section in (Recipe, *_below(Section)):
        keys = (whole if section is Recipe else whole["$defs"].get(section.__name__, {})).get("properties", {})
        for key, said in documented(section).items():
            if key in keys:
                keys[key]["description"] = said
    return whole


def _below(section: type) -> Iterator[type]:
    """Every class that is made of ``section``."""
    for each in section.__subclasses__():
        yield each
        yield from _below(each)


def places(section: Any = None, before: str = "", alone: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every key of a recipe with all sections it is in, those of a section after it, and its schema.

    Of a section that is one of several kinds, the kind stands for its position, and is a place of its own.
    """
    section = section or schema()
    for key, own in section["properties"].items():
        yield before + key, {**own, "is_required": alone and key in section.get("required", ())}
        # what distill.data.losses holds is listed under distill.losses
        inner = [] if before + key == "distill.data.losses" else sections_of(own)
        has_kinds, of_types = len(inner) > 1 and all(map(kind_of, inner)), dict[str, dict[str, Any]]()
        for part in inner:
            if has_kinds:
                yield f"{before}{key}.{kind_of(part)}", part
                yield from places(part, f"{before}{key}.{kind_of(part)}.")
            else:
                of_types |= places(part, f"{before}{key}.", alone=len(inner) == 1)
        yield from of_types.items()


def kind_of(part: dict[str, Any]) -> str:
    """What tells one of several kinds of a section: its `kind`, else the keys that it alone needs."""
    kind = part["properties"].get("kind", {}).get("const")
    return kind or "+".join(part.get("required", ()))


def found(place: str) -> tuple[dict[str, dict[str, Any]], str]:
    """The places that ``place`` may mean, and what stands after them: an entry of a plain mapping. Positions in lists
    and kinds may be left out.

    Raises:
        UserError: there is no such key.
    """
    wanted, known = re.sub(r"\.\d+(?=\.|$)", "", place), dict(places())
    kinds = "|".join(re.escape(name.rpartition(".")[2]) for name, own in known.items() if "properties" in own)
    several = {name: own for name, own in known.items() if wanted in (name, re.sub(rf"\.({kinds})(?=\.)", "", name))}
    if len({meaning(own) + values_text(own) for own in several.values()}) == 1:
        return {wanted: next(iter(several.values()))}, ""
    if several:
        return several, ""
    parts = wanted.split(".")
    for parent, entry in ((".".join(parts[:end]), ".".join(parts[end:])) for end in range(len(parts) - 1, 0, -1)):
        if "additionalProperties" in str(known.get(parent)) and "properties" not in known[parent]:
            return {parent: known[parent]}, entry
    raise _unknown(place, list(known))


def _unknown(place: str, known: list[str]) -> UserError:
    if words := gone(place):
        return UserError(f"explain: {place}: {words}")
    ends, word = {other: other.rpartition(".")[2] for other in known}, place.rpartition(".")[2]
    if (here := field_word(word)) and word not in ends.values():
        return UserError(f"explain: a recipe has no key {place!r}; here it is {here}")
    leaf = difflib.get_close_matches(word, set(ends.values()), n=1, cutoff=0.7)
    of_that_name = [other for other, end in ends.items() if end in leaf]
    close = difflib.get_close_matches(place, of_that_name, n=CLOSE, cutoff=0)
    otherwise = "`shoal explain` lists the sections, and `shoal list` the names for them: tasks, metrics, losses"
    hint = f"did you mean {listed(close, 'or')}?" if close else otherwise
    return UserError(f"explain: a recipe has no key {place!r}; {hint}")


def explanation(place: str | None) -> list[dict[str, Any]]:
    """Everything there is to say of the key ``place``, JSON-ready, for each place that it may mean; None = of the whole
    recipe."""
    several, entry = ({"": schema()}, "") if place is None else found(place)
    told = []
    for name, own in several.items():
        is_section = "properties" in own
        said: dict[str, Any] = {"key": name, "meaning": meaning(own)}
        said |= {} if is_section else {"values": values_text(own), "default": default_text(own)}
        said |= {"entry": f"{entry} is an entry of this mapping"} if entry else {}
        inner = [own] if is_section else sections_of(own)
        if len(inner) > 1 and all(map(kind_of, inner)):
            said["kinds"] = {kind_of(part): meaning(part) for part in inner}
        elif inner:
            said["keys"] = {key: words for part in inner for key, words in _keys(part, len(inner) == 1).items()}
        told.append(said)
    return told


def told(asked: argparse.Namespace) -> Any:
    """What `shoal explain` prints."""
    if asked.as_json:
        return explanation(asked.key)
    texts = []
    for said in explanation(asked.key):
        lines = [said["key"]] if said["key"] else []
        lines += textwrap.wrap(said["meaning"], WIDTH, **UNBROKEN)
        if facts := [(name, said[name]) for name in ("values", "default", "entry") if name in said]:
            lines += ["", *table(facts)]
        for name, head in (("kinds", "kinds:"), ("keys", "keys, with their defaults:")):
            lines += ["", head, *table(said[name].items())] if name in said else []
        texts.append("\n".join(lines))
    return "\n\n".join(texts)


def table(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Lines of names and what is said of each, wrapped beside it."""
    rows = list(rows)
    width = min(30, max((len(name) for name, _ in rows), default=0))
    lines: list[str] = []
    for name, words in rows:
        first = f"  {name:<{width}}  "
        lines += textwrap.wrap(words, WIDTH, initial_indent=first, subsequent_indent=" " * (width + 4), **UNBROKEN)
    return lines


def meaning(own: dict[str, Any]) -> str:
    """What the docstring of a key or a section says, in one line and in the words of YAML."""
    said = own.get("description") or next((part["description"] for part in sections_of(own)), "")
    return re.sub(r"\bNone\b", "null", " ".join(said.split())).replace("``", "`")


def first_sentence(text: str) -> str:
    """A paragraph up to the end of its first sentence, without the stop."""
    return re.split(r"(?<=[^.])\.(?: (?=[A-Z`])|$)", text, maxsplit=1)[0]


def as_yaml(value: Any) -> str:
    """A plain value in one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def values_text(own: dict[str, Any]) -> str:
    """What a key may be given: `whole number > 0 or null`, `[text, ...]`."""
    if isinstance(own, dict) and "$ref" in own:
        return "a mapping of its keys"
    if several := own.get("anyOf") or own.get("oneOf"):
        return listed(dict.fromkeys(map(values_text, several)), "or")
    if "enum" in own or "const" in own:
        return listed(map(as_yaml, own.get("enum", [own.get("const")])), "or")
    if own.get("type") == "array":
        entries = ", ".join(map(values_text, own.get("prefixItems", ())))  # of a list of so many
        return f"[{entries or values_text(own.get('items', {})) + ', ...'}]"
    if own.get("type") == "object":
        inner = own.get("additionalProperties")
        return f"{{name: {values_text(inner) if isinstance(inner, dict) else 'anything'}}}"
    limits = [f"{sign} {own[name]:.12g}" for name, sign in LIMITS.items() if name in own and own[name] != TOO_LARGE]
    return " ".join([WORDS.get(own.get("type", ""), "anything"), *([" and ".join(limits)] if limits else [])])


def _keys(section: dict[str, Any], alone: bool) -> dict[str, str]:
    """Key -> its meaning in a line or two, and its default; of a section that is not ``alone`` no key must be given."""
    told = {}
    for key, own in section["properties"].items():
        default = default_text({**own, "is_required": alone and key in section.get("required", ())})
        told[key] = (first_sentence(meaning(own)) + ("" if "$ref" in own else f" [{default}]")).strip()
    return told


def default_text(own: dict[str, Any]) -> str:
    """The default of a key, in a line of YAML."""
    if own.get("is_required"):
        return "must be given"
    if own.get("default", "") != "":
        return as_yaml(own["default"])
    return "absent section" if sections_of(own) else "none"


def sections_of(own: Any) -> list[dict[str, Any]]:
    """Schemas of the sections that a key holds; none where it is a plain value."""
    if not isinstance(own, dict | list):
        return []
    if isinstance(own, dict) and "$ref" in own:
        return [schema()["$defs"][own["$ref"].rpartition("/")[2]]]
    inner = own if isinstance(own, list) else [each for name, each in own.items() if name != "properties"]
    found = [part for each in inner for part in sections_of(each)]
    return [part for index, part in enumerate(found) if part not in found[:index]]
