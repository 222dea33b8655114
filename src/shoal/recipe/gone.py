"""Keys, kinds and values that recipes once knew: since when they are gone, and what to write instead."""

from __future__ import annotations

import re

GONE: dict[str, str] = {
    "search": "several runs and their comparison: `shoal run RECIPE --each prune.metric=a,b --each seed=0,1`",
}
"""Key without positions in lists (`distill.data.teacher`), kind (`distill.losses.value_relation`) or value
(`distill.trainable.replacement`) -> the end of the sentence `KEY: gone since 0.1; ...`, one line each, sorted."""


def gone(place: str) -> str | None:
    """What is said of ``place``, a key, kind or value of an older recipe; None = it never was one."""
    words = GONE.get(re.sub(r"\.\d+(?=\.|$)", "", place))
    return None if words is None else f"gone since 0.1; {words}"
