"""Keys, kinds and values that recipes once knew: since when they are gone, and what to write instead."""

from __future__ import annotations

import re

from shoal.yaml_text import own_yaml

GONE: dict[str, str] = own_yaml(__file__)
"""Key without positions in lists, kind (`distill.losses.value_relation`) or value (`distill.trainable.replacement`) ->
the end of the sentence `KEY: gone since 0.1; ...`, or `-> KEY` or `-> KEY = VALUE` where a word changes. What else is
to be said stands behind a semicolon."""


def gone(place: str) -> str | None:
    """What is said of ``place``, a key, kind or value of an older recipe, or else of its section; None = it never was
    one."""
    place = re.sub(r"\.\d+(?=\.|$)", "", place)
    words = GONE.get(place) or GONE.get(place.partition(".")[0])
    if words is None:
        return None
    return "removed before 0.1; " + (f"write {words[3:].replace(' =', ':')}" if words.startswith("-> ") else words)
