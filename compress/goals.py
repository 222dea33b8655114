"""What prune.target asks of a student, as amounts that dropped layers must save together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from shoal.errors import UserError
from shoal.recipe.prune import PlanTarget, Serving

from .layer_sizes import LayerSizes

GIB = 2**30


@dataclass(frozen=True)
class Goal:
    """One target, in whole units of what it limits."""

    setting: str
    """`prune.target.params`"""
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
        name = self.setting.removeprefix("prune.target.")
        return f"{name} {self.text(self.amount(drop))}{self.conditions} (asked: {self.asked:,.8g})"


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
            f"prune.target: is not reached by {what}; the nearest is {nearest}. Ask for less, or shorten prune.protect "
            "and prune.spare"
        )


def goals_of(target: PlanTarget, sizes: LayerSizes) -> Goals:
    """The targets for a model of these sizes.

    Raises:
        UserError: targets that the model reaches as it is, or a cache that cannot be told.
    """
    goals = Goals(tuple(_goals(target, sizes)))
    if goals.reached(()):
        raise UserError(
            f"prune.target: nothing has to go, because all of it holds already: {goals.in_words(())}; ask for more, or "
            "leave prune.target out"
        )
    return goals


def _goals(target: PlanTarget, sizes: LayerSizes) -> Iterator[Goal]:
    if target.params is not None:
        own, whole = sizes.layer_parameters, sizes.cost.num_parameters
        yield Goal("prune.target.params", target.params, whole, math.floor(target.params), own, "{:,}".format)
    if (memory := target.memory_gb) is not None:
        if not sizes.cost.cache:
            raise UserError(
                "prune.target.memory_gb: the cache of this family cannot be told without running it; use "
                "prune.target.params, or drop layers by number (prune.num_drop)"
            )
        batch, length = _served(memory, sizes)
        layers = range(sizes.num_layers)
        yield Goal(
            "prune.target.memory_gb",
            memory.limit,
            sizes.stored.of(layers) + sizes.cache(batch, length),
            math.floor(memory.limit * GIB),
            tuple(sizes.stored.layers[layer] + batch * sizes.layer_cache(layer, length) for layer in layers),
            lambda amount: f"{amount / GIB:.4g} GiB",
            f" for {batch} x {length:,} tokens",
        )
    if (speedup := target.speedup) is not None:
        batch, length = _served(speedup, sizes)
        whole = sizes.read(batch, length)
        yield Goal(
            "prune.target.speedup",
            speedup.factor,
            whole,
            math.floor(whole / speedup.factor),
            tuple(sizes.layer_read(layer, batch, length) for layer in range(sizes.num_layers)),
            lambda amount: f"{whole / amount:.4g} x",
            f" for {batch} x {length:,} tokens, if reading weights and cache takes all the time",
        )


def _served(serving: Serving, sizes: LayerSizes) -> tuple[int, int]:
    return serving.batch, serving.length or sizes.length
