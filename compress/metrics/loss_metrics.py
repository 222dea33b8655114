"""Metrics of the language-model loss under variants of the model: single drops, greedy orders, subnetworks.

L(S) is the mean negative log-likelihood per token, in nats, of the model without the layers S (see variant_losses).
All are measured over one memory of losses, so that what two metrics ask of the same variant is computed once.

Layers beside others are worth what a game says: players are layers, and its value is the negative loss of the model
without a set of them. N subnetworks, P players, C clusters of walks.
"""

from __future__ import annotations

import itertools
import logging
import math
import random
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import ClassVar

import numpy as np
from transformers import PreTrainedModel

from shoal.components import Component
from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers, text_config

from ..edits.sublayers import sublayers
from ..variants.variants import INTACT, Variant, without
from .greedy import HALVES, greedy_order, layer_components
from .metric import Calibration, Estimates, Layers, Metric, Need, Order, Result, Yields
from .variant_losses import VariantLosses

log = logging.getLogger(__name__)

PROTECTED = (0, -1)
"""Layers that greedy orders never try, which prune.protect guards by default too: were one removed and then passed over
when the plan is made, all that goes after it would have been chosen for another model."""
ABSENT_SHARE = 0.1
"""Share of the layers that are absent from a random subnetwork (the source's f = 0.9)."""
WINDOW = 3
"""Layers that leave the full model in one walk of local Shapley values."""
SUBNETWORKS_PER_LAYER = 8
"""Subnetworks measured for every layer of the model. INFERRED; errors fall with its root."""

Absent = frozenset[int]
Game = Callable[[Sequence[Absent]], Sequence[float]]
"""Sets of players -> the model's worth without each of them; higher = better."""
Losses = Callable[[Sequence[Variant]], list[float]]
"""Variants -> the loss under each."""
Walk = Sequence[int]
"""Players in the order in which they leave."""


class LossMetric(Metric):
    """Numbers from losses under variants."""

    needs: ClassVar[Need] = "loss"

    @classmethod
    @abstractmethod
    def scores(cls, name: str, losses: Losses, model: PreTrainedModel, calibration: Calibration) -> Result:
        """By the metric ``name``. All ranks call it and get the same."""


class SingleDropPerplexity(LossMetric):
    """exp L({l}): perplexity without layer l alone (Shortened LLaMA, arXiv 2402.02834)."""

    yields: ClassVar[Yields] = "layers"

    @classmethod
    def scores(cls, name: str, losses: Losses, model: PreTrainedModel, calibration: Calibration) -> Layers:
        singles = [frozenset([layer]) for layer in range(len(decoder_layers(model)))]
        return tuple(math.exp(loss) for loss in losses(_without_each(singles)))


class Sleb(LossMetric):
    """Greedy order: at every step the layer l with the lowest L(removed + {l}) (SLEB's M3, arXiv:2402.09025)."""

    yields: ClassVar[Yields] = "order"
    PER_LAYER: ClassVar[int] = 1
    """Removals for every layer that is to go."""

    @classmethod
    def units(cls, model: PreTrainedModel) -> tuple[Component, ...]:
        """What may go."""
        return layer_components(len(decoder_layers(model)), protected=PROTECTED)

    @classmethod
    def scores(cls, name: str, losses: Losses, model: PreTrainedModel, calibration: Calibration) -> Order:
        count = None if calibration.num_drop is None else cls.PER_LAYER * calibration.num_drop
        return greedy_order(cls.units(model), losses, num_removals=count, name=name)


class BlockPruner(Sleb):
    """Greedy order like sleb, with attention and MLP as separate components (BlockPruner, arXiv:2406.10594)."""

    PER_LAYER: ClassVar[int] = 2

    @classmethod
    def refuse(cls, model: PreTrainedModel, name: str) -> None:
        for half in cls.units(model):
            if refusal := sublayers(model)[half.layers[0]].refusal:
                raise UserError(f"measure.metrics: {name}: {refusal}; use sleb, which removes whole layers")

    @classmethod
    def units(cls, model: PreTrainedModel) -> tuple[Component, ...]:
        return tuple(Component(layer.layers, half) for layer in super().units(model) for half in HALVES)


class _OfSubnetworks(LossMetric):
    """Compares layers with each other."""

    yields: ClassVar[Yields] = "layers"

    @classmethod
    def refuse(cls, model: PreTrainedModel, name: str) -> None:
        if len(decoder_layers(model)) == 1:
            raise UserError(f"measure.metrics: {name} compares layers, and this model has only one; remove it")


