"""Greedy removal: again and again the component goes without which the model is best, given all that is gone already.

The components are layers or their halves; what "best" means is any objective of a variant: a loss for SLEB and
BlockPruner, the scores of tasks for task-aware orders.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import ClassVar

from shoal.artifacts.evaluation import TaskScore
from shoal.artifacts.importance import Removal
from shoal.components import REMOVED, Component, ComponentPart, LayerEdit
from shoal.errors import UserError

from ..variants.variants import Variant, variant
from .metric import Metric, Need, Order, Yields

log = logging.getLogger(__name__)

HALVES: tuple[ComponentPart, ...] = ("attention", "mlp")
TASK_ORDER = "task_greedy"
"""Name of the order by the mean score of swept tasks."""
Objective = Callable[[Sequence[Variant]], Sequence[float]]
"""One number for every variant. All candidates of a round come at once, so that what they share is computed once."""


class TaskGreedy(Metric):
    """Greedy order: at every step the layer without which the mean score of the measure.sweep tasks is best (TALE,
    arXiv:2510.22767). A step costs as much as an ablation of the remaining layers."""

    needs: ClassVar[Need] = "tasks"
    yields: ClassVar[Yields] = "order"


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
        UserError: fewer components than removals, or no removal asked for.
    """
    remaining = list(components)
    count = len(remaining) - 1 if num_removals is None else num_removals
    if not 0 < count <= len(remaining):
        raise UserError(f"{name}: {count} removals are requested, but 1 to {len(remaining)} are possible")
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


def without_components(components: Sequence[Component]) -> Variant:
    """The variant without ``components``; a layer both of whose halves are gone is gone, as a plan of them has it."""
    parts: dict[int, set[ComponentPart]] = defaultdict(set)
    for component in components:
        parts[component.layers[0]].add(component.part)
    gone = {layer for layer, taken in parts.items() if "layer" in taken or taken == set(HALVES)}
    rest = [(layer, LayerEdit(part)) for layer, taken in parts.items() if layer not in gone for part in taken]
    return variant(
        ", ".join(component.name for component in components), [*((layer, REMOVED) for layer in gone), *rest]
    )


def task_objective(evaluate: Callable[[Sequence[Variant]], Sequence[Sequence[TaskScore]]]) -> Objective:
    """The mean over tasks of a variant's scores, higher = better: what a task-aware order keeps up.

    ``evaluate`` gives every variant's scores. Of nats, of which less is better, the mean counts with a minus. Greedy
    removal by a task's own score is that of arXiv 2510.22767, where the score may rise; the mean is INFERRED.
    """

    def mean(scores: Sequence[TaskScore]) -> float:
        value = sum(score.score for score in scores) / len(scores)
        return value if scores[0].higher_is_better else -value

    return lambda variants: [mean(scores) for scores in evaluate(variants)]
