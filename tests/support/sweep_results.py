"""Small, made-up sweeps: scores per item with known effects, for everything that reads an atlas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from results import provenance

from shoal.artifacts.evaluation import ItemScore, TaskScore
from shoal.artifacts.importance import Atlas, Importance, Removal, Sweep
from shoal.components import Component, ComponentPart
from shoal.compress.sweeps.atlas import build_atlas
from shoal.compress.sweeps.table import Measured, table_of
from shoal.eval.harness.rates import hold_answers, text_rates, with_rates
from shoal.stats.paired import interval

NUM_LAYERS = 6
NUM_ITEMS = 80


def task(
    scores: Sequence[float] | np.ndarray,
    name: str = "retrieval_continuation",
    *,
    texts: Sequence[str] | None = None,
    target: str = "Rome",
    ids: Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
    **changes: Any,
) -> TaskScore:
    """A scored task, by default right-or-wrong with chance 1/4, whose ability and protocol are in its name."""
    count = len(scores)
    items = tuple(
        ItemScore(
            ids[i] if ids else f"{name.split('_')[0]}-{i}",
            float(scores[i]),
            texts[i] if texts else "Rome",
            target,
            weights[i] if weights else 1.0,
        )
        for i in range(count)
    )
    mean = float(np.average([item.score for item in items], weights=[item.weight for item in items]))
    ability, _, protocol = name.partition("_")
    chance = 0.0 if protocol == "generation" else 0.25
    made = TaskScore(name, ability, protocol, "acc", mean, 0.0, 0.0, count, chance, True, "1", 0, items)
    made = replace(made, **changes)
    if made.protocol == "generation":
        written = [item.prediction for item in items]
        rates = text_rates(written, hold_answers(written, written, [target]), [1] * count, [False] * count)
        made = with_rates(
            replace(made, items=tuple(replace(i, rates=found) for i, found in zip(items, rates, strict=True)))
        )
    low, high = interval(made)
    return replace(made, ci_low=low, ci_high=high)


def nats(scores: Sequence[float] | np.ndarray, name: str = "language_rolling", **changes: Any) -> TaskScore:
    return task(scores, name, metric="nats_per_token", chance=0.0, higher_is_better=False, **changes)


def right(share: float, lost: int = 0, won: int = 0, *, count: int = NUM_ITEMS) -> np.ndarray:
    """``share`` of ``count`` items right, without ``lost`` of these and with ``won`` of the others."""
    scores, first_wrong = np.zeros(count), round(share * count)
    scores[lost:first_wrong] = 1.0
    scores[first_wrong : first_wrong + won] = 1.0
    return scores


LOST = {
    "retrieval_continuation": (60, 0, 30, 0, 1, 0),
    "retrieval_generation": (60, 1, 30, 0, 25, 0),
    "knowledge_continuation": (60, 1, 0, 0, 0, 30),
}
"""Task -> items lost without each layer. 0 is fatal everywhere, 2 is retrieval's, 5 knowledge's, 4 shows in writing."""


def scores() -> tuple[list[TaskScore], list[list[TaskScore]]]:
    """The intact model's scores and those without each layer."""
    intact = [task(right(0.8), name) for name in LOST]
    removed = [[task(right(0.8, lost[layer]), name) for name, lost in LOST.items()] for layer in range(NUM_LAYERS)]
    base = 2.0 + np.linspace(0.0, 1.0, NUM_ITEMS)
    intact.append(nats(base))
    wave = 0.05 * np.cos(np.arange(NUM_ITEMS))
    for layer, increase in enumerate((4.0, 0.0, 0.2, 0.02, 0.1, 0.3)):
        removed[layer].append(nats(base + increase + (wave if increase else 0.0)))
    return intact, removed


READ = {
    "retrieval_continuation": (40, 0, 30, 0, 0, 0),
    "retrieval_generation": (56, 0, 30, 0, 1, 0),
    "knowledge_continuation": (56, 0, 0, 0, 0, 0),
}
WROTE = {
    "retrieval_continuation": (40, 0, 0, 0, 1, 0),
    "retrieval_generation": (56, 1, 2, 0, 24, 0),
    "knowledge_continuation": (56, 1, 0, 0, 0, 30),
}
"""As LOST, without each layer's reading and without its writing: 2 reads, 4 writes text, 5 writes facts, 0 does both
and loses the same items by either."""


def tables() -> dict[str, tuple[Sweep, tuple[Measured, ...]]]:
    """What table_of gives for layers, their reading and their writing."""
    intact, removed = scores()
    found = {"layer": table_of("layer", [Component((layer,)) for layer in range(NUM_LAYERS)], intact, removed)}
    base = [item.score for item in intact[3].items]
    parts: tuple[tuple[ComponentPart, dict[str, tuple[int, ...]], float], ...]
    parts = ("skip_prompt", READ, 0.25), ("skip_written", WROTE, 0.5)
    for operator, lost, share in parts:
        units = [Component((layer,), operator) for layer in range(NUM_LAYERS)]
        variants = [
            [
                *(task(right(0.8, lost[name][layer]), name) for name in LOST),
                nats([s + share * (item.score - s) for s, item in zip(base, removed[layer][3].items, strict=True)]),
            ]
            for layer in range(NUM_LAYERS)
        ]
        found[operator] = table_of(operator, units, intact, variants)
    return found


def atlas() -> Atlas:
    return build_atlas(*scores(), metrics={"block_influence": INFLUENCE})


INFLUENCE = (0.9, 0.05, 0.1, 0.3, 0.2, 0.15)


def importance() -> Importance:
    """Everything importance.json can hold."""
    angular = tuple(
        tuple(0.1 * n + 0.01 * start for start in range(NUM_LAYERS - n + 1)) for n in range(1, NUM_LAYERS + 1)
    )
    layers = tuple(Removal(Component((layer,)), 3.0 + step) for step, layer in enumerate((3, 0, 1, 4)))
    places: tuple[tuple[int, ComponentPart], ...] = (
        (3, "attention"),
        (1, "mlp"),
        (0, "mlp"),
        (3, "mlp"),
        (2, "attention"),
    )
    halves = tuple(Removal(Component((layer,), part), 3.0 + step) for step, (layer, part) in enumerate(places))
    return Importance(
        provenance(),
        NUM_LAYERS,
        1000,
        {"block_influence": INFLUENCE},
        {"angular": angular},
        orders={"sleb": layers, "block_pruner": halves},
        atlas=atlas(),
    )
