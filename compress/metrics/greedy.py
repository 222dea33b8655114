"""Greedy removal: again and again the unit goes without which the model is best, given all that is gone already.

The units are layers, their halves or heads; what "best" means is any objective of a variant: a loss for SLEB and
BlockPruner, the scores of tasks for task-aware orders.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence

from shoal.artifacts.artifact import TaskScore
from shoal.artifacts.importance import Removal, Unit
from shoal.errors import UserError

from ..variants.variants import Edit, Masked, Removed, Silenced, Variant, variant
from .metric import Order

log = logging.getLogger(__name__)

Objective = Callable[[Sequence[Variant]], Sequence[float]]
"""One number for every variant. All candidates of a round come at once, so that what they share is computed once."""


def greedy_order(
    units: Sequence[Unit],
    objective: Objective,
    *,
    num_removals: int | None = None,
    higher_is_better: bool = False,
    name: str = "greedy",
) -> Order:
    """``num_removals`` of ``units`` in the order in which they go, each with the objective once it is gone.

    A round scores the model without the units gone so far and without each remaining one, and takes the best for good;
    of equal ones the first in ``units``. None removes all units but one. Units that are to stay are not listed.

    Raises:
        UserError: fewer units than removals, a unit listed twice, or no removal asked for.
    """
    remaining = list(units)
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
        scores = objective([without_units([*gone, unit]) for unit in remaining])
        best = (max if higher_is_better else min)(scores)
        position = list(scores).index(best)
        order.append(Removal(remaining.pop(position), best))
        log.info("%s: removal %d of %d is %s, then %.5g", name, number + 1, count, order[-1].unit.name, best)
    return tuple(order)


def layer_units(num_layers: int, *, protected: Collection[int] = ()) -> tuple[Unit, ...]:
    """Every layer that is not ``protected``; negative numbers count from the end."""
    return tuple(Unit((layer,)) for layer in range(num_layers) if not {layer, layer - num_layers} & set(protected))


def half_units(num_layers: int, *, protected: Collection[int] = ()) -> tuple[Unit, ...]:
    """Attention and MLP of every layer that is not ``protected``; negative numbers count from the end."""
    layers = layer_units(num_layers, protected=protected)
    return tuple(Unit(unit.layers, part) for unit in layers for part in ("attention", "mlp"))


def without_units(units: Sequence[Unit]) -> Variant:
    """The variant without ``units``. A layer both of whose halves are gone is gone, as a plan made of them has it."""
    parts: dict[int, set[str]] = defaultdict(set)
    heads: dict[int, set[int]] = defaultdict(set)
    for unit in units:
        if unit.part not in ("layer", "attention", "mlp", "head") or (unit.part == "head") == (unit.index is None):
            raise UserError(f"{unit.name}: no removal is known for it; there are layers, attention, mlp and heads")
        for layer in unit.layers:
            if unit.index is None:
                parts[layer].add(unit.part)
            else:
                heads[layer].add(unit.index)
    edits: list[tuple[int, Edit]] = []
    for layer in parts.keys() | heads.keys():
        if "layer" in parts[layer] or {"attention", "mlp"} <= parts[layer]:
            edits.append((layer, Removed()))
            continue
        if "mlp" in parts[layer]:
            edits.append((layer, Silenced("mlp")))
        if "attention" in parts[layer]:
            edits.append((layer, Silenced("attention")))
        elif heads[layer]:
            edits.append((layer, Masked(tuple(sorted(heads[layer])))))
    return variant(_names(units), edits)


def task_objective(
    evaluate: Callable[[Sequence[Variant]], Sequence[Sequence[TaskScore]]],
    *,
    weights: Mapping[str, float] | None = None,
) -> Objective:
    """The weighted mean over tasks of a variant's scores, higher = better: what a task-aware order keeps up.

    ``evaluate`` gives every variant's scores; ``weights`` are by task and None = all count the same. A score of which
    less is better (nats) counts with a minus. Greedy removal by a task's own score is that of arXiv 2510.22767, where
    the score may rise; the weighted mean over tasks and protocols is INFERRED.

    Raises:
        UserError: when called: weights of tasks that were not scored, or nats beside shares without weights, which have
            no unit in common.
    """

    def objective(variants: Sequence[Variant]) -> list[float]:
        return [_weighted(scores, weights) for scores in evaluate(variants)]

    return objective


def _weighted(scores: Sequence[TaskScore], weights: Mapping[str, float] | None) -> float:
    names = [score.task for score in scores]
    if weights is None:
        if len({score.higher_is_better for score in scores}) > 1:
            raise UserError(
                f"greedy: {', '.join(names)} are shares and nats, which have no unit in common; give each task a weight"
            )
        weights = dict.fromkeys(names, 1.0)
    if missing := sorted(weights.keys() - set(names)):
        raise UserError(f"greedy: weights name {missing[0]!r}, which was not scored; there is {', '.join(names)}")
    total = sum(weights.values())
    if not names or total <= 0 or min(weights.values()) < 0:
        raise UserError(f"greedy: weights {dict(weights)} give no mean; give at least one task a weight above 0")
    signed = {score.task: score.score if score.higher_is_better else -score.score for score in scores}
    return sum(weight * signed[task] for task, weight in weights.items()) / total


def _names(units: Sequence[Unit]) -> str:
    return ", ".join(unit.name for unit in units)
