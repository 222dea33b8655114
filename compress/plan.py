"""Which layers go: from an explicit list, or from importance scores that lie on disk."""

from __future__ import annotations

import difflib
import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from shoal.artifact import Importance
from shoal.edits import Edit, edited_layers, in_words, removed_layers
from shoal.errors import UserError
from shoal.recipe import Prune

log = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_METRIC = "block_influence"
DEFAULT_RUN_METRIC = "angular"


def choose_layers(prune: Prune, *, num_layers: int, importance: Importance | None) -> tuple[tuple[int, ...], str]:
    """The layers to drop, increasing, and how they were chosen in words for a reader.

    Among them are the layers that edits merge or replace; layers that edits name are never chosen automatically.

    An explicit ``prune.drop`` is the user's wish and overrides the default of ``prune.protect``, which guards automatic
    choices; it may not contradict a protect list that differs from the default, since then the user has said both.

    Raises:
        UserError: a choice that is impossible or contradicts itself, or importance that is missing or another model's.
    """
    _check_edits(prune.edits, num_layers)
    drop, reason = _choose(prune, num_layers, importance)
    removed = removed_layers(prune.edits)
    if len(drop) + len(removed) == num_layers:
        raise UserError(f"prune: drop and edits together remove all {num_layers} layers; keep at least one")
    return tuple(sorted({*drop, *removed})), "; ".join(filter(None, [reason, *map(in_words, prune.edits)]))


def check_choice(prune: Prune, *, num_layers: int) -> None:
    """Refuse what no measurement could make possible, before anything is measured.

    Raises:
        UserError: as choose_layers does, as far as it needs no scores.
    """
    _check_edits(prune.edits, num_layers)
    if prune.drop is not None:
        _explicit(prune, prune.drop, num_layers)
    elif is_automatic(prune):
        _count(prune, num_layers)
        _protected(prune.protect, num_layers)


def is_automatic(prune: Prune) -> bool:
    """Whether layers are to be chosen by scores, so that importance.json is needed."""
    edits_only = prune.edits and prune.num_drop is None and prune.ratio is None
    return prune.drop is None and not edits_only


def _choose(prune: Prune, num_layers: int, importance: Importance | None) -> tuple[tuple[int, ...], str]:
    """What is dropped besides what edits remove."""
    if prune.drop is not None:
        return _explicit(prune, prune.drop, num_layers)
    if not is_automatic(prune):
        return (), ""
    count = _count(prune, num_layers)
    protected = _protected(prune.protect, num_layers)
    if importance is None:
        raise UserError(
            "prune: choosing layers needs importance.json; run `shoal measure` first, or name layers in prune.drop"
        )
    if importance.num_layers != num_layers:
        raise UserError(
            f"importance.json: was measured on a model of {importance.num_layers} layers, this one has {num_layers}; "
            "run `shoal measure` again for this model"
        )
    protected |= {layer for edit in prune.edits for layer in edited_layers(edit)}
    if prune.contiguous:
        return _best_run(prune, count, protected, importance)
    return _lowest(prune, count, protected, importance)


def _check_edits(edits: Sequence[Edit], num_layers: int) -> None:
    for index, edit in enumerate(edits):
        for layer in edited_layers(edit):
            if layer >= num_layers:
                raise UserError(
                    f"prune.edits.{index}: {layer} is no layer of this model; its layers are 0..{num_layers - 1}"
                )


def _explicit(prune: Prune, drop: Sequence[int], num_layers: int) -> tuple[tuple[int, ...], str]:
    if not drop and prune.edits:
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
    reason = f"{_layers(len(drop), num_layers)} named in the recipe"
    if guarded:
        log.warning("prune.drop names %s, which an automatic choice would protect", _named(guarded))
        reason += f", among them {_named(guarded)}, which an automatic choice would protect"
    return tuple(sorted(drop)), reason


