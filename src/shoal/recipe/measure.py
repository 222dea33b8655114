"""How layer importance is measured: the recipe's section `measure`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal, get_args

from pydantic import Field

from shoal.errors import UserError
from shoal.formatting import meant
from shoal.recipe.evaluate import Eval, Limited, Names
from shoal.recipe.prune import Cut, CutByScore
from shoal.recipe.section import (
    AUTO,
    LEAST_ITEMS,
    Data,
    Once,
    Positive,
    RowLength,
    Section,
    Shapes,
    TextSource,
    one_or_more,
)

Operator = Literal["layer", "attention", "mlp"]
Metric = Literal[
    "block_influence", "angular", "update_norm",
    "magnitude", "taylor",
    "single_drop_perplexity", "sleb", "blockpruner", "present_absent", "local_shapley",
    "task_greedy",
]  # fmt: skip
Least = Annotated[int, Field(ge=LEAST_ITEMS)]
GREEDY = ("sleb", "blockpruner", "task_greedy")
"""Metrics that are measured as far as layers are removed."""
METRICS: tuple[str, ...] = get_args(Metric)
"""Names of shoal.compress.metrics.registry, which takes seconds to load."""


def no_metric(name: str, setting: str) -> UserError:
    """The refusal of ``name``, which ``setting`` says and nothing measures."""
    hint = meant(name, METRICS, "`shoal list metrics` shows all")
    return UserError(f"{setting}: is not a metric, and no task is swept; {hint}")


def not_measured(setting: str, hint: str, where: str) -> UserError:
    """The error about a name in ``setting`` that is not in importance.json; ``where`` is the key that adds it."""
    return UserError(f"{setting}: is not in importance.json; {hint} To add it, name it in {where} and measure again")


@dataclass(frozen=True)
class Sweeps(Limited):
    """Ablation: score tasks with one layer removed at a time. Section `eval` sets how tasks are scored."""

    tasks: Annotated[Annotated[Names, Field(min_length=1)], Shapes.SCORES]
    """Tasks, groups and suites by name. The name of a bundled data set stands for all its protocols: `retrieval`."""
    limit: Annotated[Least | dict[str, Least | None] | None, Shapes.SCORES] = 100
    """Items per task, or per named task: {default: 100, gsm8k: 50}. `None`: all items."""
    operators: Annotated[Annotated[tuple[Operator, ...], Field(min_length=1), Once], Shapes.SCORES] = ("layer",)
    """Parts to remove, one at a time: a layer, its attention or its MLP."""


@dataclass(frozen=True)
class Measure(Section):
    """Measurement of layer importance."""

    data: Annotated[Data, Shapes.IMPORTANCE | Shapes.PLAN] = (TextSource(AUTO),)
    """Text for measuring, and for fitting prune.changes. Name text of every kind that the student will read."""
    num_tokens: Annotated[Positive, Shapes.IMPORTANCE | Shapes.PLAN] = 20_000
    """Tokens to measure on. Of these, prune.changes use up to 65,536 (`scale`: 8,192), or more if they need more."""
    sequence_length: Annotated[RowLength, Shapes.IMPORTANCE | Shapes.PLAN] = 512
    """Tokens of one row."""
    batch_size: Annotated[Positive, Shapes.NOTHING] = 4
    """Rows per rank and forward pass."""
    metrics: Annotated[Annotated[tuple[Metric, ...], one_or_more, Field(min_length=1), Once], Shapes.IMPORTANCE] = (
        "block_influence",
        "angular",
    )
    """Metrics and greedy orders by name; `shoal list metrics` shows all. The one that prune.metric names is measured
    too. Greedy orders remove a quarter of the layers, or as many as prune needs."""
    sweep: Sweeps | None = None
    """Ablation: score tasks without each layer. Default: none."""


def scored_by(sweep: Sweeps, scores: Eval) -> Eval:
    """How variants are scored: as section `eval` says, on the tasks of ``sweep`` and no running text."""
    at_once = scores.at_once(auto=8)
    return replace(scores, tasks=sweep.tasks, limit=sweep.limit, perplexity_tokens=0, batch_size=at_once)


def num_removals(prune: Cut, num_layers: int) -> int:
    """Layers that greedy metrics remove of ``num_layers``: a quarter, or as many as a ``prune`` that goes by one of
    them takes, where that is more; the first and the last one stay."""
    most = max(1, num_layers - 2)
    quarter = min(most, max(1, num_layers // 4))
    if not isinstance(prune, CutByScore) or not prune.chosen_by & {*GREEDY}:
        return quarter
    if prune.target is not None:
        return most
    kept = {layer % num_layers for layer in prune.protect if isinstance(layer, int)} - {0, num_layers - 1}
    asked = prune.num_drop or int((prune.ratio or 0) * num_layers)
    return min(most, max(quarter, asked + len(kept) if asked else 0))
