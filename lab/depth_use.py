"""How models that descend from each other use their depth: what is left without each layer, side by side:
depth_use.json.

"Reasoning relies on deep layers, yet can be reshaped through distillation" (arXiv 2510.02091) is a claim about two
models, so both are swept over the same items, and what moved is told with intervals over these. Layers are aligned by
the teacher's numbers. That study's formulae are not public: every quantity here is INFERRED.

N items, L layers.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from shoal.artifacts.artifact import Artifact, Provenance
from shoal.artifacts.importance import Estimate, Importance, SweepColumn
from shoal.artifacts.plan import Plan
from shoal.compress.sweeps.atlas import centroid
from shoal.compress.sweeps.table import estimates, read_items
from shoal.errors import UserError
from shoal.eval.compare.comparable import require_same_tokenizer
from shoal.figures.atlas import band
from shoal.figures.style import FAINT, ROLE_STYLE, clean, figure_style, heading, legend_above, panels
from shoal.launch.verbs.evaluate import require_models_of_this_run, roles
from shoal.launch.verbs.measure import measure
from shoal.launch.verbs.run import Run, resolved
from shoal.stats.intervals import Array, effective_n, left_out_means
from shoal.task_words import task_words

from .diagnostics import EffectiveDepth, diagnostics
from .part import FOLDER, identity, in_interval, made, told
from .settings import DepthUse as Settings
from .settings import Diagnostics as Diagnosing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

BESIDE = "beside"
CHEAPEST_METRIC = "block_influence"
"""What models other than the teacher are measured by besides the sweep, since nothing is chosen for them."""
OTHER = ("#0f9d75", "^")
"""Colour and marker of a model beside the teacher."""


@dataclass(frozen=True)
class RoleUse:
    """How one model uses its layers for one task; one number per layer that it has."""

    baseline: Estimate
    left: tuple[Estimate, ...]
    """Share of the score above chance that is left without each layer, or nats per token that this adds; empty where
    there is no share."""
    centroid: Estimate | None
    """Mean relative depth of what is lost without each layer, in the teacher's numbers: 0 = its first layer, 1 = its
    last. None where no layer costs anything or there is no share."""
    num_critical: int
    """Layers without which the task is significantly worse."""
    reason: str = ""
    """Reason why there is no share; empty = there is."""


@dataclass(frozen=True)
class Moved:
    """What moved from one model to another, over the same items: after - before."""

    before: str
    after: str
    """Role of the later model."""
    layers: tuple[int, ...]
    """Layers that both have, by the teacher's numbers."""
    left: tuple[Estimate, ...]
    """Change of what is left without each of ``layers``; above 0 (of nats: below) = less depends on it than before."""
    centroid: Estimate | None
    """Change of the centroid; above 0 = deeper. Includes that layers are gone."""


@dataclass(frozen=True)
class TaskUse:
    """One task under one protocol, over all models."""

    task: str
    ability: str
    protocol: str
    metric: str
    higher_is_better: bool
    n: int
    roles: dict[str, RoleUse]
    moved: tuple[Moved, ...]


@dataclass(frozen=True)
class DepthUse(Artifact):
    """depth_use.json: how models that descend from each other use their layers, aligned by the teacher's numbers."""

    FILE: ClassVar[str] = "depth_use.json"

    num_layers: int
    """Layers of the teacher."""
    kept: dict[str, tuple[int, ...]]
    """Role -> the teacher's numbers of its layers."""
    tasks: tuple[TaskUse, ...]
    effective_depth: dict[str, dict[str, EffectiveDepth]]
    """Role -> rule -> effective depth, in the model's own numbers; roles that were not diagnosed are absent."""

    def depth_in_words(self, role: str, rule: str) -> str:
        """`layer 14 (50 %)` by the teacher's numbers, or why there is none."""
        depth = self.effective_depth[role][rule]
        if depth.layer is None or depth.ratio is None:
            return depth.reason
        return f"layer {self.kept[role][depth.layer]} ({100 * depth.ratio:.0f} %)"

    def in_words(self) -> str:
        """A few lines for the log: centroids and critical layers by model, and what moved."""
        lines = [f"{len(self.tasks)} tasks over {', '.join(self.kept)}, by the teacher's {self.num_layers} layers"]
        for task in self.tasks:
            for role, own in task.roles.items():
                centroid = "no centroid" if own.centroid is None else f"centroid {in_interval(own.centroid, '.2f')}"
                lines.append(f"  {task.task}: {role}: {own.reason or centroid}, {own.num_critical} critical layers")
            for moved in task.moved:
                clear = [layer for layer, change in zip(moved.layers, moved.left, strict=True) if change.is_clear]
                centroid = "" if moved.centroid is None else f"centroid {in_interval(moved.centroid, '+.2f')}, "
                told = f"{centroid}{len(clear)} of {len(moved.layers)} layers with an interval off 0"
                lines.append(f"  {task.task}: {moved.before} to {moved.after}: {told}")
        for role, rules in self.effective_depth.items():
            told = ", ".join(f"{rule}: {self.depth_in_words(role, rule)}" for rule in rules)
            lines.append(f"  effective depth of {role}: {told}")
        return "\n".join(lines)


