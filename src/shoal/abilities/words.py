"""Everyday words from which keys, people, things and places are drawn; the tables that all abilities are made of are
YAML beside this module."""

from functools import cache
from pathlib import Path
from typing import Any

from shoal.yaml_text import read_yaml


@cache
def table(name: str) -> dict[str, Any]:
    """The table of this name: `words`, `facts` or `forms`."""
    return read_yaml(Path(__file__).with_name(f"{name}.yaml").read_text(encoding="utf-8"))


KEYS, NAMES, THINGS, OBJECTS, PLACES = (
    tuple(table("words")[kind].split()) for kind in ("keys", "names", "things", "objects", "places")
)
COMPARISONS: list[tuple[str, str, str]] = [(more, most, least) for more, most, least in table("words")["comparisons"]]