class PresentAbsent(_OfSubnetworks):
    """E[L | l absent] - E[L | l present] over random subnetworks of nine tenths of the layers.

    A difference in means over subnetworks of one size, as the code published with arXiv 2407.16286 computes it; no
    value of a coalition game.
    """

    @classmethod
    def scores(cls, name: str, losses: Losses, model: PreTrainedModel, calibration: Calibration) -> Estimates:
        num_layers = len(decoder_layers(model))
        return present_absent(
            _game(losses),
            num_layers,
            num_absent=max(1, round(ABSENT_SHARE * num_layers)),
            num_subnetworks=SUBNETWORKS_PER_LAYER * num_layers,
            seed=calibration.seed,
        )


class LocalShapley(_OfSubnetworks):
    """Mean of L(S + {l}) - L(S) over random S of at most two layers: layer l's Shapley value near the teacher.

    A walk that has come to the loss of guessing uniformly, log V, is not gone on with (arXiv 2409.14381; the estimator
    is INFERRED).
    """

    @classmethod
    def scores(cls, name: str, losses: Losses, model: PreTrainedModel, calibration: Calibration) -> Estimates:
        num_layers = len(decoder_layers(model))
        chance = -math.log(text_config(model.config).vocab_size)  # games are worth the negative loss
        intact = losses([INTACT])[0]
        if -intact <= chance:
            log.warning(
                "%s: the teacher's loss, %.4g nats per token, is not below guessing (%.4g); no walk is cut short there",
                name,
                intact,
                -chance,
            )
            chance = -math.inf
        return local_shapley(
            _game(losses),
            num_layers,
            window=min(WINDOW, num_layers - 1),
            num_subnetworks=SUBNETWORKS_PER_LAYER * num_layers,
            seed=calibration.seed,
            chance=chance,
        )


LOSS_METRICS: dict[str, type[LossMetric]] = {
    "single_drop_perplexity": SingleDropPerplexity,
    "sleb": Sleb,
    "blockpruner": BlockPruner,
    "present_absent": PresentAbsent,
    "local_shapley": LocalShapley,
}


def loss_scores(model: PreTrainedModel, calibration: Calibration, names: Sequence[str]) -> dict[str, Result]:
    """Scores and orders by the named LOSS_METRICS.

    Raises:
        UserError: losses that are not finite, or more removals than layers that may go.
    """
    losses = VariantLosses(model, calibration)
    found: dict[str, Result] = {}
    for name in names:
        found[name] = result = LOSS_METRICS[name].scores(name, partial(losses, what=name), model, calibration)
        if isinstance(result, Estimates):
            errors = zip(result.values, result.standard_errors, strict=True)
            log.info(
                "%s from %d subnetworks, in nats per token with standard errors: %s",
                name,
                result.num_subnetworks,
                ", ".join(f"layer {layer} {value:.4g} +- {error:.2g}" for layer, (value, error) in enumerate(errors)),
            )
    return found


def _game(losses: Losses) -> Game:
    return lambda absent: [-loss for loss in losses(_without_each(absent))]


def _without_each(absent: Sequence[Absent]) -> list[Variant]:
    return [without(layers, Component(tuple(sorted(layers))).name) for layers in absent]


def present_absent(game: Game, num_players: int, *, num_absent: int, num_subnetworks: int, seed: int = 0) -> Estimates:
    """Mean worth of the subnetworks with a player minus that of those without it, over random ones of one size.

    A difference in means, as the code published with arXiv 2407.16286 computes it; the values do not add up to the
    worth of the whole. Players are absent equally often (give or take one). All subnetworks of the size are
    taken where ``num_subnetworks`` allows.
    """
    is_complete = num_subnetworks >= math.comb(num_players, num_absent)
    if is_complete:
        drawn = [frozenset(absent) for absent in itertools.combinations(range(num_players), num_absent)]
    else:
        drawn = _dealt(num_players, num_absent, num_subnetworks, random.Random(seed))  # one set may come twice
    absent_NP = np.array([[player in absent for player in range(num_players)] for absent in drawn], dtype=bool)
    distinct = list(dict.fromkeys(drawn))
    worth = dict(zip(distinct, game(distinct), strict=True))
    worth_N = np.array([worth[absent] for absent in drawn])
    sides = [(worth_N[~absent_N], worth_N[absent_N]) for absent_N in absent_NP.T]
    values = tuple(float(present.mean() - absent.mean()) for present, absent in sides)
    errors = tuple(
        0.0 if is_complete else math.sqrt(_error2(present_N) + _error2(absent_N)) for present_N, absent_N in sides
    )
    return Estimates(values, errors, len(distinct))


