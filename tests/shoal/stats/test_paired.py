"""Intervals cover what they promise, tests equal independent references, and unlike measurements are refused.

Covers: shoal.stats.intervals.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from scipy import optimize, stats

from shoal.artifacts.evaluation import ItemScore, TaskScore
from shoal.errors import UserError
from shoal.stats import paired as ours


def task(
    scores: Sequence[float] | np.ndarray, *, weights: Sequence[float] | None = None, **changes: object
) -> TaskScore:
    items = tuple(
        ItemScore(f"item{index}", float(score), target="t", weight=1.0 if weights is None else weights[index])
        for index, score in enumerate(scores)
    )
    mean = float(np.average([item.score for item in items], weights=[item.weight for item in items]))
    made = TaskScore("t", "retrieval", "continuation", "acc", mean, mean, mean, len(items), 0.25, True, "1", 0, items)
    made = dataclasses.replace(made, **changes)  # pyright: ignore[reportArgumentType]
    low, high = ours.interval(made)
    return dataclasses.replace(made, ci_low=low, ci_high=high)


def nats(scores: Sequence[float] | np.ndarray, weights: Sequence[float] | None = None) -> TaskScore:
    return task(scores, weights=weights, metric="nats_per_token", higher_is_better=False, chance=0.0)


@pytest.mark.parametrize(("successes", "n"), [(0, 5), (3, 10), (77, 200), (200, 200)])
def test_wilson_equals_scipys(successes: int, n: int) -> None:
    expected = stats.binomtest(successes, n).proportion_ci(method="wilson")
    assert ours.wilson(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (1, 0), (9, 2), (5, 5), (0, 12)])
def test_mcnemar_equals_the_sum_over_the_binomial(won: int, lost: int) -> None:
    n = won + lost
    tail = sum(math.comb(n, k) for k in range(n + 1) if abs(k - n / 2) >= abs(won - n / 2)) / 2**n
    assert ours.mcnemar(won, lost) == pytest.approx(tail)


def test_newcombes_interval_equals_his_printed_example() -> None:
    """Newcombe 1998 (17:2635), method 10: the table 36, 12, 2, 0 gives 0.0569 to 0.3404 for 0.2."""
    low, high = ours.newcombe_paired(both=36, won=12, lost=2, neither=0)
    assert (low, high) == pytest.approx((0.0569, 0.3404), abs=5e-5)


def test_paired_zero_one_scores_count_wins_and_losses() -> None:
    before, after = task([1, 1, 1, 0, 0, 0, 0, 1]), task([1, 0, 1, 1, 1, 1, 0, 1])
    found = ours.paired(before, after)
    assert (found.test, found.won, found.lost, found.n) == ("mcnemar-exact", 3, 1, 8)
    assert found.difference == pytest.approx(0.25)
    assert found.p_value == pytest.approx(0.625)
    assert found.ci_low < 0 < found.ci_high


@pytest.mark.parametrize(
    "changes",
    [
        {"version": "2"},
        {"num_fewshot": 5},
        {"metric": "acc_norm"},
        {"chance": 0.1},
        {"protocol": "x"},
        {"matching": 2},
        {"engine": "vllm"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_settings_are_refused_by_name(changes: dict[str, object]) -> None:
    with pytest.raises(
        UserError, match=rf"task 't': {next(iter(changes))} is .* evaluate both models with the same settings"
    ):
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


def test_retention_says_why_it_is_none() -> None:
    assert "no chance level" in ours.retention(nats([2.0]), nats([3.0])).reason
    at_chance = task([1, 0, 0, 0])
    found = ours.retention(at_chance, at_chance)
    assert found.value is None
    assert "teacher is not shown to be above chance" in found.reason


def test_minimal_detectable_difference_has_the_promised_power() -> None:
    rng = np.random.default_rng(5)
    n, discordant = 200, 0.3
    before, after = task([1] * 30 + [0] * 30 + [1] * 140), task([0] * 30 + [1] * 30 + [1] * 140)
    least = ours.minimal_detectable_difference(before, after)
    win = (discordant + least) / 2
    drawn = rng.multinomial(n, [win, discordant - win, 1 - discordant], size=2000)
    shown = np.mean([(won - lost) ** 2 > 3.841 * (won + lost) for won, lost, _ in drawn])
    assert 0.75 <= shown <= 0.86


# --- few items, weights, all equal ----------------------------------------------------------------------------------


def test_limits_of_a_mean_are_the_wider_of_students_and_halls() -> None:
    """Against scipy's t interval and Hall's transformation (1992) with scipy's skewness, solved for its ends."""
    for n, shape in ((4, 1.0), (20, 0.5), (60, 4.0)):
        values = np.random.default_rng(n).gamma(shape, 1.0, size=n)
        skew = float(stats.skew(values)) / math.sqrt(n)  # of the mean
        error, quantile = stats.sem(values), stats.t.ppf(0.975, n - 1)

        def beyond(limit: float, sign: int, values=values, skew=skew, error=error, quantile=quantile) -> float:
            t = (values.mean() - limit) / error
            return t + skew / 6 + skew * t**2 / 3 + skew**2 * t**3 / 27 - sign * quantile

        reach = 100 * error
        ends = [optimize.brentq(beyond, values.mean() - reach, values.mean() + reach, args=(sign,)) for sign in (1, -1)]
        plain = stats.t.interval(0.95, n - 1, values.mean(), error)
        assert ours.mean_limits(values) == pytest.approx((min(ends[0], plain[0]), max(ends[1], plain[1])), rel=1e-9)
        assert ends[1] > plain[1], "the long side"


