"""What prune.target asks of a student, as amounts that dropped layers must save together."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from shoal.errors import UserError
from shoal.formatting import count_text, listed
from shoal.recipe.prune import PlanTarget, Serving, TimeTarget

from .knapsack import Saving
from .layer_sizes import LayerSizes

GIB = 2**30


@dataclass(frozen=True)
class TeacherTime:
    """The teacher's time per written token of a sequence, where it was measured."""

    milliseconds: float
    batch_size: int
    num_tokens: int
    """Tokens behind the one that is written."""
    source: str
    """Where the number is from, in words."""
    shallower: tuple[int, float] | None = None
    """Layers and milliseconds of a shallower model that was measured beside it, in turns."""


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
    value: Callable[[int], float]
    """Amount -> value in the recipe's unit."""
    text: Callable[[float], str]
    """Value -> words."""
    conditions: str = ""
    """At what it holds and what it rests on, in words."""
    fixed: str = ""
    """What no cut changes, in words."""

    def amount(self, drop: Iterable[int]) -> int:
        """What is left without these layers."""
        return self.whole - sum(self.layers[layer] for layer in drop)

    def in_words(self, drop: Iterable[int]) -> str:
        """`params 118.2 million (at most 120.0 million)`."""
        bound = "at least" if self.setting.endswith("speedup") else "at most"
        name = self.setting.removeprefix("prune.target.")
        return f"{name} {self.text(self.value(self.amount(drop)))}{self.conditions} ({bound} {self.text(self.asked)})"


@dataclass(frozen=True)
class Goals:
    """All targets of a recipe, for one model, after what its edits remove."""

    goals: tuple[Goal, ...]
    removed: tuple[int, ...]
    """Layers that edits remove."""

    @cached_property
    def needs(self) -> Saving:
        """What is to be saved beyond what edits save, by goal."""
        return tuple(goal.amount(self.removed) - goal.limit for goal in self.goals)

    def saving(self, layer: int) -> Saving:
        """What one layer saves, by goal."""
        return tuple(goal.layers[layer] for goal in self.goals)

    def reached(self, drop: Iterable[int]) -> bool:
        """Whether a student without these layers, and without those that edits remove, is within all limits."""
        drop = {*drop, *self.removed}
        return all(goal.amount(drop) <= goal.limit for goal in self.goals)

    def in_words(self, drop: Iterable[int]) -> str:
        """What is reached, beside what was asked."""
        drop = {*drop, *self.removed}
        return ", ".join(goal.in_words(drop) for goal in self.goals)

    def refuse_unreachable(self, cuts: Collection[Sequence[int]], what: str) -> None:
        """Refuse targets that none of ``cuts`` reaches; ``what`` says in words which cuts these are.

        Raises:
            UserError: naming the first target that none of them reaches, and the nearest value that one does; or, where
                each target alone is within reach, that all at once are not.
        """
        if any(map(self.reached, cuts)):
            return
        for goal in self.goals:
            nearest = min([{*cut, *self.removed} for cut in cuts] or [{*self.removed}], key=goal.amount)
            if goal.amount(nearest) > goal.limit:
                raise UserError(
                    f"{goal.setting}: {goal.text(goal.asked)} is not reached by {what}; the nearest is "
                    f"{goal.text(_towards(goal, goal.value(goal.amount(nearest))))}{goal.conditions}{goal.fixed}. Set "
                    "that, or shorten prune.protect and prune.spare"
                )
        raise UserError(
            f"prune.target: each of its targets is reached by {what}, but no single one reaches all of them: "
            f"{self.in_words(min(cuts, key=lambda cut: sum(self._misses(cut))))}; relax one of them"
        )

    def _misses(self, cut: Sequence[int]) -> Iterator[float]:
        for goal in self.goals:
            yield max(0.0, goal.amount({*cut, *self.removed}) / goal.limit - 1) if goal.limit > 0 else math.inf


def goals_of(
    target: PlanTarget, sizes: LayerSizes, *, removed: Sequence[int] = (), teacher_time: TeacherTime | None = None
) -> Goals:
    """The targets for a model of these sizes. ``teacher_time``: as measured, for a target in milliseconds.

    Raises:
        UserError: a target that the model reaches as it is, a cache that cannot be told, or a time without a measured
            one to scale.
    """
    goals = tuple(_goals(target, sizes, teacher_time))
    if target.params is not None and target.params >= sizes.cost.num_parameters:
        raise UserError(
            f"prune.target.params: {count_text(target.params)} is not below the model's "
            f"{count_text(sizes.cost.num_parameters)}, which it has with all its layers; give less, or leave it out"
        )
    all_goals = Goals(goals, tuple(removed))
    if all_goals.reached(()):
        raise UserError(
            f"prune.target: nothing has to go, because all of it holds already: {all_goals.in_words(())}; ask for "
            "more, or leave prune.target out"
        )
    return all_goals


