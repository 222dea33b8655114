"""Which layers may go, as far as that needs neither scores nor weights. Loads nothing that takes seconds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

from shoal.components import require_layers
from shoal.errors import UserError
from shoal.recipe.prune import CutByScore, CutThese, Prune

DEFAULT_PART = 8
"""Number of layers of which one is dropped by default."""


def refuse_impossible_layers(prune: Prune, num_layers: int) -> None:
    """Refuse layers that a model of so many does not have, and more of them than may go.

    Raises:
        UserError: as the choice of layers does later on.
    """
    if isinstance(prune, CutThese):
        require_layers(prune.drop, num_layers, "prune.drop")
    elif prune.target is None:
        possible_count(prune, num_layers)
    else:
        free_layers(prune, num_layers)


def free_layers(prune: CutByScore, num_layers: int) -> list[int]:
    """The layers that an automatic choice may take, as far as it needs no scores, increasing.

    Raises:
        UserError: a protected layer that is none of the model's.
    """
    taken = protected_layers(prune.protect, num_layers)
    return [layer for layer in range(num_layers) if layer not in taken]


def possible_count(prune: CutByScore, num_layers: int) -> int:
    """How many layers go, where nothing but their number is asked for.

    Raises:
        UserError: more than are not protected.
    """
    free, count = free_layers(prune, num_layers), count_of(prune, num_layers)
    protected = sorted({*range(num_layers)} - {*free})
    most, left = len(free), f"only {len(free)} of {num_layers} are not protected"
    if prune.contiguous:
        most = longest_run(protected, num_layers)
        left = f"the longest run that is not protected has {most}"
    if count > most:
        raise UserError(
            f"prune: asks to drop {count} layers, but {left} ({protected}); drop fewer or shorten prune.protect"
        )
    return count


def default_count(num_layers: int) -> int:
    """Layers to drop where a recipe says neither which nor how many."""
    return max(1, num_layers // DEFAULT_PART)


def count_of(prune: CutByScore, num_layers: int) -> int:
    """How many layers a recipe asks to drop that names no target."""
    if prune.num_drop is not None:
        key, count = f"prune.num_drop={prune.num_drop}", prune.num_drop
    elif prune.ratio is None:
        key, count = "prune, which says no number of layers", default_count(num_layers)
    else:
        # 0.29 * 100 is 28.999999999999996 in floating point
        key, count = f"prune.ratio={prune.ratio}", math.floor(prune.ratio * num_layers + 1e-9)
    if count == 0:
        least = math.ceil(1 / num_layers * 1000) / 1000
        raise UserError(f"{key}: is less than one of {num_layers} layers; give at least {least}")
    if count >= num_layers:
        raise UserError(f"{key}: would drop all {num_layers} layers; drop at most {num_layers - 1}")
    return count


def protected_layers(protect: Sequence[int | str], num_layers: int) -> set[int]:
    """The protected layers that are named by number."""
    named = [layer for layer in protect if isinstance(layer, int)]
    for layer in named:
        if not -num_layers <= layer < num_layers:
            raise UserError(
                f"prune.protect: {layer} is no layer of this model; name 0..{num_layers - 1}, or -1 for the last one"
            )
    return {layer % num_layers for layer in named}


def longest_run(protected: Iterable[int], num_layers: int) -> int:
    """Layers of the longest run without a protected one."""
    borders = [-1, *sorted(protected), num_layers]
    return max(right - left - 1 for left, right in itertools.pairwise(borders))
