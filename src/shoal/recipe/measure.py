"""How layer importance is measured: the recipe's section `measure`, and what it must not say."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from shoal.components import ComponentPart
from shoal.errors import UserError
from shoal.recipe.evaluate import Tasks
from shoal.recipe.section import LEAST_ITEMS, Data, DataSource, ImageRows, Positive, RowLength, Section, Shapes, Text

Protocol = Literal["loglikelihood", "continuation", "generation"]
Operator = Literal[ComponentPart, "cumulative"]
HeadTask = Literal["retrieval", "needle"]
METRICS = (
    *("block_influence", "angular", "streamline_cosine", "update_norm", "avss_output", "avss_update", "mka_similarity"),
    *("magnitude", "taylor", "taylor_plus", "laco_acceptance"),
    *("single_drop_perplexity", "sleb", "greedy_kl", "blockpruner", "present_absent", "local_shapley"),
)
"""Names of shoal.compress.metrics.registry, which takes seconds to load."""


def refuse_unknown_metrics(names: Sequence[str]) -> None:
    """Refuse what `measure.metrics` cannot name.

    Raises:
        UserError: a name that is none, with what may be meant; no name.
    """
    if not names:
        raise UserError(f"measure.metrics: is empty; name at least one of {', '.join(METRICS)}")
    for name in names:
        if name not in METRICS:
            close = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"there is {', '.join(METRICS)}"
            raise UserError(f"measure.metrics: {name!r} is no metric; {hint}")


@dataclass(frozen=True)
class Sweeps(Tasks):
    """Which variants of the model are scored on which tasks: what importance by ability and protocol is made of.

    Tasks are named in full, or with ``protocols`` without their protocol's ending.
    """

    limit: Annotated[Positive | None, Shapes.SCORES] = 100
    batch_size: Annotated[Positive, Shapes.NOTHING] = 8
    """Prompts or questions per rank at one time, each under all variants."""
    protocols: Annotated[tuple[Protocol, ...], Shapes.SCORES] = ()
    """Every task under each of these, as far as there are tasks called so; none = tasks are named in full."""
    operators: Annotated[tuple[Operator, ...], Shapes.SCORES] = ("layer",)
    """Changes of the intact model, one unit at a time: a layer, what it writes before the answer or from there on, a
    half of one, a query head or a key-value group taken out, or a donor's layer put in; cumulative = ever more layers
    taken out, by ``order``."""
    order: Annotated[tuple[int, ...] | str, Shapes.SCORES] = "block_influence"
    """Layers that cumulative removals go through, the first to go first, or the metric by which they go through all,
    the least important first."""
    max_removed: Annotated[Positive | None, Shapes.SCORES] = None
    """Most layers that cumulative removals take out; None = all but one."""
    greedy: Annotated[Positive | None, Shapes.SCORES] = None
    """Removals of a task-aware order: at every step the layer goes without which the tasks' mean score is best. Made
    beside the operators, as `task_greedy`; every step costs as much as the operator layer on what is left."""
    greedy_weights: Annotated[dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]], Shapes.SCORES] = field(
        default_factory=dict
    )
    """Weights of tasks in that mean; none = all tasks count the same."""
    spare_heads: Annotated[bool, Shapes.BY_CONTENT] = False
    """The operators head and kv_group take no head out that copies what is asked for, by measure.heads (a retrieval
    score of 0.1 or more), and no group that serves one."""
    donor: Annotated[Text | None, Shapes.SCORES] = None
    """Model of the same shape whose layers are put in, one at a time: Hub id, local path or demo:<name>."""
    donor_revision: Annotated[str | None, Shapes.SCORES] = None
    """Hub revision of the donor."""


@dataclass(frozen=True)
class ProbeSet(Section):
    """A labelled text set whose concept is looked for at every depth."""

    path: Text
    """A local .jsonl, .json, .csv or .parquet file, a folder of them, or a Hub data set id."""
    text: str = "text"
    """The column that holds the text."""
    label: str = "label"
    """The column that holds the class: a word, a number, or true and false."""
    split: str = "train"
    """Split of a Hub data set; of a folder the files that are named after it."""
    name: str | None = None
    """Configuration name of a Hub data set."""
    max_items: Positive = 2000
    """Most items; where there are more, so many are drawn by the seed."""
    max_tokens: Positive = 512
    """Tokens of a longer text that are read: its last ones, since the last one's state is probed."""
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Share of the items that a probe is scored on."""

    @property
    def source(self) -> DataSource:
        """Where the texts come from."""
        return DataSource(self.path, column=self.text, split=self.split, name=self.name)


@dataclass(frozen=True)
class Heads(Section):
    """Which heads copy what is asked for (arXiv:2404.15574), and what brings the answer back (arXiv:2504.07898)."""

    tasks: Annotated[tuple[HeadTask, ...], Field(min_length=1), Shapes.HEADS] = ("retrieval", "needle")
    """Bundled look-ups of 8, 16 and 32 pairs; needles in 20, 40 and 80 sentences."""
    num_each: Annotated[Positive, Shapes.HEADS] = 3
    """Prompts of every task, each of these lengths and five places of the needle: 15 times as many of a task."""
    twins: Annotated[int, Field(ge=0), Shapes.HEADS] = 0
    """Look-ups of four pairs, each with three twins (another value, two keys exchanged, another key asked for), over
    which every layer, half and head is patched: by far the most expensive part. 0 = none."""


@dataclass(frozen=True)
class Measure(Section):
    """How layer importance is measured."""

    data: Annotated[Data, Shapes.IMPORTANCE] = (DataSource("python_docs"),)
    """Text that the model reads."""
    num_tokens: Annotated[Positive, Shapes.IMPORTANCE | Shapes.DIAGNOSTICS] = 20_000
    """Tokens that the model reads."""
    sequence_length: Annotated[RowLength, Shapes.IMPORTANCE | Shapes.DIAGNOSTICS] = 512
    """Tokens of one row."""
    batch_size: Annotated[Positive, Shapes.NOTHING] = 4
    """Sequences per rank and forward."""
    metrics: Annotated[tuple[str, ...], Shapes.IMPORTANCE] = ("block_influence", "angular")
    """Metrics and orders of removals, by name; `shoal list metrics` has all."""
    num_drop: Annotated[Positive | None, Shapes.IMPORTANCE] = None
    """Removals that greedy metrics make; None = a quarter of the layers."""
    scale_removals: Annotated[bool, Shapes.BY_CONTENT] = False
    """In orders of whole layers (sleb, greedy_kl, task_greedy) one that is gone still scales the state, by as much as
    it did on average: layers are chosen for a plan with prune.compensate (Prune&Comp, arXiv:2507.18212)."""
    images: Annotated[ImageRows | None, Shapes.BY_CONTENT] = None
    """Rows of images for the columns block_influence_images and answer_loss_images beside those of text, which take a
    forward per row for every layer and one more; None = text alone."""
    vision_states: Annotated[ImageRows | None, Shapes.BY_CONTENT] = None
    """Rows of images over which states of the vision tower are compared, and each is read in place of the deepest that
    is: vision_states.json. A forward per row for every state; None = they are not."""
    sweep: Sweeps | None = None
    """None = no task is scored."""
    diagnostics: Annotated[bool, Shapes.NOTHING] = False
    """Depth diagnostics too: diagnostics.json."""
    gradient_prompts: Annotated[int, Field(ge=0), Shapes.DIAGNOSTICS] = 0
    """Prompts over which diagnostics take integrated gradients, by far their most expensive part; 0 = none."""
    probes: Annotated[tuple[ProbeSet, ...], Shapes.PROBES] = ()
    """Labelled texts whose classes are looked for after every layer: probes.json."""
    heads: Heads | None = None
    """Scores of retrieval heads: heads.json. None = they are not measured."""
    beside: Annotated[Text | None, Shapes.NOTHING] = None
    """A model with as many layers, local or on the Hub, that `shoal depth` measures beside the teacher: its base, say,
    or a model that was distilled into its shape; None = only what is made from the teacher."""
    memory_gb: Annotated[Annotated[float, Field(gt=0, allow_inf_nan=False)] | None, Shapes.NOTHING] = None
    """GiB of memory for the weights; where they need more, the model is measured layer by layer from its files. None =
    hold it in memory."""

    def removals(self, num_layers: int) -> int:
        """Layers that greedy metrics remove of ``num_layers``."""
        return self.num_drop or max(1, num_layers // 4)


def contradictions(measure: Measure) -> Iterator[str]:
    """`place: what is wrong`, for everything that single fields cannot express."""
    sweep = measure.sweep
    ordered = {"sleb", "greedy_kl"} & set(measure.metrics) or (sweep is not None and sweep.greedy is not None)
    if measure.scale_removals and not ordered:
        yield (
            "measure.scale_removals: has no effect without an order of whole layers; name sleb or greedy_kl in "
            "measure.metrics, set measure.sweep.greedy, or leave it out"
        )
    if measure.scale_removals and measure.memory_gb is not None:
        yield "measure.scale_removals: needs the whole model in memory; leave measure.memory_gb out"
    if sweep is None:
        return
    if sweep.spare_heads and (measure.heads is None or not {"head", "kv_group"} & set(sweep.operators)):
        yield (
            "measure.sweep.spare_heads: needs measured heads and an operator that takes heads out; set measure.heads "
            "and the operator head or kv_group, or leave it out"
        )
    limits = {"limit": sweep.limit, **{f"limits.{task}": limit for task, limit in sweep.limits.items()}}
    for place, limit in limits.items():
        if limit is not None and limit < LEAST_ITEMS and sweep.tasks:
            yield (
                f"measure.sweep.{place}: with fewer than {LEAST_ITEMS} items no interval and no test can show an "
                f"effect (got {limit})"
            )
    if not sweep.tasks and not sweep.perplexity_tokens:
        yield "measure.sweep: scores nothing; name tasks, or set perplexity_tokens"
    if ("donor" in sweep.operators) != (sweep.donor is not None):
        yield "measure.sweep.donor: needs the operator donor, and the operator the donor; give both or none of them"
    if not sweep.operators and sweep.greedy is None:
        yield "measure.sweep.operators: is empty; name at least one, or set measure.sweep.greedy"
    if sweep.greedy_weights and sweep.greedy is None:
        yield "measure.sweep.greedy_weights: have no effect without measure.sweep.greedy; leave them out"
    if sweep.max_removed is not None and "cumulative" not in sweep.operators:
        yield "measure.sweep.max_removed: has no effect without the operator cumulative; leave it out"
    if isinstance(sweep.order, tuple) and "cumulative" not in sweep.operators:
        yield "measure.sweep.order: has no effect without the operator cumulative; leave it out"
