"""Greedy removal under any objective, against a plain loop over small games."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest

from shoal.artifacts.evaluation import TaskScore
from shoal.components import REMOVED, Component, LayerEdit
from shoal.compress.metrics.greedy import greedy_order, layer_components, task_objective, without_components
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
    units = [Component((4,)), Component((2,), "mlp"), Component((3,), "attention"), Component((3,), "mlp")]
    assert without_components(units).edits == ((2, LayerEdit("mlp")), (3, REMOVED), (4, REMOVED))
    assert without_components(units).name == "layer 4, mlp 2, attention 3, mlp 3"


@pytest.mark.parametrize(("num_layers", "count"), [(3, 4), (3, 0), (1, None)])
def test_removals_that_cannot_be_made_are_refused(num_layers: int, count: int | None) -> None:
    message = rf"x: {count or 0} removals are requested, but 1 to {num_layers} are possible"
    with pytest.raises(UserError, match=message):
        greedy_order(layer_components(num_layers), Table(3, 0), num_removals=count, name="x")


SCORES = {"layer 0": {"a": 0.9, "b": 0.1}, "layer 1": {"a": 0.6, "b": 0.6}, "layer 2": {"a": 0.2, "b": 0.7}}


def evaluate(variants: Sequence[Variant]) -> list[list[TaskScore]]:
    rest: Any = (0, 1, 9, 0.0, True, "1", 0, ())
    return [
        [TaskScore(name, "x", "x", "x", score, *rest) for name, score in SCORES[one.name].items()] for one in variants
    ]


def test_a_task_aware_order_keeps_up_the_mean() -> None:
    (removal,) = greedy_order(layer_components(3), task_objective(evaluate), num_removals=1, higher_is_better=True)
    assert removal.unit == Component((1,))
    assert removal.score == pytest.approx(0.6)
