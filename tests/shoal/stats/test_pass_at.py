"""pass@k against its definition over all subsets, and what became of lost answers."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from shoal.artifacts.evaluation import ItemScore, TaskScore
from shoal.recipe.evaluate import Samples
from shoal.stats.intervals import wilson
from shoal.stats.paired import bootstrap_mean
from shoal.stats.pass_at import LostAnswers, lost_answers, pass_at, pass_at_chance, with_samples


def greedy(right: list[int], *, chance: float = 0.0) -> TaskScore:
    """Items `0`, `1`, ... whose greedy text is right or wrong."""
    items = tuple(ItemScore(str(i), float(value), "a", "a") for i, value in enumerate(right))
    share = sum(right) / len(right)
    return TaskScore(
        "t", "knowledge", "generation", "match", share, 0.0, 1.0, len(items), chance, True, "1", 0, items=items
    )


@pytest.mark.parametrize("n", range(1, 8))
def test_the_estimate_is_the_share_of_all_subsets_that_hold_a_right_text(n: int) -> None:
    for right, k in itertools.product(range(n + 1), range(1, n + 1)):
        texts = [index < right for index in range(n)]
        subsets = list(itertools.combinations(texts, k))
        assert pass_at(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


@pytest.mark.parametrize("k", [1, 4, 8])
def test_the_estimate_is_unbiased(k: int) -> None:
    """Its mean over draws of 8 texts that are right with a known chance is 1 - (1 - chance)**k."""
    chance, counts = 0.15, range(9)
    binomial = [len(list(itertools.combinations(range(8), c))) * chance**c * (1 - chance) ** (8 - c) for c in counts]
    mean = np.dot(binomial, [pass_at(8, c, k) for c in counts])
    assert mean == pytest.approx(1 - (1 - chance) ** k, abs=1e-14)
    assert mean == pytest.approx(pass_at_chance(chance, k), abs=1e-14)


def test_a_score_gets_pass_at_k_with_intervals_over_its_items() -> None:
    num_right = [0, 1, 4, 0, 2, 3]
    found = with_samples(greedy([0, 0, 1, 0, 1, 1], chance=0.25), Samples(n=4, k=(4, 1, 2)), num_right)
    assert [item.num_right for item in found.items] == num_right
    assert [passed.k for passed in found.pass_at] == [1, 2, 4]
    first, _, last = found.pass_at
    assert first.score == pytest.approx(sum(num_right) / 24)
    low, high = bootstrap_mean([right / 4 for right in num_right])
    assert low < 0, "no share is less than none, whatever six items say of the spread"
    assert (first.ci_low, first.ci_high) == (0, pytest.approx(high))
    assert last.score == pytest.approx(4 / 6)  # k = n: an item is right or wrong
    assert (last.ci_low, last.ci_high) == pytest.approx(wilson(4, 6))
    assert [passed.chance for passed in found.pass_at] == pytest.approx([1 / 4, 1 - 0.75**2, 1 - 0.75**4])
    assert not list(found.contradictions())


def test_items_of_which_no_text_is_right_leave_room_for_doubt() -> None:
    for passed in with_samples(greedy([0] * 20), Samples(), [0] * 20).pass_at:
        assert (passed.score, passed.ci_low, passed.ci_high) == (0, *wilson(0, 20))


@pytest.mark.parametrize("num_right", [None, -1, 9])
def test_a_number_of_right_texts_that_cannot_be_is_a_contradiction(num_right: int | None) -> None:
    score = with_samples(greedy([1, 0]), Samples(), [3, 0])
    items = (score.items[0], dataclasses.replace(score.items[1], num_right=num_right))
    told = list(dataclasses.replace(score, items=items).contradictions())
    assert told == [f"items.1.num_right: is {num_right}, and 8 texts were drawn"]
    undrawn = dataclasses.replace(greedy([1, 0]), items=score.items[:1] * 2, score=1.0)
    assert next(undrawn.contradictions()) == "items.0.num_right: is 3, and no texts were drawn"


def test_a_lost_answer_is_demoted_where_a_drawn_text_has_it_and_else_gone() -> None:
    teacher = greedy([1, 1, 1, 1, 0, 0])
    #                               kept, demoted, gone, demoted, never there: two of them
    pruned = with_samples(greedy([1, 0, 0, 0, 0, 1]), Samples(), [0, 1, 0, 8, 5, 2])
    lost = lost_answers(teacher, pruned)
    assert (lost, lost.count) == (LostAnswers(demoted=2, gone=1), 3)
    share = lost.share(lost.demoted)
    assert (share.value, share.ci_low, share.ci_high) == (2 / 3, *wilson(2, 3))
