"""Which layers may go, and how many have to, as far as that needs neither scores nor weights. Loads nothing that takes
seconds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from shoal.components import require_layers
from shoal.errors import UserError
from shoal.recipe.prune import CutByScore, CutThese, Prune

GIB = 2**30
DEFAULT_PART = 8
"""Number of layers of which one is dropped by default."""


def refuse_impossible_layers(prune: Prune, num_layers: int, goals: Goals | None = None) -> None:
    """Refuse layers that a model of so many does not have, and more of them than may go. ``goals``: what prune.target
    asks, as far as it is known.

    Raises:
        UserError: as the choice of layers does later on.
    """
    if isinstance(prune, CutThese):
        require_layers(prune.drop, num_layers, "prune.drop")
    elif goals is not None:
        fewest(middle_first(prune, num_layers), num_layers, goals)
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
        left = f"the longest unprotected run has {most}"
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
        key, count = "prune without a number of layers", default_count(num_layers)
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
                f"prune.protect: layer {layer} does not exist; name 0 to {num_layers - 1}, or -1 for the last"
            )
    return {layer % num_layers for layer in named}


def longest_run(protected: Iterable[int], num_layers: int) -> int:
    """Layers of the longest run without a protected one."""
    borders = [-1, *sorted(protected), num_layers]
    return max(right - left - 1 for left, right in itertools.pairwise(borders))


def middle_first(prune: CutByScore, num_layers: int) -> list[int]:
    """The layers of free_layers, those in the middle of the model first."""
    return sorted(free_layers(prune, num_layers), key=lambda layer: abs(2 * layer - num_layers))


@dataclass(frozen=True)
class Goal:
    """One target, in whole units of what it limits."""

    name: str
    """`params`"""
    asked: float
    """The recipe's value."""
    whole: int
    """Amount with all layers."""
    limit: int
    """Amount that the student may have at most."""
    layers: tuple[int, ...]
    """Amount that goes with each layer."""
    text: Callable[[int], str]
    """Amount -> value in the recipe's unit, in words."""
    conditions: str = ""
    """At what it holds and what it rests on, in words."""

    def amount(self, drop: Iterable[int]) -> int:
        """What is left without these layers."""
        return self.whole - sum(self.layers[layer] for layer in drop)

    def in_words(self, drop: Iterable[int]) -> str:
        """`params 118,200,000 (asked: 120,000,000)`."""
        return f"{self.name} {self.text(self.amount(drop))}{self.conditions} (asked: {self.asked:,.8g})"


@dataclass(frozen=True)
class Goals:
    """All targets of a recipe, for one model."""

    goals: tuple[Goal, ...]

    def reached(self, drop: Iterable[int]) -> bool:
        """Whether a student without these layers is within all limits."""
        gone = tuple(drop)
        return all(goal.amount(gone) <= goal.limit for goal in self.goals)

    def in_words(self, drop: Iterable[int]) -> str:
        """What is reached, beside what was asked."""
        gone = tuple(drop)
        return ", ".join(goal.in_words(gone) for goal in self.goals)

    def first_reaching(self, cuts: Sequence[Sequence[int]], what: str) -> int:
        """The position of the first of ``cuts``, ever more layers, that reaches all goals; ``what`` says in words which
        cuts these are.

        Raises:
            UserError: none does, with the nearest that there is.
        """
        if (first := next((at for at, cut in enumerate(cuts) if self.reached(cut)), None)) is not None:
            return first
        nearest = self.in_words(cuts[-1] if cuts else ())
        raise UserError(
            f"prune.target: is not reached by {what}; the nearest is {nearest}. Lower the target, or shorten "
            "prune.protect and prune.spare"
        )


def goal_of_parameters(asked: float, whole: int, layers: Sequence[int]) -> Goal:
    """prune.target.params of a model of ``whole`` parameters, so many of them in each of its ``layers``."""
    return Goal("params", asked, whole, math.floor(asked), tuple(layers), "{:,}".format)


def goal_of_memory(asked: float, whole: int, layers: Iterable[int], conditions: str) -> Goal:
    """prune.target.memory_gb of a model of ``whole`` bytes, so many of them in each of its ``layers``."""
    most, text = math.floor(asked * GIB), lambda amount: f"{amount / GIB:.4g} GiB"
    return Goal("memory_gb", asked, whole, most, tuple(layers), text, conditions)


def goals_asked(goals: Iterable[Goal]) -> Goals:
    """All of ``goals``.

    Raises:
        UserError: the model reaches them as it is.
    """
    all_goals = Goals(tuple(goals))
    if all_goals.reached(()):
        raise UserError(
            f"prune.target: is reached without dropping a layer: {all_goals.in_words(())}; set a stricter "
            "target, or remove prune.target"
        )
    return all_goals


def fewest(
    order: Sequence[int], num_layers: int, goals: Goals, what: str = "dropping every layer that may be dropped"
) -> int:
    """How many of the first layers of ``order`` reach the goals, one layer staying; ``what`` is all of them, in
    words."""
    prefixes = [order[:count] for count in range(1, min(len(order), num_layers - 1) + 1)]
    return 1 + goals.first_reaching(prefixes, what)
