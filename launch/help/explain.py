"""`shoal explain`: what a key of a recipe means, its default and what it may be."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterable
from typing import Any

from shoal.formatting import listed
from shoal.recipe.distill_contradictions import REFUSED_ARGUMENTS
from shoal.recipe.recipe import Recipe
from shoal.recipe.section import Section

from .settings import Setting, as_paragraph, as_yaml, find, first_sentence, kind_of, settings_of

WIDTH = 120
"""Columns of a text for a terminal."""
UNBROKEN: dict[str, Any] = {"break_on_hyphens": False, "break_long_words": False}
"""Lines are broken between words only, so that names can be copied."""


def explanation(place: str | None) -> list[dict[str, Any]]:
    """Everything there is to say of the key ``place``, JSON-ready: of each setting that it may mean, and of the
    sections that stand there; None = of the whole recipe.

    Raises:
        UserError: a recipe has no such key.
    """
    if place is None:
        return [{"key": "", "meaning": as_paragraph(Recipe.__doc__ or ""), "keys": _keys([Recipe])}]
    settings, sections, entry = find(place)
    if not settings:  # a kind
        return [{"key": place, "meaning": _said(section), "keys": _keys([section])} for section in sections]
    told: dict[str, dict[str, Any]] = {}
    for setting in settings:
        description = _of_setting(setting)
        told.setdefault(str([description[name] for name in ("meaning", "values", "default")]), description)
    if len(told) == 1 and len(settings) > 1:
        next(iter(told.values()))["key"] = place
    for description in told.values():
        if entry:
            description["entry"] = _of_entry(description["key"], entry)
        if len(sections) > 1:
            description["kinds"] = {str(kind_of(section)): _said(section) for section in sections}
        elif sections:
            description["keys"] = _keys(sections)
    return list(told.values())


def explained(place: str | None) -> str:
    """The explanation for a reader.

    Raises:
        UserError: a recipe has no such key.
    """
    return "\n\n".join("\n".join(_lines(part)) for part in explanation(place))


def table(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Lines of names and what is said of each, wrapped beside it."""
    rows = list(rows)
    width = min(30, max((len(name) for name, _ in rows), default=0))
    lines: list[str] = []
    for name, words in rows:
        first = f"  {name:<{width}}  "
        lines += textwrap.wrap(words, WIDTH, initial_indent=first, subsequent_indent=" " * (width + 4), **UNBROKEN) or [
            first.rstrip()
        ]
    return lines


def _of_setting(setting: Setting) -> dict[str, Any]:
    return {
        "key": setting.place,
        "meaning": setting.meaning,
        "values": setting.values,
        "required": setting.is_required,
        "default": setting.default,
        "shapes": setting.shapes,
    }


def _of_entry(place: str, entry: str) -> str:
    """What is known of one entry of a plain mapping."""
    if place == "distill.trainer" and entry in REFUSED_ARGUMENTS:
        return f"{entry} {REFUSED_ARGUMENTS[entry]}"
    return f"{entry} is an entry of this mapping"


def _said(section: type[Section]) -> str:
    return as_paragraph(inspect.getdoc(section) or "")


def _keys(sections: list[type[Section]]) -> dict[str, dict[str, Any]]:
    """Key -> its meaning and default, of one class of sections."""
    own = (setting for section in sections for setting in settings_of(section))
    return {each.key: {"meaning": each.meaning, "required": each.is_required, "default": each.default} for each in own}


def _lines(description: dict[str, Any]) -> list[str]:
    lines = [description["key"]] if description["key"] else []
    lines += textwrap.wrap(description["meaning"], WIDTH, **UNBROKEN)
    if "values" in description:
        facts = [("values", description["values"]), ("default", _default_text(description))]
        facts += [("shapes", listed(description["shapes"]))] if description["shapes"] else []
        facts += [("entry", description["entry"])] if "entry" in description else []
        lines += ["", *table(facts)]
    if "kinds" in description:
        lines += ["", "kinds:", *table(description["kinds"].items())]
    if "keys" in description:
        rows = ((key, _in_short(said)) for key, said in description["keys"].items())
        lines += ["", "keys, with their defaults:", *table(rows)]
    return lines


def _in_short(said: dict[str, Any]) -> str:
    """A key in a line or two; sections have defaults of their own."""
    meaning = first_sentence(said["meaning"])
    return meaning if said["default"] == {} else f"{meaning} [{_default_text(said)}]"


def _default_text(said: dict[str, Any]) -> str:
    if said["required"]:
        return "must be given"
    return as_yaml(said["default"]) if said["default"] != "" else "left out"