def test_limits_of_a_weighted_mean_rest_on_its_jackknife() -> None:
    rng = np.random.default_rng(9)
    values, weights = rng.normal(size=30), rng.uniform(1, 4, size=30)
    low, high = ours.mean_limits(values, weights)
    mean = np.average(values, weights=weights)
    left_out = [np.average(np.delete(values, i), weights=np.delete(weights, i)) for i in range(30)]
    error = math.sqrt(29 / 30 * math.fsum((one - mean) ** 2 for one in left_out))
    reach = stats.t.ppf(0.975, weights.sum() ** 2 / (weights**2).sum() - 1) * error
    assert low <= mean - reach
    assert high >= mean + reach
    assert high - low == pytest.approx(2 * reach, rel=0.05), "hardly skewed"


# --- coverage and error rates of what the report adds ------------------------------------------------------------


def test_p_of_a_few_nats_is_that_of_a_t_test() -> None:
    change = [0.533, 0.498, 0.452]
    found = ours.paired(nats([0.0] * 3), nats(change))
    t = np.mean(change) / (np.std(change, ddof=1) / math.sqrt(3))
    assert found.p_value == pytest.approx(2 * stats.t.sf(t, 2), rel=0.5)


@pytest.mark.prove
def test_what_is_clear_stays_clear_among_hundreds_of_tasks() -> None:
    """Holm's correction multiplies by the number of tasks: a least p that the resamples set would be lost to it."""
    fallen = np.random.default_rng(0).normal(-0.5, 0.05, 300)
    change = ours.paired_values(np.zeros(300), fallen, np.ones(300), binary=False, higher_is_better=False)
    assert max(ours.holm([change.p_value] * 400)) < 1e-9


def test_p_is_below_a_twentieth_exactly_where_the_interval_excludes_zero() -> None:
    rng = np.random.default_rng(15)
    sides = []
    for n in (3, 4, 10, 40):
        for shift in rng.uniform(-1.0, 1.0, size=60):
            found = ours.paired(nats([0.0] * n), nats(rng.gamma(2.0, 0.5, size=n) - 1.0 + shift))
            sides.append(found.ci_low > 0 or found.ci_high < 0)
            assert sides[-1] == (found.p_value < 0.05)
    assert 40 < sum(sides) < 200


def two_protocols(rng: np.random.Generator, n: int, *, shared: bool) -> list[tuple[TaskScore, TaskScore]]:
    """(teacher, cut model) under a gentle and a hard protocol that keep 0.875 and 0.5, with luck in common or not."""
    luck = rng.random((2, n))
    found = []
    for name, (right, lost) in {"a": (0.8, 0.1), "b": (0.6, 0.5)}.items():
        draws = luck if shared else rng.random((2, n))
        before = draws[0] < right
        after = before & (draws[1] >= lost)
        pair = [task(scores.astype(float), chance=0.0) for scores in (before, after)]
        if not shared:
            named = [tuple(dataclasses.replace(item, id=name + item.id) for item in one.items) for one in pair]
            pair = [dataclasses.replace(one, items=items) for one, items in zip(pair, named, strict=True)]
        found.append((pair[0], pair[1]))
    return found


def test_the_gap_adds_limits_as_squares_and_uses_the_luck_that_two_protocols_share() -> None:
    """Against the formula written out: each limit's square, less twice the correlation of the per-item influences."""
    for shared in (True, False):
        one, other = two_protocols(np.random.default_rng(14), 80, shared=shared)
        kept = [ours.retention(*pair) for pair in (one, other)]
        a, al, ah, b, bl, bh = np.array([(k.value, k.ci_low, k.ci_high) for k in kept], dtype=float).ravel()
        rho = 0.0
        if shared:
            influence = []
            for before, after in (one, other):
                x, y = (np.array([item.score for item in side.items]) for side in (before, after))
                influence.append((y - y.mean() / x.mean() * x) / x.mean())
            rho = float(np.corrcoef(*influence)[0, 1])
            assert rho > 0.2
        found = ours.retention_gap(one, other)
        assert found is not None
        assert found[0] == pytest.approx(a - b)
        assert found[1] == pytest.approx(
            a - b - math.sqrt((a - al) ** 2 + (bh - b) ** 2 - 2 * rho * (a - al) * (bh - b))
        )
        assert found[2] == pytest.approx(
            a - b + math.sqrt((ah - a) ** 2 + (b - bl) ** 2 - 2 * rho * (ah - a) * (b - bl))
        )


