"""What settings of a recipe must not say together: what no type can keep from being said.

Everything else is kept apart by the types themselves: a section of two kinds has the keys of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from shoal.recipe import losses
from shoal.recipe.distill import Distill, Recorded
from shoal.recipe.losses import HiddenStates, from_top_k, reads_distributions, temperatures
from shoal.recipe.measure import Measure
from shoal.recipe.prune import Compensate, Cut, CutByScore, CutThese, Width
from shoal.recipe.section import Section
from shoal.recipe.trainer_arguments import wrong_arguments
from shoal.yaml_text import own_yaml


def _is_recorded(distill: Distill) -> bool:
    return isinstance(distill.teacher, Recorded)


def _asks_too_much_of_vllm(distill: Distill) -> bool:
    teacher, states = distill.teacher, any(isinstance(term, HiddenStates) for term in distill.terms)
    if not isinstance(teacher, Recorded) or teacher.backend != "vllm":
        return False
    return teacher.prefix or states or distill.recorded_temperature != 1


def _has(prune: Cut, kind: type) -> bool:
    return any(isinstance(change, kind) for change in prune.changes)


ORDER = (Width, Compensate)
"""Kinds of changes, in the order in which they can act."""
IS_SO: dict[str, Callable[[Any], Any]] = {
    "greedy_without_tasks": lambda measure: "task_greedy" in measure.metrics and measure.sweep is None,
    "mixed_runs": lambda prune: isinstance(prune, CutByScore) and prune.contiguous and isinstance(prune.metric, dict),
    "changes_in_order": lambda prune: (
        (order := [ORDER.index(type(change)) for change in prune.changes]) != sorted({*order})
    ),
    "nothing_to_make_up_for": lambda prune: isinstance(prune, CutThese) and not prune.drop and _has(prune, Compensate),
    "width_and_target": lambda prune: isinstance(prune, CutByScore) and prune.target is not None and _has(prune, Width),
    "lora_without_layers": lambda distill: distill.lora is not None and distill.trainable == "norm_and_head",
    "recorded_on_policy": lambda distill: _is_recorded(distill) and distill.on_policy is not None,
    "on_policy_unjudged": lambda distill: (
        distill.on_policy is not None and not any(map(reads_distributions, distill.losses))
    ),
    "on_policy_images": lambda distill: distill.on_policy is not None and distill.has_images,
    "written_images": lambda distill: any(source.generate is not None and source.has_images for source in distill.data),
    "recorded_images": lambda distill: _is_recorded(distill) and distill.has_images,
    "recorded_losses": lambda distill: _is_recorded(distill) and not all(map(from_top_k, distill.terms)),
    "recorded_temperatures": lambda distill: _is_recorded(distill) and len(temperatures(distill.terms)) > 1,
    "vllm_tells_less": _asks_too_much_of_vllm,
    "best_of_nothing": lambda distill: (
        distill.watch and distill.watch.metric_for_best_model not in (None, *distill.watch.scores)
    ),
}
"""Name of a contradiction -> whether a section says it."""
WORDS: dict[str, str] = own_yaml(__file__)
NOT_TOGETHER = {WORDS[name]: is_so for name, is_so in IS_SO.items()}
"""`place: why it is refused; what to set instead` -> whether a section says it, in the order of a recipe."""
SECTIONS: dict[str, type[Section]] = {"measure": Measure, "prune": Cut, "distill": Distill}


def not_together(section: Section) -> Iterator[str]:
    """`place: what is wrong` of every row that ``section`` says."""
    for words, is_so in NOT_TOGETHER.items():
        if isinstance(section, SECTIONS[words.partition(".")[0]]) and is_so(section):
            yield words


def contradictions(said: Section) -> Iterator[str]:
    """`place: what is wrong`, for everything that single fields of a section, or of a whole recipe, cannot express."""
    for section in (said, *(own for own in vars(said).values() if isinstance(own, Section))):
        yield from not_together(section)
        if isinstance(section, Distill):
            yield from losses.contradictions(section.losses)
            for number, source in enumerate(section.data):
                own = source.losses
                yield from () if own is None else losses.contradictions(own, f"distill.data.{number}.losses")
            yield from wrong_arguments(section.trainer)
