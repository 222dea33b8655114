"""Greedy removal under any objective, against a plain loop over small games."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from shoal.artifacts.evaluation import TaskScore
from shoal.components import REMOVED, Component, LayerEdit
from shoal.compress.metrics.greedy import (
    greedy_order,
    layer_components,
    task_objective,
    without_components,
)
from shoal.compress.variants.variants import Variant
from shoal.errors import UserError


class Table:
    """A random number for every set of removed layers; remembers the rounds."""

    def __init__(self, num_layers: int, seed: int) -> None:
        generator = random.Random(seed)
        sets = (s for size in range(num_layers + 1) for s in itertools.combinations(range(num_layers), size))
        self.numbers = {frozenset(removed): generator.random() for removed in sets}
        self.rounds: list[int] = []

    def __call__(self, variants: Sequence[Variant]) -> list[float]:
        self.rounds.append(len(variants))
        return [self.numbers[frozenset(layer for layer, _ in one.edits)] for one in variants]


@pytest.mark.parametrize("higher_is_better", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_every_round_takes_the_best_given_what_is_gone(seed: int, higher_is_better: bool) -> None:
    table = Table(7, seed)
    order = greedy_order(layer_components(7), table, num_removals=5, higher_is_better=higher_is_better)
    gone: list[int] = []
    for removal in order:
        scores = {layer: table.numbers[frozenset([*gone, layer])] for layer in range(7) if layer not in gone}
        best = (max if higher_is_better else min)(scores.values())
        assert removal.score == best
        assert scores[removal.unit.layers[0]] == best
        gone += removal.unit.layers
    assert table.rounds == [7, 6, 5, 4, 3]
    assert len(set(gone)) == 5


def test_units_become_edits_in_the_order_of_layers() -> None:
    units = [
        Component((4,)),
        Component((2,), "mlp"),
        Component((1,), "head", 3),
        Component((1,), "head", 0),
        Component((3,), "attention"),
    ]
    assert without_components(units).edits == (
        (1, LayerEdit("head", (0, 3))),
        (2, LayerEdit("mlp")),
        (3, LayerEdit("attention")),
        (4, REMOVED),
    )
    assert without_components(units).name == "layer 4, mlp 2, head 1.3, head 1.0, attention 3"
    assert without_components([Component((1, 2))]).edits == ((1, REMOVED), (2, REMOVED))


@pytest.mark.parametrize(
    "component",
    [Component((1,), "donor"), Component((1,), "kv_group", 0), Component((1,), "head"), Component((1,), "mlp", 2)],
)
def test_components_that_cannot_be_removed_are_refused(component: Component) -> None:
    with pytest.raises(UserError, match=f"{component.name}: no removal is known for it"):
        without_components([component])


@pytest.mark.parametrize(
    ("units", "count", "message"),
    [
        (
            layer_components(3),
            4,
            r"x: 4 removals are asked for, but there are 3 units that may go \(layer 0, layer 1, layer 2\)",
        ),
        (layer_components(3), 0, r"x: 0 removals are asked for"),
        (
            layer_components(2, protected=[0, 1]),
            1,
            r"x: 1 removals are asked for, but there are 0 units that may go; ask",
        ),
        (layer_components(1), None, r"x: 0 removals are asked for, but there are 1 units"),
        ((Component((1,)), Component((1,))), 1, r"x: a unit is listed twice among layer 1, layer 1"),
    ],
)
def test_removals_that_cannot_be_made_are_refused(units: Sequence[Component], count: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        greedy_order(units, Table(3, 0), num_removals=count, name="x")


def task(name: str, score: float, *, higher_is_better: bool = True) -> TaskScore:
    return TaskScore(name, "x", "x", "x", score, 0, 1, 9, 0.0, higher_is_better, "1", 0, ())


SCORES = {
    "layer 0": {"a": 0.9, "b": 0.1, "nats": 2.0},
    "layer 1": {"a": 0.6, "b": 0.6, "nats": 4.0},
    "layer 2": {"a": 0.2, "b": 0.7, "nats": 1.0},
}


def evaluate(variants: Sequence[Variant], names: Sequence[str] = ("a", "b")) -> list[list[TaskScore]]:
    return [[task(n, SCORES[one.name][n], higher_is_better=n != "nats") for n in names] for one in variants]


def test_a_task_aware_order_keeps_up_the_mean() -> None:
    (removal,) = greedy_order(layer_components(3), task_objective(evaluate), num_removals=1, higher_is_better=True)
    assert removal.unit == Component((1,))
    assert removal.score == pytest.approx(0.6)


def test_scores_that_have_no_mean_are_refused() -> None:
    objective = task_objective(lambda variants: evaluate(variants, ("a", "nats")))
    with pytest.raises(UserError, match="a, nats have no unit in common"):
        greedy_order(layer_components(3), objective, num_removals=1)
