"""`shoal VERB --help`: the keys of the recipe as options, in a group for every section of the verb."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from shoal.recipe.keys import short_name

from .explain import as_yaml, first_sentence, meaning, places, sections_of

NAMES = {"integer": "N", "number": "X", "string": "TEXT", "boolean": "true|false", "object": "{...}"}
"""Type -> what stands for a value of it."""
EPILOG = """Keys of a nested section have a dot: --sweep.limit 50. Keys of other sections have their full name:
--distill.num-tokens 1e6 means distill.num_tokens=1e6. For a key that takes a list, write a,b.
`shoal explain` lists and explains all keys."""
LONGEST = 40
"""Characters of all values of a key, written out."""


def add_keys(sub: argparse.ArgumentParser, sections: Sequence[str]) -> None:
    """Give the parser of a verb an option for every key of these sections, and for the recipe's own."""
    known = dict(places())
    for name in (*sections, ""):
        about = f"{name}: {first_sentence(meaning(known[name]))}" if name else "for every command"
        group = sub.add_argument_group(about)
        for place, own in known.items():
            is_own = place.rpartition(".")[0] == name and "properties" not in own
            if is_own and (name or not ("$ref" in own or sections_of(own))):
                group.add_argument(
                    f"--{short_name(place, sections)}".replace("_", "-"),
                    metavar=value_name(own),
                    dest=argparse.SUPPRESS,
                    help=_help(own).replace("%", "%%"),
                )
    sub.epilog = EPILOG


def _help(own: dict[str, Any]) -> str:
    """The first sentence of a key, and its default."""
    told, default = first_sentence(meaning(own)), own.get("default")
    several = default if isinstance(default, list) else [default]
    short = [each.get("path") or each.get("kind") if isinstance(each, dict) else each for each in several]
    named = [as_yaml(each) for each in short if each not in (None, "")]
    return f"{told} [{', '.join(named)}]" if named else told


def value_name(own: dict[str, Any]) -> str:
    """What stands for a value of a key."""
    names = []
    for kind in own.get("anyOf") or own.get("oneOf") or [own]:
        if "enum" in kind or "const" in kind:
            names += map(str, kind.get("enum", [kind.get("const")]))
        elif kind.get("type") == "array":
            entry = value_name(kind.get("items") or kind["prefixItems"][0]).partition("|")[0]
            names.append(f"{entry.replace('{...}', 'NAME')},...")
        elif kind.get("type") != "null":
            names.append(NAMES.get(kind.get("type", "object"), "{...}"))
    text = "|".join(dict.fromkeys(names))
    return text if len(text) <= LONGEST else "NAME"
