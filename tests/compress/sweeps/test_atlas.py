"""The atlas: every statistic against an independent reference, planted truths found, intervals that cover them.

Covers: shoal.compress.sweeps.table.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from scipy import optimize, stats
from sweep_results import LOST, NUM_ITEMS, NUM_LAYERS, atlas, nats, right, scores, task

from shoal.artifacts.evaluation import TaskScore
from shoal.compress.sweeps.atlas import agreement, build_atlas, cornerstones, layer_losses, reliability, spearman
from shoal.compress.sweeps.table import Measured, require_items
from shoal.errors import UserError
from shoal.stats import paired
from shoal.stats.intervals import newcombe_paired, paired_correlation, ratio, wilson

TABLES = [(30, 2, 9, 10), (40, 0, 0, 11), (50, 1, 0, 0), (5, 3, 40, 12), (0, 1, 45, 20), (45, 9, 2, 10)]
"""Items right both times, only after, only before, never."""


def wilson_reach(count: int, n: int) -> tuple[float, float]:
    low, high = wilson(count, n)
    return count / n - low, high - count / n


def paired_ratio(both: int, won: int, lost: int, neither: int, chance: float) -> tuple[float, float] | None:
    n = both + won + lost + neither

    def over_chance(count: int) -> tuple[float, float, float]:
        low, high = wilson(count, n)
        return count / n - chance, low - chance, high - chance

    return ratio(over_chance(both + won), over_chance(both + lost), paired_correlation(both, won, lost, neither))


def corrected_phi(both: int, won: int, lost: int, neither: int) -> float:
    covariance = both * neither - won * lost
    if covariance > 0:
        covariance = max(0, covariance - (both + won + lost + neither) / 2)
    margins = (both + won) * (lost + neither) * (both + lost) * (won + neither)
    return covariance / math.sqrt(margins) if margins else 0.0


def limit_of(both: int, won: int, lost: int, neither: int, chance: float, side: int) -> Callable[[float], float]:
    """Lower (-1) or upper (+1) square-and-add limit of (after - chance) - r (before - chance), as a function of r."""
    n = both + won + lost + neither
    after, before = (both + won) / n, (both + lost) / n
    after_down, after_up = wilson_reach(both + won, n)
    before_down, before_up = wilson_reach(both + lost, n)
    phi = corrected_phi(both, won, lost, neither)

    def limit(r: float) -> float:
        a = after_down if side < 0 else after_up
        # -r * before falls by before's upper reach where r > 0, by its lower one where r < 0
        b = (before_up if r > 0 else before_down) if side < 0 else (before_down if r > 0 else before_up)
        reach = math.sqrt(max(0.0, a**2 + (r * b) ** 2 - 2 * phi * a * r * b))
        return (after - chance) - r * (before - chance) + side * reach

    return limit


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("chance", [0.0, 0.25])
def test_retention_limits_are_where_the_limits_of_the_difference_to_a_multiple_are_zero(
    table: tuple[int, int, int, int], chance: float
) -> None:
    found = paired_ratio(*table, chance)
    assert found is not None
    for limit, side in zip(found, (-1, 1), strict=True):
        expected = optimize.brentq(limit_of(*table, chance, side), -20.0, 20.0)  # pyright: ignore[reportArgumentType]
        assert limit == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("table", TABLES)
def test_retention_holds_one_exactly_where_the_change_holds_zero(table: tuple[int, int, int, int]) -> None:
    both, won, lost, neither = table
    low, high = newcombe_paired(both=both, won=won, lost=lost, neither=neither)
    kept = paired_ratio(*table, 0.25)
    assert kept is not None
    assert (low <= 0 <= high) == (kept[0] <= 1 <= kept[1])


def test_every_effect_equals_the_paired_comparison_of_the_two_scores() -> None:
    intact, removed = scores()
    for index, column in enumerate(atlas().columns):
        for effect, variant in zip(column.effects, (tasks[index] for tasks in removed), strict=True):
            expected = paired.paired(intact[index], variant)
            assert effect.change.value == pytest.approx(expected.difference, abs=1e-12)
            assert effect.p_value == pytest.approx(expected.p_value, abs=1e-12)
            assert effect.score.value == pytest.approx(variant.score)
            assert column.test == expected.test
            if column.test == "mcnemar-exact":
                assert (effect.change.low, effect.change.high) == (expected.ci_low, expected.ci_high)
                assert (effect.score.low, effect.score.high) == wilson(variant.score * NUM_ITEMS, NUM_ITEMS)
        assert [effect.adjusted_p for effect in column.effects] == paired.holm([e.p_value for e in column.effects])


UNEQUAL = ([512.0] * 3 + [6.0] * 9) * 3
"""Three documents as long as a window and nine short ones, three times over: 36 windows, as good as 9.6 equal ones."""


def test_retention_is_the_share_of_the_score_above_chance() -> None:
    for column in atlas().columns[:3]:
        for effect, lost in zip(column.effects, LOST[column.task], strict=True):
            assert effect.share_kept is not None
            expected = ((64 - lost) / 80 - column.chance) / (64 / 80 - column.chance)
            assert effect.share_kept.value == pytest.approx(expected)
            assert effect.share_kept.low <= expected <= effect.share_kept.high


def test_a_layer_is_critical_only_after_holms_correction() -> None:
    variants = [[task(right(0.8, lost))] for lost in (6, 0, 0, 40)]
    (column,) = build_atlas([task(right(0.8))], variants).columns
    assert column.effects[0].p_value == 0.03125
    assert column.effects[0].adjusted_p == pytest.approx(3 * 0.03125)
    assert column.critical == (3,)


def test_changes_of_layers_are_correlated_over_items_with_their_weights() -> None:
    rng = np.random.default_rng(6)
    weights, base = (rng.random(30) + 0.2).tolist(), rng.random(30)
    moved = rng.normal(0.0, 1.0, size=(30, 2)) @ [[1.0, 0.8], [0.0, 0.6]]
    variants = [[nats(base + column, weights=weights)] for column in moved.T] + [[nats(base, weights=weights)]]
    (column,) = build_atlas([nats(base, weights=weights)], variants).columns
    share = np.array(weights) / sum(weights)
    influence = share[:, None] * (moved - share @ moved)
    expected = (influence[:, 0] @ influence[:, 1]) / np.sqrt((influence**2).sum(axis=0).prod())
    assert column.correlation[1] == (pytest.approx(expected, abs=1e-4), 1.0)
    assert column.correlation[2] == (0.0, 0.0, 1.0)


def test_importance_is_higher_for_layers_to_keep_whatever_the_direction_of_the_metric() -> None:
    made = atlas()
    assert made.columns[0].importances == pytest.approx([lost / 80 for lost in LOST["retrieval_continuation"]])
    assert made.columns[3].importances[0] == pytest.approx(4.0, abs=0.01)


def test_a_task_without_signal_has_no_share_kept_and_says_why() -> None:
    made = task(right(0.3))
    (column,) = build_atlas([made], [[made], [made]]).columns
    assert column.no_share == "the baseline is not clearly above chance (0.30 against 0.25, n = 80)"
    assert layer_losses(column) is None


# --- refusals -----------------------------------------------------------------------------------------------------


def test_too_few_items_are_refused_before_and_after_the_sweep() -> None:
    message = r"task 'retrieval_continuation': has 6 items, .* at least 10 .*; raise measure.sweep.limit"
    few = task(right(0.5, count=6))
    with pytest.raises(UserError, match=message):
        build_atlas([few], [[few]] * 20)
    with pytest.raises(UserError, match=message):
        require_items("retrieval_continuation", 6, 20)
    require_items("retrieval_continuation", 10, 20)
    uneven = nats(np.arange(12.0), weights=UNEQUAL[:12])
    with pytest.raises(UserError, match=r"its 12 items .* worth 3\.2 equal ones, but an interval needs 8; raise"):
        build_atlas([uneven], [[uneven]] * 2)


def with_other_version(tasks: list[TaskScore]) -> list[TaskScore]:
    return [replace(score, version="2") for score in tasks]


def with_nan(tasks: list[TaskScore]) -> list[TaskScore]:
    first, *rest = tasks[0].items
    return [replace(tasks[0], items=(replace(first, score=math.nan), *rest)), *tasks[1:]]


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        (with_other_version, "version is '1' in one evaluation and '2' in the other"),
        (with_nan, r"item 'retrieval-0' has the score nan in variant 2; measure in another dtype"),
    ],
)
def test_unlike_scores_are_refused(spoilt: Callable[[list[TaskScore]], list[TaskScore]], message: str) -> None:
    intact, removed = scores()
    removed[2] = spoilt(removed[2])
    with pytest.raises(UserError, match=message):
        build_atlas(intact, removed)


# --- gaps, depth, agreement ---------------------------------------------------------------------------------------


def test_protocol_gap_is_the_difference_of_the_retentions_of_shared_items() -> None:
    (gap,) = atlas().gaps
    assert (gap.ability, gap.likelihood, gap.generation, gap.n) == (
        "retrieval",
        "retrieval_continuation",
        "retrieval_generation",
        NUM_ITEMS,
    )
    one, other = LOST["retrieval_continuation"], LOST["retrieval_generation"]
    expected = [(1 - one[i] / 80 / 0.55) - (1 - other[i] / 80 / 0.8) for i in range(NUM_LAYERS)]
    assert [estimate.value for estimate in gap.gaps] == pytest.approx(expected)
    assert gap.mean.value == pytest.approx(np.mean(expected))
    assert [estimate.low > 0 for estimate in gap.gaps] == [False, False, False, False, True, False]


def test_depth_centroid_equals_its_definition() -> None:
    made = atlas()
    for column, profile in zip(made.columns, made.depth, strict=True):
        if column.higher_is_better:
            kept = [effect.share_kept.value for effect in column.effects if effect.share_kept]
            weights = [max(0.0, 1 - value) for value in kept]
        else:
            weights = [max(0.0, effect.change.value) for effect in column.effects]
        assert profile.centroid is not None
        expected = sum(w * layer / (NUM_LAYERS - 1) for layer, w in enumerate(weights)) / sum(weights)
        assert profile.centroid.value == pytest.approx(expected)
        assert profile.centroid.low <= expected <= profile.centroid.high


def test_cornerstones_are_the_layers_that_take_a_task_to_chance() -> None:
    assert cornerstones(atlas().sweep) == (0,)
    at_chance = task(right(0.25))
    with pytest.raises(UserError, match="cornerstone needs a task on which the teacher is clearly above chance"):
        cornerstones(build_atlas([at_chance], [[at_chance]]).sweep)


@pytest.mark.parametrize("ties", [False, True])
def test_rank_correlation_equals_scipys(ties: bool) -> None:
    one, other = np.random.default_rng(3).integers(0, 4 if ties else 10**6, size=(2, 20)).astype(float)
    assert spearman(one, other) == pytest.approx(stats.spearmanr(one, other)[0])
    assert spearman(one, np.ones(20)) is None


def test_columns_and_metrics_are_compared_together() -> None:
    made = atlas()
    found = made.agreement
    assert found.columns == ("block_influence", *(column.task for column in made.columns))
    rows = [(0.9, 0.05, 0.1, 0.3, 0.2, 0.15), *(column.importances for column in made.columns)]
    for i, j in itertools.product(range(5), range(5)):
        assert found.spearman[i][j] == pytest.approx(stats.spearmanr(rows[i], rows[j])[0])
    assert found.ceiling[0] == (None,) * 5
    own = [found.ceiling[place][place] or 0 for place in (1, 2)]  # the square root of its square
    assert found.ceiling[1][2] == pytest.approx(math.sqrt(own[0] * own[1]))


def noisy(loss: np.ndarray, items: int, rng: np.random.Generator) -> Measured:
    """A column of nats whose layers cost ``loss`` on average."""
    base = rng.normal(2.0, 0.3, size=(items, 1))
    scores_NK = np.hstack([base, base + loss + rng.normal(0, 0.5, size=(items, len(loss)))])
    ids = tuple(map(str, range(items)))
    return Measured(nats(base[:, 0]), ids, scores_NK, np.ones(items), False)


def test_reliability_tells_noise_from_layers_that_differ() -> None:
    rng = np.random.default_rng(4)
    nothing, clear = reliability(noisy(np.zeros(20), 90, rng)), reliability(noisy(np.arange(20.0), 90, rng))
    assert nothing is not None
    assert nothing < 0.5  # of thirds 0.25, by Spearman and Brown
    assert clear == pytest.approx(1.0)


@pytest.mark.slow
def test_ceiling_is_what_two_measurements_of_the_same_importance_reach() -> None:
    """Two columns of one truth on different items: their rank correlation is the ceiling, far below 1."""
    rng = np.random.default_rng(5)
    found, ceilings = [], []
    for _ in range(12):
        loss = rng.normal(0.0, 0.08, size=30)
        one, other = noisy(loss, 60, rng), noisy(loss, 60, rng)
        other = replace(other, task=replace(other.task, task="again"))
        made = agreement([one, other], {})
        found.append(made.spearman[0][1])
        ceilings.append(made.ceiling[0][1])
    assert 0.3 < np.mean(found) < 0.9
    assert np.mean(found) == pytest.approx(np.mean(ceilings), abs=0.1)
