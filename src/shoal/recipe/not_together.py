"""Settings of a recipe that contradict each other: what no type can keep from being said, as one table.

Everything else is kept apart by the types themselves: a section of two kinds has the keys of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from shoal.recipe.distill import Distill, Recorded
from shoal.recipe.losses import StateTerm, from_top_k, temperatures
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


def _is_recorded(distill: Distill) -> bool:
    return isinstance(distill.teacher, Recorded)


def _asks_too_much_of_vllm(distill: Distill) -> bool:
    teacher, states = distill.teacher, any(isinstance(term, StateTerm) for term in distill.losses)
    if not isinstance(teacher, Recorded) or teacher.backend != "vllm":
        return False
    return teacher.prefix or states or distill.recorded_temperature != 1


NOT_TOGETHER: tuple[Row, ...] = (
    Row(
        "distill.lora",
        "distill.trainable: norm_and_head",
        lambda distill: distill.lora is not None and distill.trainable == "norm_and_head",
        "norm_and_head trains no layer that could have an adapter",
        "choose another distill.trainable",
    ),
    Row(
        "distill.on_policy",
        "distill.teacher: recorded",
        lambda distill: _is_recorded(distill) and distill.on_policy is not None and distill.on_policy.share > 0,
        "nothing is recorded of what the student will write",
        "set distill.teacher: live, or leave it out",
    ),
    Row(
        "distill.teacher",
        "distill.data: a source of images",
        lambda distill: _is_recorded(distill) and distill.has_images,
        "what a teacher says of images is not recorded",
        "set it to live, or leave the source out",
    ),
    Row(
        "distill.losses",
        "distill.teacher: recorded, and adaptive_kl, dkd or taid",
        lambda distill: _is_recorded(distill) and not all(map(from_top_k, distill.losses)),
        "a recorded teacher tells its most probable tokens only, and adaptive_kl, dkd and taid need all",
        "take others, or set distill.teacher: live",
    ),
    Row(
        "distill.losses",
        "distill.teacher: recorded, and terms of several temperatures",
        lambda distill: _is_recorded(distill) and len(temperatures(distill.losses)) > 1,
        "a teacher is recorded at one temperature, and the terms have several",
        "give all the same, or set distill.teacher: live",
    ),
    Row(
        "distill.teacher.backend",
        "distill.teacher.prefix, hidden_states, or a temperature other than 1",
        _asks_too_much_of_vllm,
        "vLLM tells log-probabilities at temperature 1 and no state of a layer, which prefix and hidden_states need",
        "leave these out, or set it to transformers",
    ),
)
"""All of them, in the order of a recipe."""


def not_together(**sections: Section) -> Iterator[str]:
    """`place: what is wrong` of every row that one of ``sections``, by name, says."""
    for row in NOT_TOGETHER:
        section = sections.get(row.place.partition(".")[0])
        if section is not None and row.is_so(section):
            yield f"{row.place}: {row.reason}; {row.remedy}"