def work(run: Run, settings: Settings) -> str:
    """What moved from one model to the next, in words: all are swept over the tasks of measure.sweep.

    Raises:
        UserError: no swept tasks in the recipe, nothing to compare the teacher with, or a model beside it of another
            number of layers or with another tokenizer.
    """
    models = _runs(run, settings)
    swept = []
    for role, (own, kept) in models.items():
        log.info("depth: %s", role)
        measure(own)
        swept.append(SweptRole(role, own.dir, kept, diagnostics(own, Diagnosing()).effective_depth))
    importances = {f"{own.role}, importance": own.importance.provenance.fingerprint for own in swept}
    inputs = identity(run, settings, **importances)

    def used(provenance: Provenance) -> DepthUse:
        return depth_use(swept, num_layers=run.num_layers, provenance=provenance)

    return told(run, made(run, DepthUse, inputs, used, depth_use_figure))


def _runs(run: Run, settings: Settings) -> dict[str, tuple[Run, tuple[int, ...]]]:
    """What is measured by role, and the teacher's numbers of its layers: the teacher as always, every other model over
    its sweep of layers alone, as a run of its own."""
    sweep, every = run.recipe.measure.sweep, tuple(range(run.num_layers))
    if sweep is None or "layer" not in sweep.operators:
        raise UserError("shoal lab depth_use: needs layers swept over tasks; name some in measure.sweep.tasks")
    found = {role: folder for role, folder in roles(run).items() if role in ("pruned", "distilled")}
    require_models_of_this_run(run, {"teacher": run.teacher, **found})
    kept = dict.fromkeys(found, Plan.load(run.dir / Plan.FILE).keep if found else ())
    if settings.beside is not None:
        found[BESIDE], kept[BESIDE] = resolved(settings.beside, None), every
        require_same_tokenizer({"teacher": run.teacher, **found}, trust_remote_code=run.recipe.trust_remote_code)
    if not found:
        raise UserError(f"shoal lab depth_use: {run.dir} has no pruned model yet; run `shoal prune`, or set beside")
    layers_alone = replace(sweep, operators=("layer",))
    runs = {"teacher": (run, every)}
    for role, folder in found.items():
        recipe = replace(
            run.recipe,
            model=str(folder),
            revision=None,
            run_dir=str(run.dir / FOLDER / "depth" / role),
            measure=replace(run.recipe.measure, sweep=layers_alone, metrics=(CHEAPEST_METRIC,)),
        )
        runs[role] = Run(recipe, run.numerics), kept[role]
        if runs[role][0].num_layers != len(kept[role]):
            raise UserError(
                f"shoal lab depth_use: {folder} has {runs[role][0].num_layers} layers and not {len(kept[role])}"
            )
    return runs


@dataclass(frozen=True)
class SweptRole:
    """What was measured of one model: importance.json and diagnostics.json of its run."""

    role: str
    folder: Path
    kept: tuple[int, ...]
    """The teacher's numbers of its layers."""
    effective_depth: dict[str, EffectiveDepth] = field(default_factory=dict)

    @cached_property
    def importance(self) -> Importance:
        """Its importance.json."""
        return Importance.load(self.folder / Importance.FILE)

    @cached_property
    def columns(self) -> dict[str, SweepColumn]:
        """Its columns by task."""
        atlas = self.importance.atlas
        return {} if atlas is None else {column.task: column for column in atlas.columns}

    def items(self, task: str) -> dict[str, Array]:
        """Item -> (2 + L,): its weight, its score with all layers, and without each of them."""
        return read_items(self.folder / "sweep" / "layer", task, num_units=self.importance.num_layers)


def depth_use(models: Sequence[SweptRole], *, num_layers: int, provenance: Provenance) -> DepthUse:
    """What each of ``models`` uses its layers for, and what moved between any two, the first before the others.

    ``num_layers`` are those of the teacher, whose numbers all of them go by.
    """
    return DepthUse(
        provenance=provenance,
        num_layers=num_layers,
        kept={model.role: model.kept for model in models},
        tasks=tuple(_task(task, models, num_layers) for task in models[0].columns),
        effective_depth={model.role: model.effective_depth for model in models if model.effective_depth},
    )


