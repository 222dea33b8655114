"""Which layers go: from an explicit list, or from importance scores that lie on disk."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.artifacts.importance import Importance, SweepColumn
from shoal.errors import UserError
from shoal.recipe.prune import Prune

from .goals import Goals
from .orders import first_of_order, layers_of
from .sparing import affordable, costs, require_affordable, spared_columns, warn_without_signal
from .sweeps.atlas import cornerstones
from .sweeps.columns import layer_scores, ranks, swept_columns, unknown

log = logging.getLogger(__name__)

DEFAULT_METRIC = "block_influence"
DEFAULT_RUN_METRIC = "angular"
DEFAULT_PART = 8
"""Number of layers of which one is dropped by default."""


@dataclass(frozen=True)
class Choice:
    """The layers that go, and why."""

    drop: tuple[int, ...]
    """Increasing."""
    reason: str
    """Reason in words."""


def choose_changes(
    prune: Prune,
    *,
    num_layers: int,
    importance: Importance | None,
    goals: Goals | None = None,
) -> Choice:
    """The layers to drop.

    ``goals``: what prune.target asks of it; given where that is set, and only there.

    An explicit ``prune.drop`` is the user's wish and overrides the default of ``prune.protect``, which guards automatic
    choices; it may not contradict a protect list that differs from the default, since then the user has said both.

    Raises:
        UserError: a choice that is impossible or contradicts itself, or importance that is missing or another model's.
    """
    if prune.drop is not None:
        return Choice(*_explicit(prune, prune.drop, num_layers))
    wanted = goals or _count(prune, num_layers)
    if importance is None:
        raise UserError(
            "prune: choosing layers needs importance.json; run `shoal measure` first, or name layers in prune.drop"
        )
    if importance.num_layers != num_layers:
        raise UserError(
            f"importance.json: was measured on a model of {importance.num_layers} layers, this one has {num_layers}; "
            "run `shoal measure` again for this model"
        )
    protected, spared = _guarded(prune, importance)
    if prune.contiguous:
        drop, reason = _best_run(prune, wanted, protected, spared, importance)
    elif prune.metric in importance.orders and prune.metric not in importance.layers:
        drop, reason = first_of_order(prune.metric, wanted, protected, spared, importance)
    else:
        drop, reason = _lowest(prune, wanted, protected, spared, importance)
    if goals is not None:
        reason += f", for {goals.in_words(drop)}"
    if protected:
        reason += f"; {_named(sorted(protected))} protected"
    if spared:
        reason += f"; nothing significant spent on {', '.join(column.task for column in spared)}"
    return Choice(drop, reason)


def stand_in(prune: Prune, *, num_layers: int, goals: Goals | None = None) -> Choice:
    """As many layers as will be chosen by scores, the last that may go, to tell sizes before there are scores; with
    ``goals`` as many as reach them.

    Raises:
        UserError: an impossible number of layers.
    """
    free = free_layers(prune, num_layers)
    if goals is not None:
        drop = free[-_fewest(free[::-1], num_layers, goals) :]
    else:
        drop = free[-_count(prune, num_layers) :]
    reason = f"a stand-in: {layers_of(len(drop), num_layers)}, chosen once they are measured"
    return Choice(tuple(sorted(drop)), reason)


def check_choice(prune: Prune, *, num_layers: int, goals: Goals | None = None) -> None:
    """Refuse what no measurement could make possible, before anything is measured. ``goals``: as in choose_changes.

    Raises:
        UserError: as choose_changes does, as far as it needs no scores.
    """
    if prune.drop is not None:
        _explicit(prune, prune.drop, num_layers)
    elif goals is not None:
        _fewest(free_layers(prune, num_layers), num_layers, goals)
    else:
        protected = _protected(prune.protect, num_layers)
        count, free = _count(prune, num_layers), num_layers - len(protected)
        longest, problem = _longest_run(protected, num_layers), None
        if prune.contiguous and count > longest:
            problem = f"asks to drop a run of {count} layers, but the longest free one has {longest}"
        elif count > free:
            problem = f"asks to drop {count} layers, but only {free} of {num_layers} are not protected"
        if problem:
            raise UserError(f"prune: {problem} ({sorted(protected)} stay); drop fewer or shorten prune.protect")


def free_layers(prune: Prune, num_layers: int) -> list[int]:
    """The layers that an automatic choice may take, as far as it needs no scores.

    Raises:
        UserError: a protected layer that is none of the model's.
    """
    taken = _protected(prune.protect, num_layers)
    return [layer for layer in range(num_layers) if layer not in taken]


def _guarded(prune: Prune, importance: Importance) -> tuple[set[int], tuple[SweepColumn, ...]]:
    """The layers that may not go, and the columns on which nothing significant may be spent."""
    protected = _protected(prune.protect, importance.num_layers)
    if "cornerstone" in prune.protect:
        protected |= set(_cornerstones(importance))
    spared = spared_columns(prune, importance)
    return protected | {layer for column in spared for layer in column.critical}, spared


def _fewest(order: Sequence[int], num_layers: int, goals: Goals) -> int:
    """How many of the first layers of ``order`` reach the goals, one layer staying."""
    prefixes = [order[:count] for count in range(1, min(len(order), num_layers - 1) + 1)]
    return 1 + goals.first_reaching(prefixes, "dropping every layer that is free to go")


def _cornerstones(importance: Importance) -> tuple[int, ...]:
    if importance.atlas is None:
        raise UserError(
            "prune.protect: cornerstone needs swept tasks, importance.json holds none; name some in "
            "measure.sweep.tasks and measure again, or name the layers to protect"
        )
    return cornerstones(importance.atlas.sweep)


def _explicit(prune: Prune, drop: Sequence[int], num_layers: int) -> tuple[tuple[int, ...], str]:
    if not drop and prune.width is not None:
        return (), ""
    if not drop:
        raise UserError("prune.drop: is empty, so nothing would be dropped; name at least one layer")
    for layer in drop:
        if layer < 0:
            raise UserError(
                f"prune.drop: {layer} is negative; layers are named 0..{num_layers - 1}, "
                f"so the last one is {num_layers - 1}"
            )
        if layer >= num_layers:
            raise UserError(f"prune.drop: {layer} is no layer of this model; its layers are 0..{num_layers - 1}")
    twice = sorted({layer for layer in drop if list(drop).count(layer) > 1})
    if twice:
        raise UserError(f"prune.drop: names layer {twice[0]} twice; name every layer once")
    if len(drop) == num_layers:
        raise UserError(f"prune.drop: names all {num_layers} layers; keep at least one")
    guarded = sorted(_protected(prune.protect, num_layers) & set(drop))
    if guarded and prune.protect != Prune.protect:
        raise UserError(
            f"prune.drop: names layer {guarded[0]}, which prune.protect={list(prune.protect)} forbids; "
            "change one of them"
        )
    reason = f"{layers_of(len(drop), num_layers)} named in the recipe"
    if guarded:
        log.warning("prune.drop names %s, which an automatic choice would protect", _named(guarded))
        reason += f", among them {_named(guarded)}, which an automatic choice would protect"
    return tuple(sorted(drop)), reason


def default_count(num_layers: int) -> int:
    """Layers to drop where a recipe says neither which nor how many."""
    return max(1, num_layers // DEFAULT_PART)


def _count(prune: Prune, num_layers: int) -> int:
    if prune.num_drop is not None:
        key, count = f"prune.num_drop={prune.num_drop}", prune.num_drop
    elif prune.ratio is None:
        key, count = "prune, which says no number of layers", default_count(num_layers)
    else:
        # 0.29 * 100 is 28.999999999999996 in floating point
        key, count = f"prune.ratio={prune.ratio}", math.floor(prune.ratio * num_layers + 1e-9)
    if count == 0:
        least = math.ceil(1 / num_layers * 1000) / 1000
        raise UserError(f"{key}: is less than one of {num_layers} layers; give at least {least}")
    if count >= num_layers:
        raise UserError(f"{key}: would drop all {num_layers} layers; drop at most {num_layers - 1}")
    return count


def _protected(protect: Sequence[int | str], num_layers: int) -> set[int]:
    """The protected layers that are named by number."""
    named = [layer for layer in protect if isinstance(layer, int)]
    for layer in named:
        if not -num_layers <= layer < num_layers:
            raise UserError(
                f"prune.protect: {layer} is no layer of this model; name 0..{num_layers - 1}, or -1 for the last one"
            )
    return {layer % num_layers for layer in named}


def _rows(metric: str, importance: Importance) -> tuple[tuple[float, ...], ...]:
    """The scores of runs under ``metric``, by length - 1 and first layer."""
    if metric not in importance.runs and (
        metric in (*importance.layers, *importance.orders) or swept_columns(metric, importance)
    ):
        raise UserError(
            f"prune.metric={metric}: scores single layers, but prune.contiguous needs a metric of runs; "
            f"use {' or '.join(sorted(importance.runs)) or 'none'}, or set prune.contiguous: false"
        )
    if metric not in importance.runs:
        raise unknown(metric, importance, f"prune.metric={metric}")
    return importance.runs[metric]


def _best_run(
    prune: Prune, wanted: int | Goals, protected: set[int], spared: Sequence[SweepColumn], importance: Importance
) -> tuple[tuple[int, ...], str]:
    """The cheapest run of ``wanted`` neighbours, or of as few as reach the goals, without a protected layer (Gromov et
    al. 2024, arXiv:2403.17887)."""
    metric = prune.metric or DEFAULT_RUN_METRIC
    rows, num_layers = _rows(metric, importance), importance.num_layers

    def free(count: int) -> list[int]:
        return [start for start in range(num_layers - count + 1) if not protected & set(range(start, start + count))]

    def affordable_runs(count: int) -> list[range]:
        runs = (range(start, start + count) for start in free(count))
        return sorted((run for run in runs if not costs(run, spared)), key=lambda run: rows[count - 1][run.start])

    if isinstance(wanted, Goals):
        runs = [run for count in range(1, min(len(rows), num_layers - 1) + 1) for run in affordable_runs(count)]
        count = len(runs[wanted.first_reaching(runs, "any run of neighbours that was measured and is free to go")])
        runs = [run for run in affordable_runs(count) if wanted.reached(run)]
    else:
        count = wanted
        runs = affordable_runs(count) if count <= len(rows) else []
    if count > len(rows):
        raise UserError(
            f"prune.metric={metric}: was measured for runs of up to {len(rows)} layers, but {count} are to go; set "
            f"measure.num_drop: {count} and measure again"
        )
    if not free(count):
        raise UserError(
            f"prune: no run of {count} neighbouring layers is free of protected layers {sorted(protected)}; "
            f"the longest has {_longest_run(protected, num_layers)}. Drop fewer or shorten prune.protect"
            + (" or prune.spare" if spared else "")
        )
    require_affordable(count if runs else 0, count, spared)
    lowest = f"lowest {metric} ({rows[count - 1][runs[0].start]:.4g}) of {len(runs)} possible"
    return tuple(runs[0]), f"the run of {layers_of(count, num_layers)} with the {lowest}"


def _lowest(
    prune: Prune, wanted: int | Goals, protected: set[int], spared: Sequence[SweepColumn], importance: Importance
) -> tuple[tuple[int, ...], str]:
    """The ``wanted`` layers of lowest score wherever they are, or as few of them as reach the goals; equal scores go by
    lower index."""
    metric, scores = _scores(prune, importance)
    candidates = _free(protected, importance)
    order = sorted(candidates, key=lambda layer: (scores[layer], layer))
    if isinstance(wanted, Goals):
        count = _fewest(affordable(order, len(order), spared), importance.num_layers, wanted)
    else:
        count = wanted
    if count > len(candidates):
        raise UserError(
            f"prune: asks to drop {count} layers, but only {len(candidates)} of {importance.num_layers} are not "
            f"protected ({sorted(protected)}); drop fewer or shorten prune.protect"
            + (" or prune.spare" if spared else "")
        )
    drop = affordable(order, count, spared)
    require_affordable(len(drop), count, spared)
    reason = (
        f"the {layers_of(count, importance.num_layers)} with the lowest {metric} "
        f"({scores[drop[0]]:.4g} to {scores[drop[-1]]:.4g})"
    )
    return tuple(sorted(drop)), reason


def _free(protected: set[int], importance: Importance) -> list[int]:
    return [layer for layer in range(importance.num_layers) if layer not in protected]


def _scores(prune: Prune, importance: Importance) -> tuple[str, tuple[float, ...]]:
    """Name of the scores in words, and one score per layer."""
    if not prune.weights:
        metric = prune.metric or DEFAULT_METRIC
        warn_without_signal(metric, importance)
        return metric, layer_scores(metric, importance, setting=f"prune.metric={metric}")
    total, mix = sum(prune.weights.values()), [0.0] * importance.num_layers
    for name, weight in prune.weights.items():
        warn_without_signal(name, importance)
        for layer, rank in enumerate(ranks(layer_scores(name, importance, setting=f"prune.weights.{name}"))):
            mix[layer] += weight / total * rank
    parts = " + ".join(f"{weight / total:.2g} {name}" for name, weight in prune.weights.items())
    # sums of equal ranks in another order must stay equal, or rounding would choose
    return f"mean rank of {parts}", tuple(round(value, 12) for value in mix)


def _longest_run(protected: set[int], num_layers: int) -> int:
    borders = [-1, *sorted(protected), num_layers]
    return max(right - left - 1 for left, right in itertools.pairwise(borders))


def _named(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
