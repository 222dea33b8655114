"""Which layers go: the recipe's section `prune`, and what it must not say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from shoal.recipe.section import Above0, Data, Positive, RowLength, Section, Shapes, Text, TextSource

Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NOT_BESIDE_DROP = ("metric", "weights", "num_drop", "ratio", "target", "contiguous", "spare")
"""Settings that choose layers, which `drop` names."""


APART: dict[tuple[str, str], str] = {
    ("width", "compensate"): "ranks channels of the cut model as it is, without new tensors",
    ("width", "target"): "changes what layers save, which prune.target counts by whole layers",
}
"""Keys of two changes that do not go together, and why not."""


def short_for(key: str, *kinds: type) -> BeforeValidator:
    """A plain value of these types is short for {key: value}."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, kinds) else value)


@dataclass(frozen=True, kw_only=True)
class Calibration(Section):
    """Text that a model is run over to decide about its weights, and how it is run."""

    data: Annotated[Data, Shapes.BY_CONTENT] = field(
        default_factory=lambda: tuple(map(TextSource, ("python_docs", "docstrings", "instructions", "ability_texts")))
    )
    """Text of every kind that the model will read: what it is unlike gains little."""
    num_tokens: Annotated[Positive, Shapes.PLAN] = 65_536
    """Tokens of it. Compensation holds an eighth of them out, and its corrections need four for every feature of an
    MLP: this is enough for 14,336."""
    sequence_length: Annotated[RowLength, Shapes.PLAN] = 512
    batch_size: Annotated[Positive, Shapes.NOTHING] = 4
    """Rows at one time."""


@dataclass(frozen=True)
class Compensate(Calibration):
    """What makes up for dropped layers without training, folded into the weights of layers that stay."""

    method: Annotated[Literal["scale", "linear", "both"], Shapes.PLAN] = "both"
    """scale: a factor per gap, in the output maps of all layers above (after Prune&Comp, arXiv:2507.18212); linear: a
    correction of what the MLP below the gap writes (after ReplaceMe, arXiv:2505.02819); both: fitted jointly."""


@dataclass(frozen=True)
class Width(Calibration):
    """How wide the layers that stay are: as many MLP channels and key-value groups in each, those that write most."""

    intermediate_size: Annotated[Annotated[int | float, Field(gt=0, allow_inf_nan=False)] | None, Shapes.PLAN] = None
    """Channels of every layer's MLP that stay; below 1 their share, rounded down to what kernels can use: a multiple of
    128, or of the power of two that the model's own number is a multiple of. None = all."""
    kv_groups: Annotated[Positive | None, Shapes.PLAN] = None
    """Key-value heads of every layer that stay, each with the query heads that read it. None = all."""

    def __post_init__(self) -> None:
        if self.intermediate_size is None and self.kv_groups is None:
            raise ValueError("names nothing to narrow; give intermediate_size or kv_groups")
        if self.intermediate_size is not None and self.intermediate_size >= 1 and self.intermediate_size % 1:
            raise ValueError(
                f"intermediate_size: {self.intermediate_size} is no whole number of channels; give one, or a share "
                "below 1"
            )


@dataclass(frozen=True)
class Serving(Section):
    """How many sequences the student serves at once, and how long they are."""

    batch: Annotated[Positive, Shapes.PLAN] = 1
    """Sequences at once."""
    length: Annotated[Positive | None, Shapes.PLAN] = None
    """Tokens of each; None = 2,048, or the model's positions where those are fewer."""


@dataclass(frozen=True)
class MemoryTarget(Serving):
    """Memory of the weights, as they are stored, and of the cache of all sequences. A number alone is its limit."""

    limit: Annotated[Above0, Shapes.PLAN] = field(kw_only=True)
    """GiB at most."""


@dataclass(frozen=True)
class SpeedupTarget(Serving):
    """Speed of writing, predicted, as a multiple of the teacher's. A number alone is its factor."""

    factor: Annotated[Annotated[float, Field(gt=1, allow_inf_nan=False)], Shapes.PLAN] = field(kw_only=True)
    """Times the teacher's speed, at least."""


