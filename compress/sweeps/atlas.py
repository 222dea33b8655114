"""The importance atlas: what every layer is worth by task and protocol, from the scores of all single-layer removals;
and how far columns rank the layers alike, beside how far each of them agrees with itself on other items.

Every quantity is INFERRED from the questions of arXiv 2510.02091; that study's own formulae and numbers are not public.
N items, L layers, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from shoal.artifacts.evaluation import LIKELIHOOD_PROTOCOLS, TaskScore
from shoal.artifacts.importance import Agreement, Atlas, DepthProfile, Estimate, ProtocolGap, Sweep, SweepColumn
from shoal.components import Component
from shoal.errors import UserError
from shoal.stats.intervals import Array, correlation

from .columns import summed
from .table import Measured, estimates, left_out_retentions, needed_items, restricted, retentions, table_of

CORNERSTONE_RETENTION = 0.1
NUM_DIVISIONS = 20
"""Random divisions of the items into three over which a column's reliability is averaged."""
DIVISION_SEED = 7


def build_atlas(
    intact: Sequence[TaskScore],
    removed: Sequence[Sequence[TaskScore]],
    *,
    metrics: Mapping[str, Sequence[float]] | None = None,
) -> Atlas:
    """The atlas from the intact model's scores and, for every layer, the scores of the model without that layer.

    ``metrics`` are other rankings of the layers (higher = keep) to compare with. Pure: equal input, equal atlas.

    Raises:
        UserError: no task, too few items, a layer without the scores of a task, or scores of other items or settings.
    """
    units = tuple(Component((layer,)) for layer in range(len(removed)))
    return atlas_of(*table_of("layer", units, intact, removed), metrics=metrics)


def atlas_of(
    sweep: Sweep, columns: Sequence[Measured], *, metrics: Mapping[str, Sequence[float]] | None = None
) -> Atlas:
    """The atlas from the table of single layers and what that was computed from (table_of)."""
    if not columns:
        raise UserError("sweep: no task was scored; name tasks in measure.sweep.tasks")
    gaps, notes = protocol_gaps(columns)
    return Atlas(
        sweep=sweep,
        gaps=gaps,
        depth=tuple(depth_profile(swept, column) for swept, column in zip(sweep.columns, columns, strict=True)),
        agreement=agreement(columns, metrics or {}),
        notes=tuple(notes),
    )


def layer_losses(column: SweepColumn) -> tuple[float, ...] | None:
    """What each layer's removal costs, never below 0: 1 - retention; the increase for nats; None where undefined."""
    if not column.higher_is_better:
        return tuple(max(0.0, effect.change.value) for effect in column.effects)
    kept = [effect.share_kept for effect in column.effects]
    return None if None in kept else tuple(max(0.0, 1 - retention.value) for retention in kept if retention is not None)


def cornerstones(sweep: Sweep) -> tuple[int, ...]:
    """Layers whose removal alone takes a task to chance: retention below 0.1 on any column (arXiv 2409.14381).

    That study names the phenomenon; the threshold and `any` are INFERRED. Items that people dispute do not count.

    Raises:
        UserError: no column has a retention.
    """
    columns = list(sweep.columns)
    if all(column.no_share for column in columns):
        raise UserError(
            "prune.protect: cornerstone needs a task on which the teacher is clearly above chance, and the ablation "
            "has none; add one to measure.sweep.tasks, or name the layers to protect"
        )
    return tuple(
        position
        for position in range(len(sweep.units))
        if any(
            (kept := column.effects[position].share_kept) is not None and kept.value < CORNERSTONE_RETENTION
            for column in columns
        )
    )


def protocol_gaps(columns: Sequence[Measured]) -> tuple[tuple[ProtocolGap, ...], list[str]]:
    """For every pair of a likelihood and a generation column of one ability; and why a pair has none."""
    gaps, notes = [], []
    for likely in (column for column in columns if column.task.protocol in LIKELIHOOD_PROTOCOLS):
        for written in (column for column in columns if column.task.protocol == "generation"):
            if likely.task.ability == written.task.ability:
                gap = _gap(likely, written)
                notes += [gap] if isinstance(gap, str) else []
                gaps += [gap] if isinstance(gap, ProtocolGap) else []
    return tuple(gaps), notes