# --- form and ability -----------------------------------------------------------------------------------------------


def answers(rng: np.random.Generator, n: int, shares: Sequence[float], shared: float) -> list[np.ndarray]:
    """Right and wrong of ``n`` items under several askings, which have the items' difficulty in common."""
    difficulty_N = rng.normal(size=n)
    noise_KN = rng.normal(size=(len(shares), n))
    ability_KN = math.sqrt(shared) * difficulty_N + math.sqrt(1 - shared) * noise_KN
    return [(own_N < stats.norm.ppf(share)).astype(float) for own_N, share in zip(ability_KN, shares, strict=True)]


def test_a_wording_gap_is_own_minus_reworded_over_the_items_that_both_have() -> None:
    own = task([1, 1, 0, 1, 1, 0, 1, 1])
    other = dataclasses.replace(task([0, 1, 0, 0, 1, 1]), task="t_reworded", version="2")
    found = ours.wording_gap(own, other)
    assert (found.n, found.won, found.lost, found.test) == (6, 2, 1, "mcnemar-exact")
    assert found.difference == pytest.approx(4 / 6 - 3 / 6)
    assert (found.ci_low, found.ci_high) == pytest.approx(ours.newcombe_paired(both=2, won=2, lost=1, neither=1))
    reverse = ours.wording_gap(other, own)
    assert (reverse.difference, reverse.ci_low, reverse.ci_high) == pytest.approx(
        (-found.difference, -found.ci_high, -found.ci_low)
    )


def test_a_wording_gap_of_nats_is_the_weighted_mean_of_the_items_differences() -> None:
    rng = np.random.default_rng(4)
    own_N, other_N, weights_N = rng.normal(1, 0.3, 60), rng.normal(1.4, 0.3, 60), rng.uniform(1, 3, 60)
    found = ours.wording_gap(nats(own_N, weights_N.tolist()), nats(other_N, weights_N.tolist()))
    assert found.difference == pytest.approx(math.fsum(weights_N * (own_N - other_N)) / math.fsum(weights_N))
    assert found.ci_low < found.difference < found.ci_high < 0
    assert found.won > found.lost, "fewer nats in the own form"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"protocol": "generation"},
            r"'t' and 't_reworded': protocol is 'continuation' in one evaluation and 'generation'",
        ),
        ({"metric": "acc_norm"}, "metric is 'acc'"),
        ({"chance": 0.1}, "chance is 0.25"),
        ({"num_fewshot": 3}, "num_fewshot is 0 in one evaluation and 3 in the other; a reworded task differs"),
        ({"items": task([1, 0, 1, 0, 1, 1, 1]).items[4:], "n": 3}, "fewer than half of 3 items have the same id"),
    ],
)
def test_what_is_not_the_same_task_reworded_is_refused(change: dict[str, object], message: str) -> None:
    other = dataclasses.replace(task([1, 0, 1, 0]), task="t_reworded", **change)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=message):
        ours.wording_gap(task([1, 1, 0, 1]), other)


@pytest.mark.parametrize("make", [task, nats])
def test_a_change_of_the_wording_gap_is_a_difference_of_differences(make: Callable[..., TaskScore]) -> None:
    rng = np.random.default_rng(5)
    own_before, other_before = answers(rng, 90, (0.6, 0.6), 0.0)
    # most answers stay, so the two gaps go together
    own_after, other_after = np.maximum(own_before, rng.random(90) < 0.3), other_before * (rng.random(90) < 0.9)
    if make is nats:
        own_after, other_after = own_after + rng.normal(0, 0.1, 90), other_after + rng.normal(0, 0.1, 90)
    before, after = (make(own_before), make(other_before)), (make(own_after), make(other_after))
    change, low, high = ours.wording_gap_change(before, after)
    scores = zip(own_after, other_after, own_before, other_before, strict=True)
    per_item = [(a - b) - (c - d) for a, b, c, d in scores]
    assert change == pytest.approx(math.fsum(per_item) / 90)
    # a normal interval of the items' mean, which both ways of making one come near in the middle of the scale
    error = stats.sem(per_item)
    assert (low, high) == pytest.approx((change - 1.96 * error, change + 1.96 * error), abs=0.3 * error)
    assert ours.wording_gap_change(after, before) == pytest.approx((-change, -high, -low))
    assert ours.wording_gap_change(before, before)[0] == 0.0
