"""Which layers go: an explicit list, or the first of an order by scores that lie on disk, so many or as many as reach a
target."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from shoal.artifacts.importance import Importance, SweepColumn
from shoal.components import require_layers
from shoal.errors import UserError
from shoal.recipe.prune import NO_CORNERSTONE, CutByScore, CutThese, Prune

from .free_layers import Goals, count_of, fewest, longest_run, middle_first, possible_count, protected_layers
from .sweeps.atlas import cornerstones
from .sweeps.columns import is_loss, joint_change, layer_scores, ranks, swept_columns, unknown

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """The layers that go, and why."""

    drop: tuple[int, ...]
    """Increasing."""
    reason: str
    """Reason in words."""
    scores: tuple[float | None, ...] = ()
    """What chose, by layer, as Plan.scores."""
    protected: tuple[int, ...] = ()
    """Layers that could not be chosen, increasing."""


_Chosen = tuple[Sequence[int], str, tuple[float | None, ...]]
"""Layers that go, why, and the scores that chose."""


@dataclass(frozen=True)
class _Limits:
    """What an automatic choice keeps to."""

    protected: set[int]
    """Layers that may not go."""
    spared: tuple[SweepColumn, ...]
    """Columns on which nothing significant may be spent."""

    def affordable(self, layers: Iterable[int], count: int) -> list[int]:
        """The first ``count`` of ``layers`` whose summed loss is significant on no spared column; fewer if there are
        not. A layer with which the sum would become significant is passed over, and the next one tried."""
        taken: list[int] = []
        for layer in layers:
            if len(taken) == count:
                break
            if not self.costs([*taken, layer]):
                taken.append(layer)
        return taken

    def costs(self, layers: Sequence[int]) -> bool:
        """Whether the summed loss is significant on a spared column."""
        return any(is_loss(column, joint_change(column, layers)) for column in self.spared)

    @property
    def loss(self) -> str:
        """What may not be lost."""
        return f"a significant loss on {self.columns} (estimated from single removals)"

    @property
    def columns(self) -> str:
        return ", ".join(column.task for column in self.spared)

    @property
    def remedy(self) -> str:
        return "drop fewer layers, or shorten prune.protect" + (" or prune.spare" if self.spared else "")


def choose_changes(
    prune: Prune, *, num_layers: int, importance: Importance | None, goals: Goals | None = None
) -> Choice:
    """The layers to drop.

    ``goals``: what prune.target asks of it; given where that is set, and only there.

    Raises:
        UserError: a choice that is impossible, or importance that is missing.
    """
    if isinstance(prune, CutThese):
        return _explicit(prune, num_layers)
    wanted = goals or count_of(prune, num_layers)
    if importance is None:
        raise UserError("prune: importance.json is missing; run `shoal measure` first, or name layers in prune.drop")
    limits = _limits(prune, importance)
    choose = _best_run if prune.contiguous else _first_of_order
    drop, reason, scores = choose(prune, wanted, limits, importance)
    if goals is not None:
        reason += f", for {goals.in_words(drop)}"
    if limits.protected:
        reason += f"; {_named(sorted(limits.protected))} protected"
    if limits.spared:
        reason += f"; no significant loss on {limits.columns}"
    return Choice(tuple(sorted(drop)), reason, scores, tuple(sorted(limits.protected)))


def stand_in(prune: Prune, *, num_layers: int, goals: Goals | None = None) -> Choice:
    """As many layers as will be chosen by scores, the middle ones that may go (the last ones would leave next to
    nothing to train `from_first_cut`), to tell sizes before there are scores; with ``goals`` as many as reach them.

    Raises:
        UserError: what no measurement could make possible.
    """
    if isinstance(prune, CutThese):
        return _explicit(prune, num_layers)
    order = middle_first(prune, num_layers)
    if goals is not None:
        count = fewest(order, num_layers, goals)
    else:
        count = possible_count(prune, num_layers)
    return Choice(
        tuple(sorted(order[:count])), f"a stand-in: {layers_of(count, num_layers)}, chosen once they are measured"
    )


def _limits(prune: CutByScore, importance: Importance) -> _Limits:
    protected = protected_layers(prune.protect, importance.num_layers)
    if "cornerstone" in prune.protect:
        if importance.atlas is None:
            raise UserError(NO_CORNERSTONE)
        protected |= set(cornerstones(importance.atlas.sweep))
    spared: dict[str, SweepColumn] = {}
    for name in prune.spare:
        columns = swept_columns(name, importance)
        if not columns:
            raise unknown(name, importance, f"prune.spare: {name}", swept_only=True)
        spared |= {column.task: column for column in columns}
        _warn_without_signal(name, importance)
    critical = {layer for column in spared.values() for layer in column.critical}
    return _Limits(protected | critical, tuple(spared.values()))


def _warn_without_signal(name: str, importance: Importance) -> None:
    """Warn of a swept column that tells nothing of layers."""
    if name in (*importance.layers, *importance.runs, *importance.orders):
        return
    for column in swept_columns(name, importance):
        if column.higher_is_better and column.no_share:
            log.warning("prune: %s shows little about layers: %s", column.task, column.no_share)


def _explicit(prune: CutThese, num_layers: int) -> Choice:
    drop = prune.drop
    if not drop:
        return Choice((), "")
    require_layers(drop, num_layers, "prune.drop")
    reason = f"{layers_of(len(drop), num_layers)} named in the recipe"
    if guarded := sorted(protected_layers(CutByScore.protect, num_layers) & set(drop)):
        log.warning("prune.drop names %s, which an automatic choice would protect", _named(guarded))
        reason += f", among them {_named(guarded)}, which an automatic choice would protect"
    return Choice(tuple(sorted(drop)), reason)


def _best_run(prune: CutByScore, wanted: int | Goals, limits: _Limits, importance: Importance) -> _Chosen:
    """The cheapest run of ``wanted`` neighbours, or of as few as reach the goals, without a protected layer (Gromov et
    al. 2024, arXiv:2403.17887)."""
    metric, num_layers = prune.metric or prune.default_metric, importance.num_layers
    assert isinstance(metric, str), "a mix needs scores of single layers"
    rows = _rows(metric, importance)

    def free(count: int) -> list[range]:
        """Cheapest first."""
        runs = (range(start, start + count) for start in range(num_layers - count + 1))
        may_go = [run for run in runs if not limits.protected & {*run} and not limits.costs(run)]
        return sorted(may_go, key=lambda run: rows[count - 1][run.start])

    if isinstance(wanted, Goals):
        every = [run for count in range(1, min(len(rows), num_layers - 1) + 1) for run in free(count)]
        first = every[wanted.first_reaching(every, "any run of neighbours that was measured and may be dropped")]
        count, runs = len(first), [run for run in every if len(run) == len(first) and wanted.reached(run)]
    elif (count := wanted) > len(rows):
        raise UserError(
            f"prune.metric={metric}: was measured for runs of up to {len(rows)} layers, but {count} are to be "
            "dropped; drop fewer, or choose a metric that scores longer runs"
        )
    elif not (runs := free(count)):
        raise UserError(
            f"prune: no run of {count} neighbouring layers is free of protected layers {sorted(limits.protected)}; "
            f"the longest has {longest_run(limits.protected, num_layers)}"
            + (f", and none can be dropped without {limits.loss}" if limits.spared else "")
            + f": {limits.remedy}"
        )
    lowest = f"lowest {metric} ({rows[count - 1][runs[0].start]:.4g}) of {len(runs)} possible"
    scores = (*rows[count - 1], *(None,) * (count - 1))
    return runs[0], f"the run of {layers_of(count, num_layers)} with the {lowest}", scores


def _rows(metric: str, importance: Importance) -> tuple[tuple[float, ...], ...]:
    """The scores of runs under ``metric``, by length - 1 and first layer."""
    if metric in importance.runs:
        return importance.runs[metric]
    if metric not in (*importance.layers, *importance.orders) and not swept_columns(metric, importance):
        raise unknown(metric, importance, f"prune.metric={metric}")
    raise UserError(
        f"prune.metric={metric}: scores single layers, but prune.contiguous needs a metric of runs; use "
        f"{' or '.join(sorted(importance.runs)) or 'none'}, or set prune.contiguous: false"
    )


def _first_of_order(prune: CutByScore, wanted: int | Goals, limits: _Limits, importance: Importance) -> _Chosen:
    """The first ``wanted`` layers of an order, or as few of them as reach the goals: by a score, equal ones by lower
    index, or in a greedy order, which may not hold all layers."""
    metric, scores = _scores(prune.metric or prune.default_metric, importance)
    greedy = () if metric in importance.layers else importance.orders.get(metric, ())
    order = sorted(range(importance.num_layers), key=lambda layer: (scores[layer], layer))
    order = order[: len(greedy) or None]  # what was never removed comes last there
    free = [layer for layer in order if layer not in limits.protected]
    if isinstance(wanted, Goals):
        layers = limits.affordable(free, len(free))
        what = [f"the {len(layers)} removals of the order of {metric}"] if greedy else []
        count = fewest(layers, importance.num_layers, wanted, *what)
    else:
        count = wanted
    drop = limits.affordable(free, count)
    if len(drop) < count:
        among = f"the {len(order)} removals of {metric}" if greedy else str(len(order))
        protected = f"{len(free)} of {among} are not protected ({sorted(limits.protected)})"
        left = protected if len(free) < count else f"{len(drop)} can be dropped without {limits.loss}"
        raise UserError(
            f"prune: asks to drop {count} layers, but only {left}; {limits.remedy}"
            + (", or choose a metric that scores all layers" if greedy else "")
        )
    first = f"the first {layers_of(count, importance.num_layers)} of the order of {metric}"
    if not greedy:
        lowest = f"the lowest {metric} ({scores[drop[0]]:.4g} to {scores[drop[-1]]:.4g})"
        return drop, f"the {layers_of(count, importance.num_layers)} with {lowest}", scores
    if passed := order.index(drop[-1]) + 1 - count:
        return drop, f"{first} that may be dropped ({passed} passed over)", scores
    return drop, f"{first} ({greedy[count - 1].score:.4g} without them)", scores


def _scores(metric: str | Mapping[str, float], importance: Importance) -> tuple[str, tuple[float, ...]]:
    """Name of the scores in words, and one score per layer."""
    if isinstance(metric, str):
        _warn_without_signal(metric, importance)
        return metric, layer_scores(metric, importance, setting=f"prune.metric={metric}")
    total, mix = sum(metric.values()), [0.0] * importance.num_layers
    for name, weight in metric.items():
        _warn_without_signal(name, importance)
        for layer, rank in enumerate(ranks(layer_scores(name, importance, setting=f"prune.metric.{name}"))):
            mix[layer] += weight / total * rank
    parts = " + ".join(f"{weight / total:.2g} {name}" for name, weight in metric.items())
    # sums of equal ranks in another order must stay equal, or rounding would choose
    return f"mean rank of {parts}", tuple(round(value, 12) for value in mix)


def layers_of(count: int, num_layers: int) -> str:
    """`2 of 6 layers`."""
    return f"{count} of {num_layers} layers"


def _named(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
