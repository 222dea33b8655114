"""What the section `distill` must not say: settings that contradict each other or would be ignored."""

from __future__ import annotations

from collections.abc import Iterator

from shoal.recipe import losses as terms
from shoal.recipe.distill import Distill
from shoal.recipe.trainer_arguments import wrong_arguments


def contradictions(distill: Distill) -> Iterator[str]:
    """`place: what is wrong`, for everything that single fields cannot express."""
    yield from terms.contradictions(distill.losses)
    for number, source in enumerate(distill.data):
        yield from [] if source.losses is None else terms.contradictions(source.losses, f"distill.data.{number}.losses")
    yield from wrong_arguments(distill.trainer)
