"""Greedy removal: again and again the component goes without which the model is best, given all that is gone already.

The components are layers, their halves or heads; what "best" means is any objective of a variant: a loss for SLEB and
BlockPruner, the scores of tasks for task-aware orders.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence

from shoal.artifacts.evaluation import TaskScore
from shoal.artifacts.importance import Removal
from shoal.components import REMOVED, Component, ComponentPart
from shoal.errors import UserError

from ..edits.layer_edits import KINDS, layer_edits
from ..variants.variants import Variant, variant
from .metric import Order

log = logging.getLogger(__name__)

HALVES: tuple[ComponentPart, ...] = ("attention", "mlp")
TASK_ORDER = "task_greedy"
"""Name of the order by the mean score of swept tasks."""
Objective = Callable[[Sequence[Variant]], Sequence[float]]
"""One number for every variant. All candidates of a round come at once, so that what they share is computed once."""


def greedy_order(
    components: Sequence[Component],
    objective: Objective,
    *,
    num_removals: int | None = None,
    higher_is_better: bool = False,
    name: str = "greedy",
) -> Order:
    """``num_removals`` of ``components`` in the order in which they go, each with the objective once it is gone.

    A round scores the model without those gone so far and without each remaining one, and takes the best for good; of
    equal ones the first in ``components``. None removes all but one. Components that are to stay are not listed.

    Raises:
        UserError: fewer components than removals, one listed twice, or no removal asked for.
    """
    remaining = list(components)
    if len(set(remaining)) < len(remaining):
        raise UserError(f"{name}: a unit is listed twice among {_names(remaining)}; list every unit once")
    count = len(remaining) - 1 if num_removals is None else num_removals
    if not 0 < count <= len(remaining):
        raise UserError(
            f"{name}: {count} removals are asked for, but there are {len(remaining)} units that may go"
            f"{f' ({_names(remaining)})' if remaining else ''}; ask for at least 1 and at most as many as there are"
        )
    order: list[Removal] = []
    for number in range(count):
        gone = [removal.unit for removal in order]
        scores = objective([without_components([*gone, component]) for component in remaining])
        best = (max if higher_is_better else min)(scores)
        position = list(scores).index(best)
        order.append(Removal(remaining.pop(position), best))
        log.info("%s: removal %d of %d is %s, then %.5g", name, number + 1, count, order[-1].unit.name, best)
    return tuple(order)


def layer_components(num_layers: int, *, protected: Collection[int] = ()) -> tuple[Component, ...]:
    """Every layer that is not ``protected``; negative numbers count from the end."""
    free = (layer for layer in range(num_layers) if not {layer, layer - num_layers} & set(protected))
    return tuple(Component((layer,)) for layer in free)


def half_components(num_layers: int, *, protected: Collection[int] = ()) -> tuple[Component, ...]:
    """Attention and MLP of every layer that is not ``protected``; negative numbers count from the end."""
    layers = layer_components(num_layers, protected=protected)
    return tuple(Component(layer.layers, part) for layer in layers for part in HALVES)


def without_components(components: Sequence[Component]) -> Variant:
    """The variant without ``components``. A layer both of whose halves are gone is gone, as a plan made of them has it.

    Raises:
        UserError: a donor, a key-value group, or an index where there is none to name.
    """
    for component in components:
        kind = KINDS[component.part]
        if kind.hooks is None or bool(kind.told_by) != (component.index is not None):
            raise UserError(f"{component.name}: no removal is known for it; there are layers, attention, mlp and heads")
    edits = layer_edits(components, None)
    parts: dict[int, set[ComponentPart]] = defaultdict(set)
    for layer, edit in edits:
        parts[layer].add(edit.part)
    gone = {layer for layer, taken in parts.items() if "layer" in taken or {"attention", "mlp"} <= taken}
    # heads are a part of the attention: without it there are none to mask
    rest = [
        (layer, edit)
        for layer, edit in edits
        if layer not in gone and not (edit.part == "head" and "attention" in parts[layer])
    ]
    return variant(_names(components), [*((layer, REMOVED) for layer in gone), *rest])


def task_objective(evaluate: Callable[[Sequence[Variant]], Sequence[Sequence[TaskScore]]]) -> Objective:
    """The mean over tasks of a variant's scores, higher = better: what a task-aware order keeps up.

    ``evaluate`` gives every variant's scores. Of nats, of which less is better, the mean counts with a minus. Greedy
    removal by a task's own score is that of arXiv 2510.22767, where the score may rise; the mean is INFERRED.

    Raises:
        UserError: when called: nats beside shares, which have no unit in common.
    """

    def mean(scores: Sequence[TaskScore]) -> float:
        if len({score.higher_is_better for score in scores}) != 1:
            names = ", ".join(score.task for score in scores) or "no task"
            raise UserError(f"greedy: the scores of {names} have no unit in common; name tasks of one kind")
        value = sum(score.score for score in scores) / len(scores)
        return value if scores[0].higher_is_better else -value

    return lambda variants: [mean(scores) for scores in evaluate(variants)]


def _names(components: Sequence[Component]) -> str:
    return ", ".join(component.name for component in components)
