"""What settings of a recipe must not say together: what no type can keep from being said.

Everything else is kept apart by the types themselves: a section of two kinds has the keys of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from shoal.recipe import losses
from shoal.recipe.distill import Distill, Recorded
from shoal.recipe.losses import HiddenStates, from_top_k, reads_distributions, temperatures
from shoal.recipe.measure import Measure
from shoal.recipe.prune import Compensate, Cut, CutByScore, CutThese, Width
from shoal.recipe.section import Section
from shoal.recipe.trainer_arguments import wrong_arguments


class Row(NamedTuple):
    """One contradiction."""

    words: str
    """`place: why it is refused; what to set instead`; before the first stop stands the section that is looked at."""
    is_so: Callable[[Any], bool]
    """Whether the section says it."""


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
NOT_TOGETHER: tuple[Row, ...] = (
    Row(
        "measure.metrics: task_greedy removes layers by the scores of tasks, and none is swept; name some in "
        "measure.sweep.tasks",
        lambda measure: "task_greedy" in measure.metrics and measure.sweep is None,
    ),
    Row(
        "prune.metric: a mapping mixes scores of single layers, and no runs of them; name one metric of runs, or "
        "set prune.contiguous: false",
        lambda prune: isinstance(prune, CutByScore) and prune.contiguous and isinstance(prune.metric, dict),
    ),
    Row(
        "prune.changes: channels are chosen by the teacher's own weights, and what makes up for layers is fitted to "
        "what is left; give every kind once, width first",
        lambda prune: (order := [ORDER.index(type(change)) for change in prune.changes]) != sorted({*order}),
    ),
    Row(
        "prune.changes: compensate makes up for dropped layers, and no layer is dropped; name layers in prune.drop, "
        "or leave it out",
        lambda prune: isinstance(prune, CutThese) and not prune.drop and _has(prune, Compensate),
    ),
    Row(
        "prune.changes: width changes what layers save, which prune.target counts by whole layers; leave one of "
        "them out, or narrow that student in a run of its own (model: RUN_DIR/student)",
        lambda prune: isinstance(prune, CutByScore) and prune.target is not None and _has(prune, Width),
    ),
    Row(
        "distill.lora: norm_and_head trains no layer that could have an adapter; choose another distill.trainable",
        lambda distill: distill.lora is not None and distill.trainable == "norm_and_head",
    ),
    Row(
        "distill.on_policy: nothing is recorded of what the student will write; set distill.teacher: live, or leave "
        "it out",
        lambda distill: _is_recorded(distill) and distill.on_policy is not None,
    ),
    Row(
        "distill.on_policy: without a teacher's judgement a student only repeats itself; add forward_kl or another "
        "divergence to distill.losses",
        lambda distill: distill.on_policy is not None and not any(map(reads_distributions, distill.losses)),
    ),
    Row(
        "distill.on_policy: the student writes from text alone, and a source of distill.data has images; leave one "
        "of them out",
        lambda distill: distill.on_policy is not None and distill.has_images,
    ),
    Row(
        "distill.data: the teacher writes from text alone, and a source with generate has images; leave generate "
        "out there",
        lambda distill: any(source.generate is not None and source.has_images for source in distill.data),
    ),
    Row(
        "distill.teacher: what a teacher says of images is not recorded; set it to live, or leave the source out",
        lambda distill: _is_recorded(distill) and distill.has_images,
    ),
    Row(
        "distill.losses: a recorded teacher tells its most probable tokens only, and adaptive_kl, dkd and taid need "
        "all; take others, or set distill.teacher: live",
        lambda distill: _is_recorded(distill) and not all(map(from_top_k, distill.terms)),
    ),
    Row(
        "distill.losses: a teacher is recorded at one temperature, and the terms have several; give all the same, "
        "or set distill.teacher: live",
        lambda distill: _is_recorded(distill) and len(temperatures(distill.terms)) > 1,
    ),
    Row(
        "distill.teacher.backend: vLLM tells log-probabilities at temperature 1 and no state of a layer, which "
        "prefix and hidden_states need; leave these out, or set it to transformers",
        _asks_too_much_of_vllm,
    ),
    Row(
        "distill.watch.metric_for_best_model: is not scored; choose one of distill.watch.tasks, or perplexity, with "
        "perplexity_tokens above 0",
        lambda distill: distill.watch and distill.watch.metric_for_best_model not in (None, *distill.watch.scores),
    ),
)
"""All pairs, in the order of a recipe."""
SECTIONS: dict[str, type[Section]] = {"measure": Measure, "prune": Cut, "distill": Distill}


def not_together(section: Section) -> Iterator[str]:
    """`place: what is wrong` of every row that ``section`` says."""
    rows = (row for row in NOT_TOGETHER if isinstance(section, SECTIONS[row.words.partition(".")[0]]))
    return (row.words for row in rows if row.is_so(section))


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
