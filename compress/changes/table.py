"""The changes that a recipe can ask for besides dropping layers, in the order in which they act."""

from __future__ import annotations

from shoal.recipe.prune import Prune

from .change import Change
from .compensation import Compensation
from .width import Narrowing


def changes_of(prune: Prune) -> tuple[Change, ...]:
    """What the recipe's section ``prune`` asks for."""
    return (
        *([Narrowing(prune.width)] if prune.width is not None else []),
        *([Compensation(prune.compensate)] if prune.compensate is not None else []),
    )
