"""How models that descend from each other use their depth: what is left without each layer, side by side.

"Reasoning relies on deep layers, yet can be reshaped through distillation" (arXiv 2510.02091) is a claim about two
models, so both are swept over the same items, and what moved is told with intervals over these. Layers are aligned by
the teacher's numbers. That study's formulae are not public: every quantity here is INFERRED.

N items, L layers, R resamples.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.depth import DepthUse, Diagnostics, Moved, RoleUse, TaskUse
from shoal.artifacts.importance import Estimate, Importance, SweepColumn
from shoal.errors import UserError
from shoal.stats.bootstrap import bias_corrected, effective_n, expanded_percentiles, resampled_means
from shoal.stats.intervals import Array

from .agreement import spearman
from .items import read_items

SAME = ("ability", "protocol", "metric", "chance", "higher_is_better", "n", "version", "num_fewshot")
"""Fields in which one task's columns must agree over models."""


@dataclass(frozen=True)
class SweptRole:
    """What was measured of one model: its importance.json, and the items of its sweep in the same folder."""

    role: str
    folder: Path

    @cached_property
    def importance(self) -> Importance:
        """Its importance.json.

        Raises:
            UserError: it is missing or has no sweep of layers.
        """
        importance = Importance.read(self.folder / Importance.FILE)
        if importance.atlas is None:
            raise UserError(
                f"{self.folder / Importance.FILE}: has no sweep of layers, which tells what each is used for; name "
                "tasks in measure.sweep.tasks"
            )
        return importance

    @property
    def kept(self) -> tuple[int, ...]:
        """The teacher's numbers of its layers."""
        return self.importance.teacher_layers

    @cached_property
    def columns(self) -> dict[str, SweepColumn]:
        """Its columns by task."""
        assert self.importance.atlas is not None
        return {column.task: column for column in self.importance.atlas.columns}

    @property
    def diagnostics(self) -> Diagnostics | None:
        """Its diagnostics.json; None where there is none."""
        file = self.folder / Diagnostics.FILE
        return Diagnostics.read(file) if file.is_file() else None

    def items(self, task: str) -> dict[str, Array]:
        """Item -> (2 + L,): its weight, its score with all layers, and without each of them."""
        return read_items(self.folder / "sweep" / "layer", task, num_units=self.importance.num_layers)


def depth_use(models: Sequence[SweptRole], *, num_layers: int, provenance: Provenance) -> DepthUse:
    """What each of ``models`` uses its layers for, and what moved between any two, the first before the others.

    ``num_layers`` are those of the teacher, whose numbers all of them go by.

    Raises:
        UserError: no task in common, or one that was asked in different ways.
    """
    tasks = [task for task in models[0].columns if all(task in model.columns for model in models)]
    if not tasks:
        names = ", ".join(f"{model.role}: {', '.join(model.columns)}" for model in models)
        raise UserError(f"depth: the models have no swept task in common ({names}); sweep them over the same tasks")
    depths = {model.role: model.diagnostics for model in models}
    return DepthUse(
        provenance=provenance,
        num_layers=num_layers,
        kept={model.role: model.kept for model in models},
        tasks=tuple(_task(task, models, num_layers) for task in tasks),
        effective_depth={role: depth.effective_depth for role, depth in depths.items() if depth is not None},
    )


@dataclass(frozen=True)
class _Left:
    """What is left of one task without each layer of one model."""

    value_L: Array
    resampled_RL: Array
    whole: float
    """Value of no loss: 1 for shares, 0 for nats, which count with a minus."""
    depth_L: Array
    """Relative depths in the teacher."""

    def centroids(self) -> tuple[float, Array] | None:
        """Mean depth of what is lost, and the same in every resample (NaN where nothing is); None = nothing is lost."""
        losses = [np.maximum(0.0, self.whole - of) for of in (self.value_L, self.resampled_RL)]
        if losses[0].sum() == 0:
            return None
        with np.errstate(invalid="ignore", divide="ignore"):
            value, resampled_R = (loss @ self.depth_L / loss.sum(axis=-1) for loss in losses)
        return float(value), resampled_R


def _task(task: str, models: Sequence[SweptRole], num_layers: int) -> TaskUse:
    columns = {model.role: model.columns[task] for model in models}
    first = columns[models[0].role]
    for role, column in columns.items():
        for field in SAME:
            if getattr(column, field) != getattr(first, field):
                raise UserError(
                    f"depth: {task}: {field} is {getattr(first, field)!r} of {models[0].role} and "
                    f"{getattr(column, field)!r} of {role}; sweep both with the same settings"
                )
    left, n = _left(task, models, columns, num_layers)
    roles = {model.role: _role(columns[model.role], left.get(model.role), n) for model in models}
    kept = {model.role: model.kept for model in models}
    pairs = itertools.combinations([model.role for model in models if model.role in left], 2)
    return TaskUse(
        task=task,
        **{field: getattr(first, field) for field in ("ability", "protocol", "metric", "higher_is_better", "n")},
        roles=roles,
        moved=tuple(_moved(pair, left, kept, n, higher=first.higher_is_better) for pair in pairs),
    )


