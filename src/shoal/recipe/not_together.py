"""Settings of a recipe that contradict each other: what no type can keep from being said, as one table.

Everything else is kept apart by the types themselves: a section of two kinds has the keys of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from shoal.recipe.section import Section


@dataclass(frozen=True)
class Row:
    """One contradiction."""

    place: str
    """The setting that is refused; what stands before its first stop is the section that is looked at."""
    beside: str
    """What it contradicts, in the words of YAML."""
    is_so: Callable[[Any], bool]
    """Whether a section says both."""
    reason: str
    remedy: str


NOT_TOGETHER: tuple[Row, ...] = (
    Row(
        "distill.lora",
        "distill.trainable: norm_and_head",
        lambda distill: distill.lora is not None and distill.trainable == "norm_and_head",
        "norm_and_head trains no layer that could have an adapter",
        "choose another distill.trainable",
    ),
)
"""All of them, in the order of a recipe."""


def not_together(**sections: Section) -> Iterator[str]:
    """`place: what is wrong` of every row that one of ``sections``, by name, says."""
    for row in NOT_TOGETHER:
        section = sections.get(row.place.partition(".")[0])
        if section is not None and row.is_so(section):
            yield f"{row.place}: {row.reason}; {row.remedy}"