def _count(prune: Prune, num_layers: int) -> int:
    if prune.num_drop is None and prune.ratio is None:
        raise UserError(
            "prune: says neither what nor how much to drop; give prune.drop, prune.num_drop, prune.ratio or prune.edits"
        )
    if prune.num_drop is not None:
        key, count = f"prune.num_drop={prune.num_drop}", prune.num_drop
    else:
        assert prune.ratio is not None
        # 0.29 * 100 is 28.999999999999996 in floating point
        key, count = f"prune.ratio={prune.ratio}", math.floor(prune.ratio * num_layers + 1e-9)
    if count == 0:
        raise UserError(f"{key}: is less than one of {num_layers} layers; give at least {_round_up(1 / num_layers)}")
    if count >= num_layers:
        raise UserError(f"{key}: would drop all {num_layers} layers; drop at most {num_layers - 1}")
    return count


def _protected(protect: Sequence[int], num_layers: int) -> set[int]:
    for layer in protect:
        if not -num_layers <= layer < num_layers:
            raise UserError(
                f"prune.protect: {layer} is no layer of this model; name 0..{num_layers - 1}, or -1 for the last one"
            )
    return {layer % num_layers for layer in protect}


def _best_run(prune: Prune, count: int, protected: set[int], importance: Importance) -> tuple[tuple[int, ...], str]:
    """The cheapest run of ``count`` neighbours without a protected layer (Gromov et al. 2024, arXiv:2403.17887)."""
    metric = prune.metric or DEFAULT_RUN_METRIC
    if metric in importance.layers and metric not in importance.runs:
        raise UserError(
            f"prune.metric={metric}: scores single layers, but prune.contiguous needs a metric of runs; "
            f"use {_one_of(importance.runs)}, or set prune.contiguous: false"
        )
    scores = _find(metric, importance.runs)[count - 1]
    starts = [start for start in range(len(scores)) if not protected & set(range(start, start + count))]
    if not starts:
        raise UserError(
            f"prune: no run of {count} neighbouring layers is free of protected layers {sorted(protected)}; "
            f"the longest has {_longest_run(protected, importance.num_layers)}. Drop fewer or shorten prune.protect"
        )
    best = min(starts, key=lambda start: (scores[start], start))
    reason = (
        f"the run of {_layers(count, importance.num_layers)} with the lowest {metric} ({scores[best]:.4g}) "
        f"of {len(starts)} possible"
    )
    return tuple(range(best, best + count)), reason + _protection(protected)


def _lowest(prune: Prune, count: int, protected: set[int], importance: Importance) -> tuple[tuple[int, ...], str]:
    """The ``count`` layers of lowest score wherever they are; equal scores go by lower index.

    A metric of runs counts by its runs of one layer.
    """
    metric = prune.metric or DEFAULT_METRIC
    single = {name: rows[0] for name, rows in importance.runs.items()}
    scores = _find(metric, {**single, **importance.layers})
    candidates = [layer for layer in range(importance.num_layers) if layer not in protected]
    if count > len(candidates):
        raise UserError(
            f"prune: asks to drop {count} layers, but only {len(candidates)} of {importance.num_layers} are not "
            f"protected ({sorted(protected)}); drop fewer or shorten prune.protect"
        )
    drop = sorted(candidates, key=lambda layer: (scores[layer], layer))[:count]
    reason = (
        f"the {_layers(count, importance.num_layers)} with the lowest {metric} "
        f"({scores[drop[0]]:.4g} to {scores[drop[-1]]:.4g})"
    )
    return tuple(sorted(drop)), reason + _protection(protected)


def _find(metric: str, scores: Mapping[str, T]) -> T:
    if metric in scores:
        return scores[metric]
    close = difflib.get_close_matches(metric, scores, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else f"it has {_one_of(scores)}."
    raise UserError(
        f"prune.metric={metric}: is not in importance.json; {hint} "
        "To add it, name it in measure.metrics and measure again"
    )


def _longest_run(protected: set[int], num_layers: int) -> int:
    borders = [-1, *sorted(protected), num_layers]
    return max(right - left - 1 for left, right in itertools.pairwise(borders))


def _layers(count: int, num_layers: int) -> str:
    return f"{count} of {num_layers} layers"


def _named(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


def _protection(protected: set[int]) -> str:
    return f"; {_named(sorted(protected))} protected" if protected else ""


def _one_of(names: Mapping[str, Any]) -> str:
    return " or ".join(sorted(names)) or "none"


def _round_up(value: float) -> float:
    return math.ceil(value * 1000) / 1000
