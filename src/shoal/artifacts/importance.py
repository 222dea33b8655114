"""importance.json: scores of layers and of runs of them, greedy orders, and what sweeps have measured.

A sweep is one table of components by columns for every operator. An operator takes one component out of the
model at a time (a layer, a half of one); a column is one task under one protocol. Only numbers per column are kept
here; scores per item lie beside the run's other files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from shoal.artifacts.artifact import Artifact, Tabular
from shoal.components import Component


@dataclass(frozen=True)
class Removal:
    """One step of a greedy order."""

    unit: Component
    score: float
    """The order's objective after this step, with everything before it gone too."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval lies to one side of 0."""
        return not self.low <= 0 <= self.high


@dataclass(frozen=True)
class Effect:
    """What one component's removal does to one column."""

    score: Estimate
    change: Estimate
    """Score without the component - baseline score (with all components), over the same items."""
    share_kept: Estimate | None
    """(score - chance) / (baseline score - chance); None if there is none, see SweepColumn.no_share."""
    p_value: float
    adjusted_p: float
    """After Holm's correction over the components of the column."""
    critical: bool
    """Significantly worse than the baseline at the 5 % level after Holm's correction."""
    malformed: float | None = None
    """Share of the written texts from which no answer can be read; None where nothing is written."""
    repetition: float | None = None
    """Share of the written texts that end in a loop."""


@dataclass(frozen=True)
class SweepColumn:
    """One task under one protocol over all components of a sweep."""

    task: str
    ability: str
    protocol: str
    metric: str
    chance: float
    higher_is_better: bool
    n: int
    version: str
    num_fewshot: int
    baseline: Estimate
    test: Literal["mcnemar-exact", "paired-t"]
    effects: tuple[Effect, ...]
    """One per component, in the order of the sweep's units."""
    no_share: str = ""
    """Why there is no share kept; empty if there is one."""
    malformed: float | None = None
    """Of the baseline, as in Effect."""
    repetition: float | None = None
    correlation: tuple[tuple[float, ...], ...] = ()
    """Row i: correlation of the change of component i with those of components 0..i, over items. What the interval of a
    sum of changes needs; empty where components are no single layers."""

    @property
    def label(self) -> str:
        """`ability/protocol`."""
        return f"{self.ability}/{self.protocol}"

    @property
    def importances(self) -> tuple[float, ...]:
        """How much worse the score is without each component, in the metric's unit. Higher = keep."""
        sign = -1.0 if self.higher_is_better else 1.0
        return tuple(sign * effect.change.value + 0.0 for effect in self.effects)  # + 0.0: no minus before a zero

    @property
    def losses(self) -> tuple[Estimate, ...]:
        """The same with its intervals."""
        changes = [effect.change for effect in self.effects]
        if self.higher_is_better:
            changes = [Estimate(0.0 - change.value, 0.0 - change.high, 0.0 - change.low) for change in changes]
        return tuple(changes)

    @property
    def critical(self) -> tuple[int, ...]:
        """Positions of the components without which the score is significantly worse."""
        return tuple(position for position, effect in enumerate(self.effects) if effect.critical)


@dataclass(frozen=True)
class Sweep:
    """Every component of one operator by every column."""

    operator: str
    """As in measure.sweep.operators."""
    units: tuple[Component, ...]
    columns: tuple[SweepColumn, ...]

    def title(self, column: SweepColumn) -> str:
        """`ability/protocol` of one of its columns, or the task's name where that stands for several tasks."""
        alone = sum(other.label == column.label for other in self.columns) == 1
        return column.label if alone else column.task


@dataclass(frozen=True)
class ProtocolGap:
    """Share kept by likelihood minus share kept in generated text, on the items that both columns share."""

    ability: str
    likelihood: str
    """Task of the likelihood or continuation column."""
    generation: str
    n: int
    """Shared items."""
    gaps: tuple[Estimate, ...]
    """One per layer. Above 0: likelihood hides damage that generated text shows."""
    mean: Estimate
    """Over all layers."""


@dataclass(frozen=True)
class DepthProfile:
    """Where in the depth of the model a column's importance lies, by the loss w of every layer.

    w = max(0, 1 - share kept); max(0, increase) for nats.
    """

    task: str
    centroid: Estimate | None
    """Mean relative depth l / (L - 1), weighted with w; None where no layer costs anything or w is undefined."""
    reason: str = ""


