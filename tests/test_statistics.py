"""Intervals cover what they promise, tests equal independent references, and unlike measurements are refused."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from shoal.artifact import ItemScore, TaskScore
from shoal.errors import UserError
from shoal.eval import statistics as ours


def task(scores: Sequence[float], *, weights: Sequence[float] | None = None, **changes: object) -> TaskScore:
    items = tuple(
        ItemScore(f"item{index}", float(score), target="t", weight=1.0 if weights is None else weights[index])
        for index, score in enumerate(scores)
    )
    mean = float(np.average([item.score for item in items], weights=[item.weight for item in items]))
    made = TaskScore("t", "retrieval", "continuation", "acc", mean, mean, mean, len(items), 0.25, True, "1", 0, items)
    made = dataclasses.replace(made, **changes)  # pyright: ignore[reportArgumentType]
    low, high = ours.interval(made)
    return dataclasses.replace(made, ci_low=low, ci_high=high)


def nats(scores: Sequence[float], weights: Sequence[float] | None = None) -> TaskScore:
    return task(scores, weights=weights, metric="nats_per_token", higher_is_better=False, chance=0.0)


@pytest.mark.parametrize(("successes", "n"), [(0, 5), (3, 10), (77, 200), (200, 200)])
def test_wilson_equals_scipys(successes: int, n: int) -> None:
    expected = stats.binomtest(successes, n).proportion_ci(method="wilson")
    assert ours.wilson(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_of_a_full_score_contains_it() -> None:
    assert ours.wilson(30, 30)[1] == 1.0
    assert ours.wilson(0, 30)[0] == 0.0


def test_wilson_refuses_no_items() -> None:
    with pytest.raises(ValueError, match="at least one item"):
        ours.wilson(0, 0)


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (1, 0), (9, 2), (5, 5), (0, 12)])
def test_mcnemar_equals_the_sum_over_the_binomial(won: int, lost: int) -> None:
    n = won + lost
    tail = sum(math.comb(n, k) for k in range(n + 1) if abs(k - n / 2) >= abs(won - n / 2)) / 2**n
    assert ours.mcnemar(won, lost) == pytest.approx(tail)


def test_newcombes_interval_equals_his_printed_example() -> None:
    """Newcombe 1998 (17:2635), method 10: the table 36, 12, 2, 0 gives 0.0569 to 0.3404 for 0.2."""
    low, high = ours.newcombe_paired(both=36, won=12, lost=2, neither=0)
    assert (low, high) == pytest.approx((0.0569, 0.3404), abs=5e-5)


@pytest.mark.parametrize(("base", "win", "loss"), [(0.5, 0.1, 0.2), (0.05, 0.02, 0.01), (0.9, 0.03, 0.05)])
def test_paired_proportion_interval_covers(base: float, win: float, loss: float) -> None:
    """Simulated share of intervals that hold the true difference; with rare changes they err to the safe side."""
    rng = np.random.default_rng(0)
    shares = [base - loss, loss, win, 1 - base - win]
    covered, total = 0, 2000
    for both, lost, won, neither in rng.multinomial(40, shares, size=total):
        low, high = ours.newcombe_paired(both=int(both), won=int(won), lost=int(lost), neither=int(neither))
        covered += low <= win - loss <= high
    assert covered / total >= 0.935
    assert covered / total <= (0.975 if win >= 0.1 else 1.0)


def test_bootstrap_interval_of_a_weighted_mean_covers() -> None:
    rng = np.random.default_rng(1)
    weights = rng.integers(100, 500, size=60).astype(float)
    covered = 0
    for _ in range(200):
        values = rng.gamma(2.0, 1.0, size=60)
        low, high = ours.bootstrap_mean(values.tolist(), weights.tolist())
        covered += low <= 2.0 <= high
    assert 0.89 <= covered / 200 <= 0.99


def test_bootstrap_interval_is_close_to_the_t_interval() -> None:
    values = np.random.default_rng(2).normal(3.0, 0.5, size=80)
    expected = stats.t.interval(0.95, 79, values.mean(), stats.sem(values))
    assert ours.bootstrap_mean(values.tolist()) == pytest.approx(expected, abs=0.015)


def test_equal_scores_are_no_difference() -> None:
    for made in (task([1, 0, 1, 1]), nats([2.0, 3.0, 1.5])):
        found = ours.paired(made, made)
        assert (found.difference, found.p_value, found.won, found.lost) == (0.0, 1.0, 0, 0)
        assert found.ci_low <= 0 <= found.ci_high


def test_paired_zero_one_scores_count_wins_and_losses() -> None:
    before, after = task([1, 1, 1, 0, 0, 0, 0, 1]), task([1, 0, 1, 1, 1, 1, 0, 1])
    found = ours.paired(before, after)
    assert (found.test, found.won, found.lost, found.n) == ("mcnemar-exact", 3, 1, 8)
    assert found.difference == pytest.approx(0.25)
    assert found.p_value == pytest.approx(0.625)
    assert found.ci_low < 0 < found.ci_high


def test_lower_is_better_wins_where_the_value_falls() -> None:
    rng = np.random.default_rng(3)
    before = rng.normal(3.0, 1.0, size=50)
    found = ours.paired(nats(before.tolist()), nats((before - 0.2 + rng.normal(0, 0.1, size=50)).tolist()))
    assert found.test == "paired-bootstrap"
    assert found.won > found.lost
    assert found.ci_low < -0.2 < found.ci_high < 0
    assert found.p_value < 0.01


def test_weights_count_in_the_paired_difference() -> None:
    before, after = nats([1.0, 2.0], [300, 100]), nats([2.0, 2.0], [300, 100])
    assert ours.paired(before, after).difference == pytest.approx(0.75)


def test_items_are_paired_by_id_not_by_position() -> None:
    before = task([1, 0, 0, 1])
    shuffled = dataclasses.replace(before, items=before.items[::-1])
    assert ours.paired(before, shuffled).lost == 0


@pytest.mark.parametrize(
    "changes",
    [{"version": "2"}, {"num_fewshot": 5}, {"metric": "acc_norm"}, {"chance": 0.1}, {"protocol": "generation"}],
    ids=lambda changes: next(iter(changes)),
)
def test_other_settings_are_refused_by_name(changes: dict[str, object]) -> None:
    with pytest.raises(UserError, match=rf"task 't': {next(iter(changes))} is .* cannot be compared"):
        ours.paired(task([1, 0]), dataclasses.replace(task([1, 0]), **changes))  # pyright: ignore[reportArgumentType]


def test_other_items_and_other_answers_are_refused() -> None:
    before = task([1, 0])
    renamed = dataclasses.replace(before, items=(before.items[0], dataclasses.replace(before.items[1], id="other")))
    with pytest.raises(UserError, match="items differ"):
        ours.paired(before, renamed)
    changed = dataclasses.replace(before, items=(before.items[0], dataclasses.replace(before.items[1], target="u")))
    with pytest.raises(UserError, match="target of item 'item1'"):
        ours.paired(before, changed)


def test_holm_equals_the_definition() -> None:
    p_values = [0.04, 0.01, 0.03, 0.5]
    found = ours.holm(p_values)
    assert found == pytest.approx([0.09, 0.04, 0.09, 0.5])
    for one, other in itertools.pairwise(sorted(range(4), key=lambda i: p_values[i])):
        assert found[one] <= found[other]
    assert ours.holm([]) == []


def test_retention_is_chance_corrected_and_holds_its_value() -> None:
    rng = np.random.default_rng(4)
    before = (rng.random(200) < 0.8).astype(float)
    after = before * (rng.random(200) < 0.7)
    found = ours.retention(task(before.tolist()), task(after.tolist()))
    expected = (after.mean() - 0.25) / (before.mean() - 0.25)
    assert found.value == pytest.approx(expected)
    assert found.ci_low is not None
    assert found.ci_high is not None
    assert found.ci_low < expected < found.ci_high


def test_retention_of_an_unchanged_model_is_one_and_its_interval_says_how_few_items_there_were() -> None:
    few, many = task([1, 1, 1, 0, 1, 1, 1, 1]), task([1, 1, 1, 0, 1, 1, 1, 1] * 50)
    wide, narrow = ours.retention(few, few), ours.retention(many, many)
    assert wide.value == narrow.value == 1.0
    assert wide.ci_low is not None
    assert narrow.ci_low is not None
    assert wide.ci_low < 0.8 < 0.98 < narrow.ci_low < 1.0


def test_retention_says_why_it_is_none() -> None:
    assert "no chance level" in ours.retention(nats([2.0]), nats([3.0])).reason
    at_chance = task([1, 0, 0, 0])
    found = ours.retention(at_chance, at_chance)
    assert found.value is None
    assert "teacher is not above chance" in found.reason


def test_standard_errors_above_chance() -> None:
    made = task([1] * 60 + [0] * 40)
    assert ours.z_above_chance(made) == pytest.approx(0.35 / math.sqrt(0.25 * 0.75 / 100))
    written = dataclasses.replace(made, chance=0.0)
    assert ours.z_above_chance(written) == pytest.approx(0.6 / math.sqrt((62 / 104) * (42 / 104) / 104))
    assert ours.z_above_chance(dataclasses.replace(made, chance=0.0, score=0.0, items=task([0] * 100).items)) == 0.0
    assert ours.z_above_chance(nats([1.0, 2.0])) is None


def test_minimal_detectable_difference_has_the_promised_power() -> None:
    rng = np.random.default_rng(5)
    n, discordant = 200, 0.3
    before, after = task([1] * 30 + [0] * 30 + [1] * 140), task([0] * 30 + [1] * 30 + [1] * 140)
    least = ours.minimal_detectable_difference(before, after)
    win = (discordant + least) / 2
    drawn = rng.multinomial(n, [win, discordant - win, 1 - discordant], size=2000)
    shown = np.mean([(won - lost) ** 2 > 3.841 * (won + lost) for won, lost, _ in drawn])
    assert 0.75 <= shown <= 0.86


def test_minimal_detectable_difference_of_few_items_is_everything() -> None:
    assert ours.minimal_detectable_difference(task([1, 0, 1]), task([1, 0, 1])) == 1.0
    spread = ours.minimal_detectable_difference(nats([1.0, 2.0, 3.0]), nats([1.1, 2.0, 2.9]))
    assert spread == pytest.approx((4.30265 + 0.84162) * 0.1 / math.sqrt(3), rel=1e-4)
