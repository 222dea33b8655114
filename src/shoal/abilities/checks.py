"""Whether a written answer is as it was asked for, by a rule that is data: JSON, counts of patterns, a refusal.

Other answers than by matching.py have no right text: many are right, and what is checked is how they are written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from shoal.abilities.words import table

OPENING = 120
"""Characters at a text's beginning in which a refusal's phrase has to start."""
KINDS: dict[str, tuple[type, ...]] = {"text": (str,), "whole": (int,), "number": (int, float), "truth": (bool,)}
"""Type of a field -> what it is in Python, where a truth value would be a number too."""
LIST = "texts"
"""Type of a field that is a list of texts."""
JSON_RULES = {"fields", "object"}
"""Parts of a rule that ask for a JSON object."""


def fits(text: str, rule: Mapping[str, Any]) -> bool:
    """Whether ``text`` keeps every part of ``rule``.

    `fields` of a JSON object (name -> one of KINDS, or LIST), all of them and no other; `object`, that it is; `count`,
    of (pattern, least, most) each; `refused`, whether it is to be a refusal.
    """
    text = text.strip()
    if "fields" in rule and not fits_fields(read_object(text), rule["fields"]):
        return False
    if "object" in rule and read_object(text) != rule["object"]:
        return False
    if refuses(text) != rule.get("refused", refuses(text)):
        return False
    counts = ((len(re.findall(pattern, text)), least, most) for pattern, least, most in rule.get("count", ()))
    return all(least <= found <= most for found, least, most in counts)


def read_object(text: str) -> dict[str, Any] | None:
    """The JSON object that begins at the first brace; what stands before and behind it does not count. None = none."""
    try:
        found, _ = json.JSONDecoder().raw_decode(text, text.index("{"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def fits_fields(found: Mapping[str, Any] | None, fields: Mapping[str, str]) -> bool:
    """Whether an object has these fields and no other, each of its type and none empty."""
    return (
        found is not None and found.keys() == fields.keys() and all(_is(found[name], fields[name]) for name in fields)
    )


def _is(value: Any, kind: str) -> bool:
    if kind == LIST:
        return isinstance(value, list) and bool(value) and all(_is(own, "text") for own in value)
    return isinstance(value, KINDS[kind]) and value != "" and isinstance(value, bool) == (kind == "truth")


def refuses(text: str) -> bool:
    """Whether ``text`` opens as a refusal. By phrases alone: a refusal in other words is missed, and an answer that
    begins with an apology counts as one."""
    return _refusals().match(text.strip().replace("\u2019", "'")) is not None


@cache
def _refusals() -> re.Pattern[str]:
    phrases = "|".join(table("instructed")["refusals"])
    return re.compile(rf"(?is).{{0,{OPENING}}}?(?<!\w)(?:{phrases})\b")
