"""importance.json before anything is measured: every column that a recipe asks for, without what it will say.

Whether a choice is possible depends on names and lengths first. What is refused of these no measurement makes possible,
so it can be refused before one is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.importance import Agreement, Atlas, Effect, Estimate, Importance, Removal, Sweep, SweepColumn
from shoal.components import Component
from shoal.recipe.evaluate import Eval
from shoal.recipe.measure import Measure

from ...eval.harness.samples import protocol_of
from ...eval.tasks.load import tasks_of
from ..metrics.greedy import HALVES
from ..metrics.loss_metrics import BlockPruner
from ..metrics.registry import METRICS
from .sweep import sweeping

NOTHING = Estimate(0.0, 0.0, 0.0)
NO_EFFECT = Effect(NOTHING, NOTHING, None, 1.0, 1.0, critical=False)


def placeholder_importance(
    measure: Measure, num_layers: int, *, removals: int, go_first: Sequence[int] = (), scored: Eval | None = None
) -> Importance:
    """What ``measure`` will write of a model of ``num_layers``, all scores 0. ``removals``: how many greedy metrics
    make. ``go_first``: the layers that orders take first, where they may go at all. ``scored``: columns of these tasks
    too, whose data is loaded for it.

    Raises:
        UserError: unknown tasks.
    """
    inner = range(1, num_layers - 1)  # no order takes the first or the last layer
    going = [*(layer for layer in go_first if layer in inner), *(layer for layer in inner if layer not in go_first)]
    zeros = (0.0,) * num_layers
    layers: dict[str, tuple[float, ...]] = {}
    runs: dict[str, tuple[tuple[float, ...], ...]] = {}
    orders: dict[str, tuple[Removal, ...]] = {}
    for name in measure.metrics:
        metric = METRICS[name]
        if metric.yields == "layers":
            layers[name] = zeros
        elif metric.yields == "runs":
            runs[name] = tuple(zeros[length:] for length in range(num_layers))
        else:
            orders[name] = _order(going[:removals], halves=metric is BlockPruner)
    atlas = None
    if scored is not None and measure.sweep is not None and "layer" in measure.sweep.operators:
        units = tuple(Component((layer,)) for layer in range(num_layers))
        columns = tuple(_columns(scored, num_layers))
        atlas = Atlas(Sweep("layer", units, columns), (), (), Agreement((), (), ()))
    return Importance(Provenance({}), num_layers, 0, layers, runs, orders=orders, atlas=atlas)


def _order(layers: Sequence[int], *, halves: bool) -> tuple[Removal, ...]:
    parts = HALVES if halves else ("layer",)
    return tuple(Removal(Component((layer,), part), 0.0) for layer in layers for part in parts)


def _columns(scored: Eval, num_layers: int) -> Iterator[SweepColumn]:
    with sweeping():
        tasks = tasks_of(scored)
    for name, task in tasks.items():
        told = task.config.metadata or {}
        ability = str(told.get("ability") or name)
        protocol = str(told.get("protocol") or protocol_of(task, [{"doc": task.eval_docs[0]}]))
        yield _column(name, ability, protocol, num_layers)


def _column(task: str, ability: str, protocol: str, num_layers: int) -> SweepColumn:
    return SweepColumn(
        task=task,
        ability=ability,
        protocol=protocol,
        metric="",
        chance=0.0,
        higher_is_better=True,
        n=0,
        version="",
        num_fewshot=0,
        baseline=NOTHING,
        test="paired-t",
        effects=(NO_EFFECT,) * num_layers,
        correlation=tuple((0.0,) * layer + (1.0,) for layer in range(num_layers)),
    )