@dataclass(frozen=True)
class PlanTarget(Section):
    """What the student must reach, all of it at once: as few layers go, in the order of the metric, as reach it."""

    params: Annotated[Above0 | None, Shapes.PLAN] = None
    """Parameters at most, tied ones counted once."""
    memory_gb: Annotated[Annotated[MemoryTarget | None, short_for("limit", int, float)], Shapes.PLAN] = None
    """Memory of weights and cache; a number alone is a limit in GiB for one sequence."""
    speedup: Annotated[Annotated[SpeedupTarget | None, short_for("factor", int, float)], Shapes.PLAN] = None
    """Speed of writing over the teacher's; a number alone is a factor for one sequence. A prediction: the time is taken
    to be that of reading weights and cache from memory."""

    def __post_init__(self) -> None:
        if not any((self.params, self.memory_gb, self.speedup)):
            raise ValueError("names nothing to reach; give params, memory_gb or speedup")


@dataclass(frozen=True)
class Prune(Section):
    """Which layers go: an explicit list, or how many by which metric."""

    drop: Annotated[tuple[int, ...] | None, Shapes.PLAN] = None
    """Explicit 0-based teacher layers to drop; excludes metric, num_drop, ratio and contiguous."""
    metric: Annotated[str | None, Shapes.PLAN] = None
    """Column of importance.json that chooses: a metric, a greedy order, a swept task, or `ability/protocol`; None =
    block_influence, or angular when contiguous."""
    weights: Annotated[dict[str, Weight], Shapes.PLAN] = field(default_factory=dict)
    """Instead of one metric a mix of columns, by name: the weighted mean of each layer's rank under them, since shares,
    nats and cosines have only ranks in common."""
    num_drop: Annotated[Positive | None, Shapes.PLAN] = None
    """Layers to drop. Where neither drop nor ratio is
    given either, an eighth of the layers goes, at least one."""
    ratio: Annotated[Annotated[float, Field(gt=0, lt=1)] | None, Shapes.PLAN] = None
    """Share of the layers to drop, rounded down; give this or num_drop."""
    target: Annotated[PlanTarget | None, Shapes.PLAN, Field(exclude_if=lambda target: target is None)] = None
    """Instead of a number of layers, what the student must reach: parameters, memory, speed-up. As few layers go, in
    the order of the metric, as reach everything named."""
    contiguous: Annotated[bool, Shapes.PLAN] = False
    """Drop one run of neighbouring layers instead of the least important ones wherever they are."""
    protect: Annotated[tuple[int | Literal["cornerstone"], ...], Shapes.PLAN] = (0, -1)
    """Layers never dropped; negative counts from the end. `cornerstone` = those whose removal alone takes a swept task
    to chance (less than 0.1 of its score above chance is kept)."""
    spare: Annotated[tuple[Text, ...], Shapes.PLAN] = ()
    """Abilities, swept tasks, or `ability/protocol` on which nothing significant may be spent: layers that are critical
    there stay, and so does every layer with which the summed loss would become significant."""
    compensate: Annotated[Annotated[Compensate | None, short_for("method", str)], Shapes.BY_CONTENT] = None
    """What makes up for the dropped layers without training; None = nothing. A method's name alone says the rest by
    default."""
    width: Annotated[Width | None, Shapes.BY_CONTENT] = None
    """How wide the layers that stay are, chosen on the cut model; None = as wide as they were. With `drop: []` no layer
    goes."""


def contradictions(prune: Prune) -> Iterator[str]:
    """`place: what is wrong`, for everything that single fields cannot express."""
    if prune.compensate is not None and prune.drop == ():
        yield "prune.compensate: makes up for dropped layers, and prune.drop is empty; name layers, or leave it out"
    for (one, other), reason in APART.items():
        if getattr(prune, one) is not None and getattr(prune, other) is not None:
            yield (
                f"prune.{one}: {reason}; leave prune.{other} out, or change that student in a run of its own (model: "
                f"RUN_DIR/student, prune: {{drop: [], {one}: ...}})"
            )
    if prune.drop is not None:
        for name in NOT_BESIDE_DROP:
            if getattr(prune, name) not in (None, False, {}, ()):
                yield f"prune.{name}: has no effect beside prune.drop; give one of them"
        if "cornerstone" in prune.protect:
            yield "prune.protect: cornerstone has no effect beside prune.drop; leave it out"
    elif prune.num_drop is not None and prune.ratio is not None:
        yield "prune.ratio: prune.num_drop is given too; give one of them"
    if prune.weights and prune.metric is not None:
        yield "prune.weights: prune.metric is given too; give one of them"
    if prune.weights and prune.contiguous:
        yield "prune.weights: mixes scores of single layers; set prune.contiguous: false, or leave it out"
    if prune.target is not None and (prune.num_drop is not None or prune.ratio is not None):
        other = "ratio" if prune.num_drop is None else "num_drop"
        yield f"prune.target: says how much goes, and so does prune.{other}; give one of them"
