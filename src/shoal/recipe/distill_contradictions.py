"""What the section `distill` must not say: settings that contradict each other or would be ignored."""

from __future__ import annotations

from collections.abc import Iterator

from shoal.recipe import losses as terms
from shoal.recipe.distill import Distill, Writing
from shoal.recipe.section import TEACHER_TEXT
from shoal.recipe.trainer_arguments import wrong_arguments


def contradictions(distill: Distill) -> Iterator[str]:
    """`place: what is wrong`, for everything that single fields cannot express."""
    yield from terms.contradictions(distill.losses)
    for number, source in enumerate(distill.data):
        yield from [] if source.losses is None else terms.contradictions(source.losses, f"distill.data.{number}.losses")
    yield from _of_images(distill)
    yield from _of_written_text(distill)
    yield from wrong_arguments(distill.trainer)


def _of_images(distill: Distill) -> Iterator[str]:
    if not distill.has_images:
        return
    images = "and a source of distill.data has images; leave one of them out"
    if distill.on_policy is not None and distill.on_policy.share > 0:
        yield f"distill.on_policy: the student writes from text alone, {images}"


def _of_written_text(distill: Distill) -> Iterator[str]:
    on_policy, writing = distill.on_policy, distill.writing
    if on_policy is not None and on_policy.share > 0:
        if on_policy.prompt_tokens + on_policy.new_tokens > distill.sequence_length:
            yield (
                f"distill.on_policy: prompt_tokens {on_policy.prompt_tokens} + new_tokens {on_policy.new_tokens} do "
                f"not fit into a row; lower them, or raise distill.sequence_length (now {distill.sequence_length})"
            )
        if not any(map(terms.reads_distributions, distill.losses)):
            yield (
                "distill.on_policy: without a teacher's judgement a student only repeats itself; "
                "add a loss term that has one"
            )
    wants_text = any(source.path == TEACHER_TEXT for source in distill.data)
    if writing != Writing() and not wants_text:
        yield (
            f"distill.writing: has no effect, distill.data does not name {TEACHER_TEXT}; add it, or leave this out "
            "(on the command line: distill.writing={})"
        )