@dataclass(frozen=True)
class _Left:
    """What is left of one task without each layer of one model."""

    value_L: Array
    left_out_NL: Array
    """The same without each of the items."""
    whole: float
    """Value of no loss: 1 for shares, 0 for nats, which count with a minus."""
    depth_L: Array
    """Relative depths in the teacher."""

    def centroids(self) -> tuple[float, Array] | None:
        """Mean depth of what is lost, and the same without each of the items; None = nothing is lost."""
        loss_L, losses_NL = (np.maximum(0.0, self.whole - of) for of in (self.value_L, self.left_out_NL))
        return None if loss_L.sum() == 0 else centroid(loss_L, losses_NL, self.depth_L)


def _task(task: str, models: Sequence[SweptRole], num_layers: int) -> TaskUse:
    columns = {model.role: model.columns[task] for model in models}
    first = columns[models[0].role]
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
    """By role, of those of which there is a share or nats, over the same items."""
    items = {model.role: model.items(task) for model in models}
    stacked = {role: np.array([own[item] for item in items[models[0].role]]) for role, own in items.items()}
    weights_N = next(iter(stacked.values()))[:, 0]
    n = effective_n(weights_N)
    left: dict[str, _Left] = {}
    for model in models:
        column = columns[model.role]
        if column.higher_is_better and column.no_share:
            continue
        scores_NK = stacked[model.role][:, 1:]
        means = np.average(scores_NK, axis=0, weights=weights_N), left_out_means(scores_NK, weights_N)
        depth_L = np.array(model.kept) / max(1, num_layers - 1)
        if column.higher_is_better:
            value_L, left_out_NL = ((of[..., 1:] - column.chance) / (of[..., :1] - column.chance) for of in means)
        else:
            value_L, left_out_NL = (of[..., :1] - of[..., 1:] for of in means)
        left[model.role] = _Left(value_L, left_out_NL, float(column.higher_is_better), depth_L)
    return left, n


def _role(column: SweepColumn, left: _Left | None, n: float) -> RoleUse:
    if left is None:
        return RoleUse(column.baseline, (), None, len(column.critical), column.no_share)
    sign = 1.0 if column.higher_is_better else -1.0
    found = left.centroids()
    return RoleUse(
        baseline=column.baseline,
        left=estimates(sign * left.left_out_NL, sign * left.value_L, n),
        centroid=None if found is None else _centre(*found, n),
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
    change_NL = sign * (after.left_out_NL[:, places[1]] - before.left_out_NL[:, places[0]])
    centroids = [of.centroids() for of in (before, after)]
    moved = None
    if centroids[0] is not None and centroids[1] is not None:
        (first, first_N), (second, second_N) = centroids[0], centroids[1]
        moved = _centre(second - first, second_N - first_N, n)
    return Moved(
        before=pair[0],
        after=pair[1],
        layers=tuple(layers),
        left=estimates(change_NL, values[1] - values[0], n),
        centroid=moved,
    )


def _centre(value: float, left_out_N: Array, n: float) -> Estimate:
    return estimates(left_out_N[:, None], np.array([value]), n)[0]


def depth_use_figure(use: DepthUse) -> Figure:
    """One panel per task: what is left without each layer, with 95 % intervals, and the centroids above the curves."""
    figure, axes = panels([2.1] * len(use.tasks))
    with figure_style():
        for ax, task in zip(axes, use.tasks, strict=True):
            _draw(ax, use, task)
        axes[-1].set_xlabel("layer, by the teacher's numbers")
        legend_above(figure, axes)
    return figure


def _draw(ax: Axes, use: DepthUse, task: TaskUse) -> None:
    for role, own in task.roles.items():
        if not own.left:
            continue
        colour, marker = ROLE_STYLE.get(role, OTHER)
        band(ax, use.kept[role], own.left, colour, ("-", marker), label=clean(role))
        if own.centroid is not None:
            place = own.centroid.value * (use.num_layers - 1)
            ax.plot([place], [1.04], marker, color=colour, ms=7, transform=ax.get_xaxis_transform(), clip_on=False)
    ax.set_xlim(-0.5, use.num_layers - 0.5)
    ax.axhline(1.0 if task.higher_is_better else 0.0, color=FAINT, lw=1)
    quantity = "share left" if task.higher_is_better else f"{task.metric} added"
    words = task_words(task.task, ability=task.ability, protocol=task.protocol, metric=task.metric)
    ax.set_title(f"{heading(', '.join(words))}: {quantity.replace('_', ' ')} (n = {task.n})", pad=12)
    ax.grid(axis="y")
