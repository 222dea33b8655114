"""Which layers go: from an explicit list, or from importance scores that lie on disk."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from shoal.artifacts.artifact import Importance
from shoal.artifacts.heads import Heads
from shoal.artifacts.importance import Removal, SweepColumn
from shoal.errors import UserError
from shoal.recipe.edits import Edit, Edits, SkipAttention, SkipMlp, edited_layers, in_words, removed_layers
from shoal.recipe.prune import Prune

from .sweeps.atlas import cornerstones
from .sweeps.columns import layer_scores, ranks, swept_columns, unknown
from .sweeps.expected_loss import is_loss, joint_change

log = logging.getLogger(__name__)

DEFAULT_METRIC = "block_influence"
DEFAULT_RUN_METRIC = "angular"
DEFAULT_PART = 8
"""Number of layers of which one is dropped by default."""
HALVES = ("attention", "mlp")


@dataclass(frozen=True)
class Choice:
    """Changes to the teacher, and why."""

    drop: tuple[int, ...]
    """Layers that go, increasing; among them those that edits merge or replace."""
    edits: Edits
    """Edits of the recipe, and the single halves that an order of halves removes."""
    reason: str
    """Reason in words."""


def choose_changes(
    prune: Prune, *, num_layers: int, importance: Importance | None, heads: Heads | None = None
) -> Choice:
    """The layers to drop and the edits to make. Layers that edits name are never chosen automatically.

    ``heads`` are those of this model, for ``prune.protect_heads``.

    An explicit ``prune.drop`` is the user's wish and overrides the default of ``prune.protect``, which guards automatic
    choices; it may not contradict a protect list that differs from the default, since then the user has said both.

    Raises:
        UserError: a choice that is impossible or contradicts itself, or importance that is missing or another model's.
    """
    _check_edits(prune.edits, num_layers)
    drop, halves, reason = _choose(prune, num_layers, importance, heads)
    removed = removed_layers(prune.edits)
    if len(drop) + len(removed) == num_layers:
        raise UserError(f"prune: drop and edits together remove all {num_layers} layers; keep at least one")
    edits = (*prune.edits, *halves)
    return Choice(tuple(sorted({*drop, *removed})), edits, "; ".join(filter(None, [reason, *map(in_words, edits)])))


def stand_in(prune: Prune, *, num_layers: int) -> Choice:
    """As many layers as will be chosen by scores, the last that may go, to tell sizes before there are scores.

    Raises:
        UserError: an impossible number of layers.
    """
    count = _count(prune, num_layers)
    taken = _protected(prune.protect, num_layers) | {layer for edit in prune.edits for layer in edited_layers(edit)}
    drop = [layer for layer in range(num_layers) if layer not in taken][-count:]
    reason = f"a stand-in: {_layers(count, num_layers)}, chosen once they are measured"
    return Choice(tuple(sorted({*drop, *removed_layers(prune.edits)})), prune.edits, reason)


def check_choice(prune: Prune, *, num_layers: int) -> None:
    """Refuse what no measurement could make possible, before anything is measured.

    Raises:
        UserError: as choose_changes does, as far as it needs no scores.
    """
    _check_edits(prune.edits, num_layers)
    if prune.drop is not None:
        _explicit(prune, prune.drop, num_layers)
    elif is_automatic(prune):
        counts = drops_by_round(prune, num_layers)
        free = num_layers - len(_protected(prune.protect, num_layers))
        if len(counts) > 1 and sum(counts) > free:
            raise UserError(
                f"prune: {len(counts)} rounds are to drop {sum(counts)} layers, but only {free} of {num_layers} are "
                "not protected; drop fewer or shorten prune.protect"
            )


def drops_by_round(prune: Prune, num_layers: int) -> tuple[int, ...]:
    """How many of the teacher's ``num_layers`` layers go in each of prune.rounds, by no more than one unequal.

    Raises:
        UserError: an impossible number of layers, or more rounds than that.
    """
    count, rounds = _count(prune, num_layers), prune.rounds
    if rounds > count:
        raise UserError(
            f"prune.rounds: {rounds} rounds are more than the {_layers(count, num_layers)} to drop; set at most {count}"
        )
    return tuple(count // rounds + (number < count % rounds) for number in range(rounds))


def round_of(prune: Prune, number: int, *, num_layers: int, kept: Sequence[int]) -> Prune:
    """``prune`` as the choice of round ``number``, from 1, in a model that has the layers ``kept`` of the teacher's
    ``num_layers``: the layers of this round alone, and protected ones by their numbers in that model.

    Raises:
        UserError: an impossible number of layers, or a protected one that is none of the teacher's.
    """
    if prune.rounds == 1:
        return prune
    guarded = _protected(prune.protect, num_layers)
    protect = [place for place, layer in enumerate(kept) if layer in guarded]
    words = [name for name in prune.protect if isinstance(name, str)]
    count = drops_by_round(prune, num_layers)[number - 1]
    return replace(prune, num_drop=count, ratio=None, rounds=1, protect=(*protect, *words))


def is_automatic(prune: Prune) -> bool:
    """Whether layers are to be chosen by scores, so that importance.json is needed."""
    edits_only = prune.edits and prune.num_drop is None and prune.ratio is None
    return prune.drop is None and not edits_only


def _choose(
    prune: Prune, num_layers: int, importance: Importance | None, heads: Heads | None
) -> tuple[tuple[int, ...], Edits, str]:
    """Layers that go beside those that edits remove, edits that skip halves, and the reason."""
    if prune.drop is not None:
        drop, reason = _explicit(prune, prune.drop, num_layers)
        return drop, (), reason
    if not is_automatic(prune):
        return (), (), ""
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
    if "cornerstone" in prune.protect:
        protected |= set(_cornerstones(importance))
    copying = _copying(prune.protect_heads, heads, num_layers)
    protected |= set(copying)
    spared = _spared(prune, importance)
    protected |= {layer for column in spared for layer in column.critical}
    halves: Edits = ()
    if prune.contiguous:
        drop, reason = _best_run(prune, count, protected, spared, importance)
    elif prune.metric in importance.orders and prune.metric not in importance.layers:
        drop, halves, reason = _first_of_order(prune.metric, count, protected, spared, importance)
    else:
        drop, reason = _lowest(prune, count, protected, spared, importance)
    if protected:
        reason += f"; {_named(_in_teacher(protected, importance))} protected"
    if copying:
        reason += f", {_named(copying)} for {prune.protect_heads:.0%} of the retrieval score"
    if spared:
        reason += f"; nothing significant spent on {', '.join(column.task for column in spared)}"
    return drop, halves, reason


def _copying(share: float | None, heads: Heads | None, num_layers: int) -> tuple[int, ...]:
    """The fewest layers that hold ``share`` of the retrieval score."""
    if share is None:
        return ()
    if heads is None:
        raise UserError(
            f"prune.protect_heads: needs {Heads.FILE}, which is not there; set measure.heads and run `shoal measure`, "
            "or leave it out"
        )
    if heads.num_layers != num_layers:
        raise UserError(
            f"{Heads.FILE}: was measured on a model of {heads.num_layers} layers, this one has {num_layers}; run "
            "`shoal measure` again for this model"
        )
    return heads.layers_holding(share)


def _cornerstones(importance: Importance) -> tuple[int, ...]:
    if importance.atlas is None:
        raise UserError(
            "prune.protect: cornerstone needs swept tasks, importance.json holds none; name some in "
            "measure.sweep.tasks and measure again, or name the layers to protect"
        )
    return cornerstones(importance.atlas.sweep)


def _spared(prune: Prune, importance: Importance) -> tuple[SweepColumn, ...]:
    """The columns on which nothing significant may be spent."""
    columns_by_task: dict[str, SweepColumn] = {}
    for name in prune.spare:
        columns = swept_columns(name, importance)
        if not columns:
            raise unknown(name, importance, f"prune.spare: {name}", swept_only=True)
        columns_by_task |= {column.task: column for column in columns}
        _warn_without_signal(name, importance)
    return tuple(columns_by_task.values())


def _affordable(layers: Iterable[int], count: int, spared: Sequence[SweepColumn]) -> list[int]:
    """The first ``count`` of ``layers`` whose summed loss is significant on no spared column; fewer if there are not.

    A layer with which the sum would become significant is passed over, and the next one tried.
    """
    taken: list[int] = []
    for layer in layers:
        if len(taken) == count:
            break
        if not _costs([*taken, layer], spared):
            taken.append(layer)
    return taken


def _costs(layers: Sequence[int], spared: Sequence[SweepColumn]) -> bool:
    """Whether the summed loss is significant on a spared column."""
    return any(is_loss(column, joint_change(column, layers)) for column in spared)


def _require_affordable(num_affordable: int, count: int, spared: Sequence[SweepColumn]) -> None:
    if num_affordable < count:
        names = ", ".join(column.task for column in spared)
        raise UserError(
            f"prune.spare: only {num_affordable} of the {count} layers asked for can go without a significant loss on "
            f"{names}, by the sum of their single removals; drop fewer or spare less"
        )


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


def _best_run(
    prune: Prune, count: int, protected: set[int], spared: Sequence[SweepColumn], importance: Importance
) -> tuple[tuple[int, ...], str]:
    """The cheapest run of ``count`` neighbours without a protected layer (Gromov et al. 2024, arXiv:2403.17887)."""
    metric = prune.metric or DEFAULT_RUN_METRIC
    if metric not in importance.runs and (
        metric in (*importance.layers, *importance.orders) or swept_columns(metric, importance)
    ):
        raise UserError(
            f"prune.metric={metric}: scores single layers, but prune.contiguous needs a metric of runs; "
            f"use {' or '.join(sorted(importance.runs)) or 'none'}, or set prune.contiguous: false"
        )
    if metric not in importance.runs:
        raise unknown(metric, importance, f"prune.metric={metric}")
    rows = importance.runs[metric]
    if count > len(rows):
        raise UserError(
            f"prune.metric={metric}: was measured for runs of up to {len(rows)} layers, but {count} are to go; set "
            f"measure.num_drop: {count} and measure again"
        )
    scores = rows[count - 1]
    free = [start for start in range(len(scores)) if not protected & set(range(start, start + count))]
    if not free:
        raise UserError(
            f"prune: no run of {count} neighbouring layers is free of protected layers "
            f"{_in_teacher(protected, importance)}; "
            f"the longest has {_longest_run(protected, importance.num_layers)}. Drop fewer or shorten prune.protect"
            + (" or prune.spare" if spared else "")
        )
    starts = [start for start in free if not _costs(range(start, start + count), spared)]
    _require_affordable(count if starts else 0, count, spared)
    best = min(starts, key=lambda start: (scores[start], start))
    reason = (
        f"the run of {_layers(count, importance.num_layers)} with the lowest {metric} ({scores[best]:.4g}) "
        f"of {len(starts)} possible"
    )
    return tuple(range(best, best + count)), reason


def _lowest(
    prune: Prune, count: int, protected: set[int], spared: Sequence[SweepColumn], importance: Importance
) -> tuple[tuple[int, ...], str]:
    """The ``count`` layers of lowest score wherever they are; equal scores go by lower index."""
    metric, scores = _scores(prune, importance)
    candidates = [layer for layer in range(importance.num_layers) if layer not in protected]
    if count > len(candidates):
        raise UserError(
            f"prune: asks to drop {count} layers, but only {len(candidates)} of {importance.num_layers} are not "
            f"protected ({_in_teacher(protected, importance)}); drop fewer or shorten prune.protect"
            + (" or prune.spare" if spared else "")
        )
    drop = _affordable(sorted(candidates, key=lambda layer: (scores[layer], layer)), count, spared)
    _require_affordable(len(drop), count, spared)
    reason = (
        f"the {_layers(count, importance.num_layers)} with the lowest {metric} "
        f"({scores[drop[0]]:.4g} to {scores[drop[-1]]:.4g})"
    )
    return tuple(sorted(drop)), reason


def _scores(prune: Prune, importance: Importance) -> tuple[str, tuple[float, ...]]:
    """Name of the scores in words, and one score per layer."""
    if not prune.weights:
        metric = prune.metric or DEFAULT_METRIC
        _warn_without_signal(metric, importance)
        return metric, layer_scores(metric, importance, setting=f"prune.metric={metric}")
    total, mix = sum(prune.weights.values()), [0.0] * importance.num_layers
    for name, weight in prune.weights.items():
        _warn_without_signal(name, importance)
        for layer, rank in enumerate(ranks(layer_scores(name, importance, setting=f"prune.weights.{name}"))):
            mix[layer] += weight / total * rank
    parts = " + ".join(f"{weight / total:.2g} {name}" for name, weight in prune.weights.items())
    # sums of equal ranks in another order must stay equal, or rounding would choose
    return f"mean rank of {parts}", tuple(round(value, 12) for value in mix)


def _warn_without_signal(name: str, importance: Importance) -> None:
    if name in (*importance.layers, *importance.runs, *importance.orders):
        return
    for column in swept_columns(name, importance):
        if column.higher_is_better and column.no_retention:
            log.warning("prune: %s says little about layers: %s", column.task, column.no_retention)


def _first_of_order(
    metric: str, count: int, protected: set[int], spared: Sequence[SweepColumn], importance: Importance
) -> tuple[tuple[int, ...], Edits, str]:
    """The first removals of a greedy order that touch no protected layer.

    Of halves twice as many are taken, so that ``count`` layers' worth goes under every metric; a layer both of whose
    halves go is dropped. The sums that prune.spare looks at are known of whole layers only: where halves go, the
    halves of critical layers stay.
    """
    order = importance.orders[metric]
    parts = {removal.unit.part for removal in order}
    of_halves = parts <= set(HALVES)
    if not (of_halves or parts == {"layer"}) or any(len(removal.unit.layers) != 1 for removal in order):
        raise UserError(
            f"prune.metric={metric}: is an order of {', '.join(sorted(parts))} units, of which no plan can be made; "
            "choose an order of layers or of their halves"
        )
    free = [removal for removal in order if not protected & set(removal.unit.layers)]
    wanted = 2 * count if of_halves else count
    if len(free) < wanted:
        removed = "halves" if of_halves else "layers"
        raise UserError(
            f"prune.metric={metric}: its order in importance.json has {len(free)} {removed} that are not protected "
            f"({_in_teacher(protected, importance)}), {wanted} are needed; raise measure.num_drop, or drop fewer"
        )
    if of_halves:
        taken, last = free[:wanted], free[wanted - 1]
        layers, halves = _without_halves(taken)
        removed = f"the first {wanted} halves"
    else:
        layers = _affordable((removal.unit.layers[0] for removal in free), count, spared)
        _require_affordable(len(layers), count, spared)
        taken = [removal for removal in free if removal.unit.layers[0] in layers]
        last, halves, removed = taken[-1], (), f"the first {_layers(count, importance.num_layers)}"
    skipped = order.index(last) + 1 - len(taken)
    reason = f"{removed} of the order of {metric} ({last.score:.4g} without them)"
    if skipped:
        reason = f"{removed} of the order of {metric} that may go ({skipped} passed over)"
    return tuple(sorted(layers)), halves, reason


def _without_halves(removals: Sequence[Removal]) -> tuple[list[int], Edits]:
    """Layers both of whose halves go, and the edits that skip the other halves."""
    gone = {part: {r.unit.layers[0] for r in removals if r.unit.part == part} for part in HALVES}
    both = gone["attention"] & gone["mlp"]
    attention, mlp = (tuple(sorted(gone[part] - both)) for part in HALVES)
    edits: list[Edit] = [SkipAttention("skip_attention", attention)] if attention else []
    edits += [SkipMlp("skip_mlp", mlp)] if mlp else []
    return sorted(both), tuple(edits)


def _in_teacher(layers: Iterable[int], importance: Importance) -> list[int]:
    """The teacher's numbers of these layers of the measured model."""
    return [importance.teacher_layers[layer] for layer in sorted(layers)]


def _longest_run(protected: set[int], num_layers: int) -> int:
    borders = [-1, *sorted(protected), num_layers]
    return max(right - left - 1 for left, right in itertools.pairwise(borders))


def _layers(count: int, num_layers: int) -> str:
    return f"{count} of {num_layers} layers"


def _named(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
