"""What speculative decoding is worth, against sums over all that can happen."""

from __future__ import annotations

import itertools
import math

import pytest

from shoal.stats.drafting import accepted_along, best_length, speed_up, tokens_per_round


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.75, 0.999])
@pytest.mark.parametrize("num_drafted", [1, 2, 5, 8])
def test_tokens_of_a_round_are_the_sum_over_its_ends(acceptance: float, num_drafted: int) -> None:
    ends = [(1 + k) * acceptance**k * (1 - acceptance) for k in range(num_drafted)]
    expected = math.fsum(ends) + (1 + num_drafted) * acceptance**num_drafted
    assert tokens_per_round(acceptance, num_drafted) == pytest.approx(expected, rel=1e-12)
    assert tokens_per_round(1.0, num_drafted) == num_drafted + 1


def test_a_draft_pays_only_where_more_is_accepted_than_a_step_costs() -> None:
    assert speed_up(tokens_per_round(0.9, 1), 1, 0.79) == pytest.approx(1.9 / 1.79)
    assert speed_up(tokens_per_round(0.75, 2), 2, 0.5) == pytest.approx(2.3125 / 2)
    for acceptance in (0.2, 0.5, 0.8):
        tokens = [tokens_per_round(acceptance, g) for g in range(1, 9)]
        assert best_length(tokens, acceptance)[1] <= 1 + 1e-12
        assert best_length(tokens, acceptance - 0.01)[1] > 1
    assert best_length([1.9, None, 3.0], 0.1) == (3, 3.0 / 1.3)
    assert best_length([1.5, 2.0], 0.5) == (1, 1.0)  # of two alike the shorter


def enumerated(text: list[float], num_drafted: int) -> tuple[float, float]:
    """Expected accepted tokens and rounds, over all ways in which positions can be accepted or not."""
    accepted = rounds = 0.0
    for taken in itertools.product((True, False), repeat=len(text)):
        chance = math.prod(a if own else 1 - a for a, own in zip(text, taken, strict=True))
        start = 0
        while start + num_drafted < len(text):
            run = len(list(itertools.takewhile(bool, taken[start : start + num_drafted])))
            accepted, rounds = accepted + chance * run, rounds + chance
            start += run + 1
    return accepted, rounds


@pytest.mark.parametrize("num_drafted", [1, 2, 3, 5])
def test_rounds_along_a_text_count_every_way_they_can_go(num_drafted: int) -> None:
    texts = [[0.9, 0.2, 0.7, 0.7, 0.05, 1.0, 0.6, 0.4], [0.5, 0.0, 1.0, 0.9, 0.3, 0.8], [0.9, 0.9]]
    sums = [enumerated(text, num_drafted) for text in texts]
    expected = sum(accepted for accepted, _ in sums) / sum(rounds for _, rounds in sums)
    assert accepted_along(texts, num_drafted) == pytest.approx(expected, rel=1e-12)


def test_rounds_are_whole_where_all_or_nothing_is_accepted() -> None:
    assert [accepted_along([[1.0] * 20], g) for g in (1, 3, 8)] == [1, 3, 8]
    assert accepted_along([[0.0] * 20], 4) == 0
    assert accepted_along([[1.0] * 4], 4) is None
    assert accepted_along([[0.6] * 4000], 3) == pytest.approx(tokens_per_round(0.6, 3) - 1, rel=1e-9)
