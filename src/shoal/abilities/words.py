"""Everyday words from which keys, people, things and places are drawn; the tables that all abilities are made of are
YAML beside this module."""

from functools import cache
from typing import Any

from shoal.yaml_text import own_yaml


@cache
def table(name: str) -> dict[str, Any]:
    """The table of this name: `words`, `facts` or `forms`."""
    return own_yaml(__file__, f"{name}.yaml")


KEYS, NAMES, THINGS, OBJECTS, PLACES = (
    tuple(table("words")[kind].split()) for kind in ("keys", "names", "things", "objects", "places")
)
COMPARISONS: list[tuple[str, str, str]] = [(more, most, least) for more, most, least in table("words")["comparisons"]]