def _gap(likely: Measured, written: Measured) -> ProtocolGap | str:
    """Per layer by square-and-add of both retentions' limits, with their correlation over the items."""
    names = f"protocol gap of {likely.task.task} and {written.task.task}"
    others = set(written.ids)
    shared = [identity for identity in likely.ids if identity in others]
    num_layers = likely.scores_NK.shape[1] - 1
    if len(shared) < needed_items(num_layers):
        return f"{names}: they share {len(shared)} items, {needed_items(num_layers)} are needed"
    likely, written = restricted(likely, shared), restricted(written, shared)
    kept_likely, kept_written = retentions(likely), retentions(written)
    if isinstance(kept_likely, str):
        return f"{names}: {likely.task.task}: {kept_likely}"
    if isinstance(kept_written, str):
        return f"{names}: {written.task.task}: {kept_written}"
    one_NL, other_NL = left_out_retentions(likely), left_out_retentions(written)
    value_L = np.array([a.value - b.value for a, b in zip(kept_likely, kept_written, strict=True)])
    moves = [kept_NL - kept_NL.mean(axis=0) for kept_NL in (one_NL, other_NL)]
    correlations = [correlation(one_N, other_N) for one_N, other_N in zip(*(own.T for own in moves), strict=True)]
    gaps = [
        summed([a, Estimate(-b.value, -b.high, -b.low)], np.array([[1.0, -r], [-r, 1.0]]))
        for a, b, r in zip(kept_likely, kept_written, correlations, strict=True)
    ]
    (mean,) = estimates(
        (one_NL - other_NL).mean(axis=1)[:, None],
        value_L.mean(keepdims=True),
        min(likely.effective_n, written.effective_n),
    )
    return ProtocolGap(
        ability=likely.task.ability,
        likelihood=likely.task.task,
        generation=written.task.task,
        n=len(shared),
        gaps=tuple(gaps),
        mean=mean,
    )


def depth_profile(swept: SweepColumn, column: Measured) -> DepthProfile:
    """Where in the depth of the model the importance of a column lies.

    Noise in single layers adds to w wherever it lies, which draws a centroid towards the middle of the model.

    The interval tells the luck of the items, not this: with 200 items it covers 93 to 94 % where losses are spread over
    layers, but too little where one end of the model has all of them and the others are pure noise.
    """
    losses = layer_losses(swept)
    if losses is None:
        return DepthProfile(swept.task, None, swept.no_share)
    if len(losses) < 2 or sum(losses) == 0:
        return DepthProfile(swept.task, None, "no layer's removal makes it worse")
    if swept.higher_is_better:
        losses_NL = np.maximum(0.0, 1 - left_out_retentions(column))
    else:
        losses_NL = np.maximum(0.0, column.left_out_NK[:, 1:] - column.left_out_NK[:, :1])
    loss_L = np.array(losses)
    value, left_out_N = centroid(loss_L, losses_NL, np.linspace(0.0, 1.0, len(losses)))
    (centre,) = estimates(left_out_N[:, None], np.array([value]), column.effective_n)
    return DepthProfile(swept.task, centre)


def centroid(loss_L: Array, losses_NL: Array, depth_L: Array) -> tuple[float, Array]:
    """The mean of ``depth_L`` weighted with ``loss_L``, and the same without each of the items; where these leave no
    loss, the former."""
    value, total_N = float(loss_L @ depth_L / loss_L.sum()), losses_NL.sum(axis=1)
    return value, np.divide(losses_NL @ depth_L, total_N, out=np.full_like(total_N, value), where=total_N > 0)


def agreement(columns: Sequence[Measured], metrics: Mapping[str, Sequence[float]]) -> Agreement:
    """Rank correlations of all task columns and metrics.

    Two columns that rank alike still correlate below 1, because each is measured on finite items: that bound is
    `ceiling`, and only a correlation well below it says that the columns mean different things.
    """
    scores = {name: tuple(values) for name, values in metrics.items()}
    scores |= {column.task.task: importances(column) for column in columns}
    reliabilities = {column.task.task: reliability(column) for column in columns}
    known = [reliabilities.get(name) for name in scores]
    rows = list(scores.values())
    return Agreement(
        columns=tuple(scores),
        spearman=tuple(tuple(spearman(row, other) for other in rows) for row in rows),
        ceiling=tuple(
            tuple(None if own is None or other is None else math.sqrt(own * other) for other in known) for own in known
        ),
    )


def importances(column: Measured) -> tuple[float, ...]:
    """How much worse the score is without each layer. Higher = keep."""
    return tuple(_importances(column, np.arange(len(column.ids))).tolist())


def spearman(first: Sequence[float] | Array, second: Sequence[float] | Array) -> float | None:
    """Rank correlation with average ranks for equal values; None where one side holds a single value only."""
    ranks = [stats.rankdata(values) for values in (first, second)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1].clip(-1, 1))


def reliability(column: Measured) -> float | None:
    """Rank correlation that is expected of a column with itself on as many other items: by that between disjoint thirds
    of its items, averaged over random divisions; None where a third tells no layers apart."""
    rng, correlations = np.random.default_rng(DIVISION_SEED), []
    for _ in range(NUM_DIVISIONS):
        thirds = [_importances(column, rows) for rows in np.array_split(rng.permutation(len(column.ids)), 3)]
        correlations += [spearman(thirds[a], thirds[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    known = [value for value in correlations if value is not None]
    if not known:
        return None
    mean = float(np.mean(known))
    # from a third of the items to all of them (Spearman 1910, Brown 1910); nothing is reliable below 0
    return 3 * mean / (1 + 2 * mean) if mean > 0 else 0.0


def _importances(column: Measured, rows: NDArray[np.intp]) -> Array:
    mean_K = np.average(column.scores_NK[rows], axis=0, weights=column.weights_N[rows])
    # means of 0/1 scores that are equal must be equal in floating point too, or their ranks would be noise
    return np.round(mean_K[0] - mean_K[1:] if column.task.higher_is_better else mean_K[1:] - mean_K[0], 12)
