"""Which written texts end in a loop, and where it begins."""

from __future__ import annotations

import random

import pytest

from shoal.data.repetition import Loop, ends_in_loop, loop_at_end


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("The answer is " + "Rome and " * 4, True),
        ("The answer is " + "Rome and " * 3 + "Ro", True),
        ("x" * 23, False),
        ("x" * 24, True),
        ("0 1 " * 6, True),
        ("so so so", False),
        ("Rome and Rome and then the whole sentence goes on without a loop at all", False),
        ("a long sentence of many words. " * 2, False),
        ("a long sentence of many words.\n" * 3, True),
        ("", False),
    ],
)
def test_a_text_loops_where_its_end_is_copies_of_one_piece(text: str, loops: bool) -> None:
    assert ends_in_loop(text) is loops


@pytest.mark.parametrize("period", [1, 2, 3, 17, 64])
@pytest.mark.parametrize("before", [0, 1, 70])
@pytest.mark.parametrize("more", [0, 1, 40])
def test_a_loop_is_found_at_the_token_where_it_begins(period: int, before: int, more: int) -> None:
    copies = (random.Random(period).sample(range(1000), period) * 44)[: 3 * period + more]  # no token twice in one
    assert loop_at_end([*range(2000, 2000 + before), *copies], longest_period=64) == Loop(before, period)
    # one token less than three copies, a longer period, or a token behind
    assert loop_at_end([*range(2000, 2000 + before), *copies[: 3 * period - 1]], longest_period=64) is None
    assert loop_at_end(copies, longest_period=period - 1) is None
    assert loop_at_end([*copies, 5000], longest_period=64) is None


def test_of_two_periods_the_one_counts_whose_loop_begins_first_then_the_shorter() -> None:
    assert loop_at_end([9, *[7, 7, 7, 8] * 3, 7, 7, 7], longest_period=64) == Loop(1, 4)
    assert loop_at_end([9, *[7, 7, 7, 8] * 3, 7, 7, 7], longest_period=3) == Loop(13, 1)
    assert loop_at_end([9, 7, 7, 7, 7, 7, 7], longest_period=64) == Loop(1, 1)
    assert loop_at_end([], longest_period=64) is None


def test_the_loop_is_that_of_a_search_through_all_starts_and_periods() -> None:
    def searched(tokens: list[int], longest: int) -> Loop | None:
        for start in range(len(tokens)):
            for period in range(1, longest + 1):
                end = tokens[start:]
                if len(end) >= 3 * period and all(end[at] == end[at % period] for at in range(len(end))):
                    return Loop(start, period)
        return None

    chance, found = random.Random(0), 0
    for _ in range(2000):
        tokens = chance.choices("ab", k=chance.randint(0, 20))
        ids = [ord(token) for token in tokens]
        assert loop_at_end(ids, longest_period=4) == searched(ids, 4)
        found += searched(ids, 4) is not None
    assert 400 < found < 1600