@dataclass(frozen=True)
class Agreement:
    """How far columns rank the layers alike."""

    columns: tuple[str, ...]
    """Metric names and task names."""
    spearman: tuple[tuple[float | None, ...], ...]
    """None where one of the two ranks all layers equal."""
    ceiling: tuple[tuple[float | None, ...], ...]
    """sqrt(reliability * reliability): what rank correlation two columns can be expected to reach if they mean the same
    and only differ by the noise of their items. None where a reliability is not known."""


@dataclass(frozen=True)
class Atlas:
    """What every layer is worth by task and protocol: the sweep of single-layer removals and what follows from it."""

    sweep: Sweep
    gaps: tuple[ProtocolGap, ...]
    depth: tuple[DepthProfile, ...]
    """One per column."""
    agreement: Agreement
    notes: tuple[str, ...] = ()
    """What could not be computed, and why."""

    @property
    def columns(self) -> tuple[SweepColumn, ...]:
        """Tasks by protocols."""
        return self.sweep.columns

    def of(self, name: str) -> Iterator[SweepColumn]:
        """The columns that ``name`` means: a task, an ability, or `ability/protocol`."""
        return (column for column in self.columns if name in (column.task, column.ability, column.label))


@dataclass(frozen=True, repr=False)
class Importance(Tabular, Artifact):
    """importance.json: the scores of every layer by metric. Higher = keep.

    Example:
        >>> shoal.Importance.load("runs/mine").layers["block_influence"]
    """

    FILE: ClassVar[str] = "importance.json"
    INTERNAL = ("errors", "atlas", "sweeps")

    num_layers: int
    num_tokens: int
    """Real (unpadded) tokens that were averaged over."""
    layers: dict[str, tuple[float, ...]]
    """Metric name -> one score per layer."""
    runs: dict[str, tuple[tuple[float, ...], ...]]
    """Metric name -> scores[n - 1][l] of the run of n layers that starts at layer l; row n - 1 has num_layers - n + 1
    entries."""
    errors: dict[str, tuple[float | None, ...]] = field(default_factory=dict)
    """Standard errors of the scores of metrics that are estimated from samples; None = not known."""
    orders: dict[str, tuple[Removal, ...]] = field(default_factory=dict)
    """Greedy metric name -> what it removes, first removal first."""
    atlas: Atlas | None = None
    """Single layers by task and protocol; None where no task was swept."""
    sweeps: dict[str, Sweep] = field(default_factory=dict)
    """Operator -> its table, for every operator but that of single layers."""

    def contradictions(self) -> Iterator[str]:
        layers = [("layers", name, len(scores), 0) for name, scores in self.layers.items()]
        runs = [("runs", name, len(row), n) for name, rows in self.runs.items() for n, row in enumerate(rows)]
        for field_name, metric, count, shorter in (*layers, *runs):
            if count != (expected := self.num_layers - shorter):
                yield f"{field_name}.{metric}: has {count} scores instead of {expected}"

    def title(self) -> str:
        """Number of layers and tokens, in one line."""
        return f"importance of {self.num_layers} layers on {self.num_tokens:,} tokens; higher = keep"

    def body(self) -> dict[str, Any]:
        columns = self.atlas.columns if self.atlas else ()
        return super().body() | {"tasks": {column.task: list(column.importances) for column in columns}}

    def rows(self) -> list[dict[str, Any]]:
        """One row per layer: its score by every metric (of this single layer), the standard error of estimated scores,
        and its importance for every task of the ablation."""
        columns: dict[str, Mapping[int, Any]] = {name: dict(enumerate(scores)) for name, scores in self.layers.items()}
        columns |= {f"{name}_error": dict(enumerate(errors)) for name, errors in self.errors.items()}
        columns |= {name: dict(enumerate(scores[0])) for name, scores in self.runs.items()}
        if self.atlas is not None:
            sweep = self.atlas.sweep
            layers = [unit.layers[0] for unit in sweep.units]
            columns |= {sweep.title(of): dict(zip(layers, of.importances, strict=True)) for of in sweep.columns}
        return [
            {"layer": layer, **{name: values.get(layer) for name, values in columns.items()}}
            for layer in range(self.num_layers)
        ]
