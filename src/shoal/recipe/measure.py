"""How layer importance is measured: the recipe's section `measure`, and what it must not say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import Field

from shoal.recipe.evaluate import Tasks
from shoal.recipe.section import LEAST_ITEMS, Data, Positive, RowLength, Section, Shapes, TextSource

Protocol = Literal["loglikelihood", "continuation", "generation"]
Operator = Literal["layer", "attention", "mlp"]
Metric = Literal[
    "block_influence", "angular", "streamline_cosine", "update_norm", "avss_output", "avss_update", "mka_similarity",
    "magnitude", "taylor", "taylor_plus", "laco_acceptance",
    "single_drop_perplexity", "sleb", "blockpruner", "present_absent", "local_shapley",
]  # fmt: skip
AtLeast = Annotated[int, Field(ge=LEAST_ITEMS)]
METRICS: tuple[str, ...] = get_args(Metric)
"""Names of shoal.compress.metrics.registry, which takes seconds to load."""


@dataclass(frozen=True)
class Sweeps(Tasks):
    """Which variants of the model are scored on which tasks: what importance by ability and protocol is made of.

    Tasks are named in full, or with ``protocols`` without their protocol's ending.
    """

    limit: Annotated[AtLeast | dict[str, AtLeast | None] | None, Shapes.SCORES] = 100
    """Items per task, or of single tasks by name: {default: 100, gsm8k: 50}; None = all."""
    batch_size: Annotated[Positive, Shapes.NOTHING] = 8
    """Prompts or questions per rank at one time, each under all variants."""
    protocols: Annotated[tuple[Protocol, ...], Shapes.SCORES] = ()
    """Every task under each of these, as far as there are tasks called so; none = tasks are named in full."""
    operators: Annotated[tuple[Operator, ...], Shapes.SCORES] = ("layer",)
    """What is taken out of the intact model, one at a time: a layer, or a half of one; `shoal lab sweeps` has more."""
    greedy: Annotated[Positive | None, Shapes.SCORES] = None
    """Removals of a task-aware order: at every step the layer goes without which the tasks' mean score is best. Made
    beside the operators, as `task_greedy`; every step costs as much as the operator layer on what is left."""


@dataclass(frozen=True)
class Measure(Section):
    """How layer importance is measured."""

    data: Annotated[Data, Shapes.IMPORTANCE | Shapes.PLAN] = (TextSource("python_docs"),)
    """Text that the model reads. prune.changes are decided on it too, and text that it is unlike gains little by them:
    name some of every kind that the student will read."""
    num_tokens: Annotated[Positive, Shapes.IMPORTANCE | Shapes.PLAN] = 20_000
    """Tokens that the model reads; for prune.changes up to 65,536 of them, or as many more as they need."""
    sequence_length: Annotated[RowLength, Shapes.IMPORTANCE | Shapes.PLAN] = 512
    """Tokens of one row."""
    batch_size: Annotated[Positive, Shapes.NOTHING] = 4
    """Sequences per rank and forward."""
    metrics: Annotated[Annotated[tuple[Metric, ...], Field(min_length=1)], Shapes.IMPORTANCE] = (
        "block_influence",
        "angular",
    )
    """Metrics and orders of removals, by name; `shoal list metrics` has all."""
    num_drop: Annotated[Positive | None, Shapes.IMPORTANCE] = None
    """Removals that greedy metrics make; None = a quarter of the layers."""
    sweep: Sweeps | None = None
    """None = no task is scored."""

    def removals(self, num_layers: int) -> int:
        """Layers that greedy metrics remove of ``num_layers``."""
        return self.num_drop or max(1, num_layers // 4)


def contradictions(measure: Measure) -> Iterator[str]:
    """`place: what is wrong`, for everything that single fields cannot express."""
    sweep = measure.sweep
    if sweep is None:
        return
    if not sweep.tasks and not sweep.perplexity_tokens:
        yield "measure.sweep: scores nothing; name tasks, or set perplexity_tokens"
    if not sweep.operators and sweep.greedy is None:
        yield "measure.sweep.operators: is empty; name at least one, or set measure.sweep.greedy"
