"""`shoal VERB --help`: the keys of the recipe as options, in a group for every section of the verb."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from shoal.recipe.keys import all_keys, alternatives, documented, short_name, type_at
from shoal.recipe.recipe import Recipe
from shoal.recipe.section import Section

from .explain import as_yaml, first_sentence, plain

NAMES = {int: "N", float: "X", str: "TEXT", bool: "true|false", dict: "{...}"}
"""Type -> what stands for a value of it."""
EPILOG = """Keys of a section in a section come after a stop: --lora.r 8. Every other key of the recipe is an option by
its whole name: --measure.num-tokens 1e6 says the same as measure.num_tokens=1e6. a,b is a list where a key may be one.
`shoal explain` lists and explains all keys."""
LONGEST = 40
"""Characters of all values of a key, written out."""


def add_keys(sub: argparse.ArgumentParser, sections: Sequence[str]) -> None:
    """Give the parser of a verb an option for every key of these sections, and for the recipe's own."""
    keys = list(all_keys())
    nested = {place.rpartition(".")[0] for place, _, _ in keys}
    for name in (*sections, ""):
        kind = next(alternatives(type_at(name))) if name else Recipe
        group = sub.add_argument_group(
            f"{name}: {first_sentence(plain(documented(Recipe).get(name) or kind.__doc__ or ''))}"
            if name
            else "of every verb"
        )
        for place, section, field in keys:
            if place.rpartition(".")[0] == name and (name or place not in nested):
                group.add_argument(
                    f"--{short_name(place, sections)}".replace("_", "-"),
                    metavar=value_name(type_at(place)),
                    dest=argparse.SUPPRESS,
                    help=_help(documented(section).get(field.name, ""), field).replace("%", "%%"),
                )
    sub.epilog = EPILOG


def _help(said: str, field: dataclasses.Field[Any]) -> str:
    """The first sentence of a key, and its default."""
    told = first_sentence(plain(said))
    default = field.default_factory() if callable(field.default_factory) else field.default
    if default is dataclasses.MISSING or isinstance(default, Section) or default in ("", ()):
        return told
    if isinstance(default, tuple):
        return f"{told} [{','.join(str(getattr(each, 'path', getattr(each, 'kind', each))) for each in default)}]"
    return f"{told} [{as_yaml(default)}]"


def value_name(hint: Any) -> str:
    """What stands for a value of this type."""
    names = []
    for kind in alternatives(hint):
        if get_origin(kind) is Literal:
            names += map(str, get_args(kind))
        elif get_origin(kind) is tuple:
            names.append(f"{value_name(get_args(kind)[0]).partition('|')[0].replace('{...}', 'NAME')},...")
        elif kind is not type(None):
            names.append(NAMES.get(get_origin(kind) or kind, "{...}"))
    text = "|".join(dict.fromkeys(names))
    return text if len(text) <= LONGEST else "NAME"
