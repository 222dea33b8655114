"""Worth of layers beside others: means over random subnetworks, and Shapley values near the full model.

N subnetworks, P players (layers), C clusters of walks. A game says what the model is worth without a set of players.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from shoal.errors import UserError

from .metric import Estimates

Absent = frozenset[int]
Game = Callable[[Sequence[Absent]], Sequence[float]]
"""Sets of players -> the model's worth without each of them; higher = better."""
Walk = Sequence[int]
"""Players in the order in which they leave."""


def present_absent(game: Game, num_players: int, *, num_absent: int, num_subnetworks: int, seed: int = 0) -> Estimates:
    """Mean worth of the subnetworks with a player minus that of those without it, over random ones of one size.

    A difference in means, as the code published with arXiv 2407.16286 computes it; the values do not add up to the
    worth of the whole. Players are absent equally often (give or take one). All subnetworks of the size are
    taken where ``num_subnetworks`` allows.

    Raises:
        UserError: no such size, or too few subnetworks for every player to be present and absent at least once.
    """
    if not 0 < num_absent < num_players:
        raise UserError(
            f"present_absent: {num_absent} of {num_players} layers absent leaves nothing to compare; leave out at "
            "least 1 and keep at least 1"
        )
    is_complete = num_subnetworks >= math.comb(num_players, num_absent)
    if is_complete:
        drawn = [frozenset(absent) for absent in itertools.combinations(range(num_players), num_absent)]
    else:
        drawn = _dealt(num_players, num_absent, num_subnetworks, random.Random(seed))  # one set may come twice
    absent_NP = np.array([[player in absent for player in range(num_players)] for absent in drawn], dtype=bool)
    if not len(drawn) or not (absent_NP.any(0) & ~absent_NP.all(0)).all():
        least = max(-(-num_players // num_absent), -(-num_players // (num_players - num_absent)))
        raise UserError(
            f"present_absent: with {num_subnetworks} subnetworks of {num_players - num_absent} of {num_players} layers "
            f"not every layer is present and absent at least once; take {least} or more"
        )
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
    game: Game,
    num_players: int,
    *,
    window: int,
    num_subnetworks: int,
    chance: float = -math.inf,
    seed: int = 0,
) -> Estimates:
    """Each player's mean marginal worth among the ``window`` first to leave the full model, in random order.

    With a window of all players this is the Shapley value; a smaller one looks only at near-full sets, since small ones
    are all at chance. Orders come in antithetic pairs, one the reverse of the other, and every player is among the
    first equally often (give or take one). Not more than ``num_subnetworks`` sets are asked for beside the full one.
    Shapley values of layers are from arXiv 2409.14381; this estimator is INFERRED, since theirs is not known in detail.

    Raises:
        UserError: no such window, or too few subnetworks for two pairs and for every player to leave once.
    """
    if not 0 < window <= num_players:
        raise UserError(f"local_shapley: window {window} is none of 1..{num_players}, the number of layers")
    num_pairs = num_subnetworks // (2 * window)
    least = max(2, -(-num_players // (2 * window)))
    if num_pairs < least:
        raise UserError(
            f"local_shapley: {num_subnetworks} subnetworks are too few for {num_players} layers and a window of "
            f"{window}: every layer has to be present and absent, in two pairs of orders at least; take "
            f"{least * 2 * window} or more"
        )
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