def local_shapley(
    game: Game, num_players: int, *, window: int, num_subnetworks: int, chance: float = -math.inf, seed: int = 0
) -> Estimates:
    """Each player's mean marginal worth among the ``window`` first to leave the full model, in random order.

    With a window of all players this is the Shapley value; a smaller one looks only at near-full sets, since small ones
    are all at chance. Orders come in antithetic pairs, one the reverse of the other, and every player is among the
    first equally often (give or take one). Not more than ``num_subnetworks`` sets are asked for beside the full one.
    Shapley values of layers are from arXiv 2409.14381; this estimator is INFERRED, since theirs is not known in detail.
    """
    num_pairs = num_subnetworks // (2 * window)
    pairs = antithetic_pairs(num_players, window, num_pairs, seed=seed)
    return shapley_of_walks(game, num_players, pairs, window=window, chance=chance)


def antithetic_pairs(num_players: int, window: int, count: int, *, seed: int) -> list[tuple[Walk, Walk]]:
    """Random orders of all players, each with its reverse; any player is as often as others among the first
    ``window`` of either."""
    generator = random.Random(seed)
    if 2 * window >= num_players:
        orders = [generator.sample(range(num_players), num_players) for _ in range(count)]
        return [(order, order[::-1]) for order in orders]
    pairs: list[tuple[Walk, Walk]] = []
    # the first and the last `window` lead an order and its reverse: dealt out evenly; no walk reaches the middle
    for ends in _dealt(num_players, 2 * window, count, generator):
        outer = generator.sample(sorted(ends), len(ends))
        inner = generator.sample(sorted(set(range(num_players)) - ends), num_players - len(ends))
        order = [*outer[:window], *inner, *outer[window:]]
        pairs.append((order, order[::-1]))
    return pairs


def shapley_of_walks(
    game: Game, num_players: int, clusters: Sequence[Iterable[Walk]], *, window: int, chance: float = -math.inf
) -> Estimates:
    """Mean over ``clusters`` of walks of what the model loses when a player leaves, at its first ``window`` steps.

    Once a walk has come to ``chance``, what leaves later counts as worth nothing and is not asked for. Clusters are
    taken as independent: errors are those of a ratio of sums over clusters.
    """
    walks = [(number, tuple(walk)) for number, cluster in enumerate(clusters) for walk in cluster]
    worth: dict[Absent, float] = {frozenset(): game([frozenset()])[0]}
    sums_CP, counts_CP = np.zeros((2, len(clusters), num_players))
    truncated: set[tuple[int, ...]] = set()
    for step in range(window):
        # all walks take the step together, so that a set that several come to is asked for once, in one call
        truncated |= {walk for _, walk in walks if walk not in truncated and worth[frozenset(walk[:step])] <= chance}
        open_walks = [walk for _, walk in walks if walk not in truncated]
        fresh = list(dict.fromkeys(after for walk in open_walks if (after := frozenset(walk[: step + 1])) not in worth))
        if fresh:
            worth |= zip(fresh, game(fresh), strict=True)
        for number, walk in walks:
            counts_CP[number, walk[step]] += 1
            if walk not in truncated:
                sums_CP[number, walk[step]] += worth[frozenset(walk[:step])] - worth[frozenset(walk[: step + 1])]
    counts_P = counts_CP.sum(0)
    values_P = sums_CP.sum(0) / counts_P
    # value = sum / count over clusters, a ratio estimator: its residuals are sum - value * count
    squares_P = ((sums_CP - values_P * counts_CP) ** 2).sum(0)
    told_P = (counts_CP > 0).sum(0)  # a cluster without the player says nothing of its spread
    scale_P = np.divide(told_P, told_P - 1, out=np.full(num_players, math.nan), where=told_P > 1)
    errors_P = np.sqrt(scale_P * squares_P) / counts_P
    return Estimates(tuple(values_P.tolist()), tuple(errors_P.tolist()), num_subnetworks=len(worth))


def _dealt(num_players: int, size: int, count: int, generator: random.Random) -> list[Absent]:
    """``count`` random sets of ``size`` players, every player in equally many (give or take one).

    Each set alone is uniform over all sets of this size.
    """
    counts = [0] * num_players
    sets: list[Absent] = []
    for _ in range(count):
        # those taken least often come first, equals in random order
        chances = [generator.random() for _ in counts]
        chosen = sorted(range(num_players), key=lambda player: (counts[player], chances[player]))[:size]
        for player in chosen:
            counts[player] += 1
        sets.append(frozenset(chosen))
    return sets


def _error2(worth_N: np.ndarray) -> float:
    """Square of the standard error of the mean; NaN for a single number."""
    return float(worth_N.var(ddof=1) / len(worth_N)) if len(worth_N) > 1 else math.nan