def _left(
    task: str, models: Sequence[SweptRole], columns: Mapping[str, SweepColumn], num_layers: int
) -> tuple[dict[str, _Left], float]:
    """By role, of those of which there is a share or nats, in the same resamples of the same items."""
    items = {model.role: model.items(task) for model in models}
    shared = [item for item in items[models[0].role] if all(item in own for own in items.values())]
    if len(shared) < columns[models[0].role].n:
        raise UserError(f"depth: {task}: {len(shared)} items are the same for all models; sweep the same data")
    stacked = {role: np.array([own[item] for item in shared]) for role, own in items.items()}
    weights_N = next(iter(stacked.values()))[:, 0]
    n = effective_n(weights_N)
    left: dict[str, _Left] = {}
    for model in models:
        column = columns[model.role]
        if column.higher_is_better and column.no_retention:
            continue
        scores_NK = stacked[model.role][:, 1:]
        value_K, means_RK = np.average(scores_NK, axis=0, weights=weights_N), resampled_means(scores_NK, weights_N)
        depth_L = np.array(model.kept) / max(1, num_layers - 1)
        if column.higher_is_better:
            with np.errstate(invalid="ignore", divide="ignore"):
                value_L, resampled_RL = (
                    (of[..., 1:] - column.chance) / (of[..., :1] - column.chance) for of in (value_K, means_RK)
                )
            # a resample in which the intact model is at chance has no share
            resampled_RL = np.where(means_RK[:, :1] > column.chance, resampled_RL, np.nan)
            left[model.role] = _Left(value_L, resampled_RL, 1.0, depth_L)
        else:
            value_L, resampled_RL = (of[..., :1] - of[..., 1:] for of in (value_K, means_RK))
            left[model.role] = _Left(value_L, resampled_RL, 0.0, depth_L)
    return left, n


def _role(column: SweepColumn, left: _Left | None, n: float) -> RoleUse:
    if left is None:
        return RoleUse(column.intact, (), None, len(column.critical), column.no_retention)
    sign = 1.0 if column.higher_is_better else -1.0
    usable = ~np.isnan(left.resampled_RL).any(axis=1)
    centroid = left.centroids()
    return RoleUse(
        intact=column.intact,
        left=tuple(_estimates(sign * left.value_L, sign * left.resampled_RL[usable], n)),
        centroid=None if centroid is None else _clipped(*centroid),
        num_critical=len(column.critical),
    )


def _moved(
    pair: tuple[str, str], left: Mapping[str, _Left], kept: Mapping[str, tuple[int, ...]], n: float, *, higher: bool
) -> Moved:
    before, after = (left[role] for role in pair)
    layers = sorted(set(kept[pair[0]]) & set(kept[pair[1]]))
    places = [[kept[role].index(layer) for layer in layers] for role in pair]
    sign = 1.0 if higher else -1.0
    values = [sign * of.value_L[own] for of, own in zip((before, after), places, strict=True)]
    change_RL = sign * (after.resampled_RL[:, places[1]] - before.resampled_RL[:, places[0]])
    change_RL = change_RL[~np.isnan(change_RL).any(axis=1)]
    centroids = [of.centroids() for of in (before, after)]
    moved = None
    if centroids[0] is not None and centroids[1] is not None:
        (first, first_R), (second, second_R) = centroids[0], centroids[1]
        moved = _clipped(second - first, second_R - first_R)
    return Moved(
        before=pair[0],
        after=pair[1],
        layers=tuple(layers),
        left=tuple(_estimates(values[1] - values[0], change_RL, n)),
        centroid=moved,
        rank_correlation=spearman(*values),
    )


def _estimates(value_L: Array, resampled_RL: Array, n: float) -> Iterator[Estimate]:
    limits = expanded_percentiles(resampled_RL, value_L, n)
    for value, low, high in zip(value_L.tolist(), *(limit_L.tolist() for limit_L in limits), strict=True):
        yield Estimate(value, low, high)


def _clipped(value: float, resampled_R: Array) -> Estimate:
    """An estimate of what rests on losses clipped at zero, see bias_corrected; resamples without a loss have none."""
    return Estimate(value, *bias_corrected(resampled_R[~np.isnan(resampled_R)], value))