def _goals(target: PlanTarget, sizes: LayerSizes, teacher_time: TeacherTime | None) -> Iterator[Goal]:
    layers = range(sizes.num_layers)
    if target.params is not None:
        yield Goal(
            "prune.target.params",
            target.params,
            sizes.cost.num_parameters,
            math.floor(target.params),
            sizes.layer_parameters,
            float,
            lambda value: f"{value:,.0f}",
        )
    if (memory := target.memory_gb) is not None:
        if not sizes.cost.cache:
            raise UserError(
                "prune.target.memory_gb: the cache of this family cannot be told without running it; use "
                "prune.target.params, or drop layers by number (prune.num_drop)"
            )
        batch, length = memory.batch, memory.length or sizes.length
        cache = tuple(batch * sizes.layer_cache(layer, length) for layer in layers)
        weights, whole = sizes.stored.of(layers), sizes.cache(batch, length)
        yield Goal(
            "prune.target.memory_gb",
            memory.limit,
            weights + whole,
            math.floor(memory.limit * GIB),
            tuple(stored + own for stored, own in zip(sizes.stored.layers, cache, strict=True)),
            lambda value: value / GIB,
            lambda value: f"{value:.4g} GiB",
            f" for {_served(batch, length)}",
            f" (with all layers {weights / GIB:.4g} GiB of weights and {whole / GIB:.4g} of cache)",
        )
    if (time := target.ms_per_token) is not None:
        batch, length, whole, own = _read(time, sizes)
        fixed, per_byte, source = _time_line(time, whole, sizes, teacher_time)
        yield Goal(
            "prune.target.ms_per_token",
            time.limit,
            whole,
            math.floor((time.limit - fixed) / per_byte),
            own,
            lambda amount: fixed + amount * per_byte,
            lambda value: f"{value:.4g} ms",
            f" for {_served(batch, length)}, predicted from {source}",
        )
    if (speedup := target.speedup) is not None:
        batch, length, whole, own = _read(speedup, sizes)
        yield Goal(
            "prune.target.speedup",
            speedup.factor,
            whole,
            math.floor(whole / speedup.factor),
            own,
            lambda amount: whole / amount,
            lambda value: f"{value:.4g} x",
            f" for {_served(batch, length)}, if reading weights and cache takes all the time",
        )


def _read(serving: Serving, sizes: LayerSizes) -> tuple[int, int, int, tuple[int, ...]]:
    """Batch size, length, bytes read per step with all layers, and those that go with each layer."""
    batch, length = serving.batch, serving.length or sizes.length
    own = tuple(sizes.layer_read(layer, batch, length) for layer in range(sizes.num_layers))
    return batch, length, sizes.read(batch, length), own


def _time_line(
    asked: TimeTarget, whole: int, sizes: LayerSizes, measured: TeacherTime | None
) -> tuple[float, float, str]:
    """Milliseconds whatever is read, those per byte read, and what both rest on in words.

    Two depths measured in turns tell them apart: what does not shrink with the layers (calls of kernels, the head's
    softmax) is as long at half the depth. One time alone is taken to be all reading.
    """
    if asked.teacher is not None:
        fixed, source = asked.fixed or 0.0, f"the teacher's {asked.teacher:.4g} ms in the recipe"
        return fixed, (asked.teacher - fixed) / whole, source + (f", {fixed:.4g} of them fixed" if fixed else "")
    if measured is None:
        raise UserError(
            "prune.target.ms_per_token: needs the teacher's own time to scale; run `shoal eval` first, which measures "
            "it (eval.speed), or set prune.target.ms_per_token.teacher"
        )
    source = f"the teacher's {measured.milliseconds:.4g} ms in {measured.source}"
    read = sizes.read(measured.batch_size, measured.num_tokens)
    if measured.shallower is None:
        return 0.0, measured.milliseconds / read, source
    num_layers, milliseconds = measured.shallower
    less = sizes.at_depth(num_layers).read(measured.batch_size, measured.num_tokens)
    per_byte = (measured.milliseconds - milliseconds) / (read - less)
    if per_byte <= 0:
        raise UserError(
            f"prune.target.ms_per_token: {source}, and {num_layers} of its {sizes.num_layers} layers take "
            f"{milliseconds:.4g} ms, no less; measure again on a quiet machine (delete {measured.source.split()[0]}), "
            "or set prune.target.ms_per_token.teacher"
        )
    # a line through noise may begin below 0: then reading is all of it
    fixed = max(0.0, measured.milliseconds - per_byte * read)
    return fixed, (measured.milliseconds - fixed) / read, f"{source} and {milliseconds:.4g} ms of {num_layers} layers"


def _served(batch: int, length: int) -> str:
    return f"{listed([f'{batch} sequence' + ('s' if batch > 1 else '')])} of {length:,} tokens"


def _towards(goal: Goal, value: float) -> float:
    """``value`` rounded to where it can be set and reached: four digits, up for limits and down for factors."""
    if goal.setting.endswith("params"):
        return value
    step = 10.0 ** (math.floor(math.log10(value)) - 3)
    rounded = math.floor(value / step) if goal.setting.endswith("speedup") else math.ceil(value / step)
    return rounded * step
