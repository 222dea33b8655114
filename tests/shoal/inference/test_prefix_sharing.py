"""What prompts have in common is read once, and gives the values that reading every prompt whole gives."""

from __future__ import annotations

import random

import pytest
import torch
from tiny import KINDS, SLIDING_WINDOW, tiny_model, tokens_fed

from shoal.inference.decoder import Decoder
from shoal.inference.prefix_sharing import Reader, Tokens, batches_by_beginning, common_beginnings, even_batches
from shoal.inference.scoring import score

RANDOM = random.Random(0)


def tokens(count: int) -> Tokens:
    return tuple(RANDOM.randrange(250) for _ in range(count))


FIRST, SECOND = tokens(40), tokens(25)


def test_what_saves_most_is_shared() -> None:
    prompts = [FIRST + tokens(5), SECOND + tokens(9), FIRST + tokens(8), tokens(12), SECOND + tokens(3)]
    assert common_beginnings(prompts) == [40, 25, 40, 0, 25]


def test_every_prompt_keeps_a_token_of_its_own() -> None:
    assert common_beginnings([FIRST, FIRST + tokens(3)]) == [39, 39]
    assert common_beginnings([(1,), (1, 2)]) == [0, 0]
    assert common_beginnings([FIRST]) == [0]
    assert common_beginnings([]) == []


@pytest.mark.slow
def test_prompts_that_each_go_on_from_the_one_before_are_grouped_without_recursion() -> None:
    text = tokens(3000)
    assert max(common_beginnings([text[:count] for count in range(1, 3000)])) > 1000


def test_batches_need_few_beginnings_at_a_time_and_hold_rows_of_equal_length() -> None:
    prompts = [beginning + tokens(own) for beginning in (tokens(30) for _ in range(7)) for own in (3, 9, 4, 8)]
    prompts += [tokens(own) for own in (50, 5, 6)]
    shared = dict(zip(prompts, common_beginnings(prompts), strict=True))
    found = list(batches_by_beginning(prompts, 4, lambda one: (one[: shared[one]], len(one)), enough_tokens=10**6))
    assert sorted(one for batch in found for one in batch) == sorted(prompts)
    assert max(len({one[: shared[one]] for one in batch if shared[one]}) for batch in found) == 4
    own = [[len(one) - shared[one] for one in batch] for batch in found]
    assert own == [[9] * 4, [8] * 4, [4] * 4, [3] * 4, [9] * 3 + [8], [8] * 2 + [4] * 2, [4] + [3] * 3, [50, 6, 5]]


@pytest.mark.parametrize(
    ("enough_tokens", "expected"),
    [
        (10**6, [[90, 88, 80, 70], [30, 29, 2]]),
        (100, [[90, 88, 80], [70, 30], [29, 2]]),
        (0, [[90, 88, 80], [70], [30, 29], [2]]),
    ],
)
def test_a_batch_with_enough_tokens_ends_where_padding_begins(enough_tokens: int, expected: list[list[int]]) -> None:
    lengths = [90, 88, 80, 70, 30, 29, 2]
    found = even_batches(lengths, 4, length=lambda one: one, enough_tokens=enough_tokens)
    assert list(map(list, found)) == expected
    assert list(even_batches([], 4, length=len, enough_tokens=0)) == []


def requests() -> list[tuple[Tokens, Tokens]]:
    """Questions with one and several options, of one token and more, after two beginnings and after none."""
    contexts = [beginning + tokens(own) for beginning in (FIRST, SECOND, ()) for own in (2, 14, 5)]
    several = [(context, tokens(count)) for context in contexts for count in (1, 3, 4)]
    return [*several, *((FIRST + tokens(own), tokens(1)) for own in (3, 6, 30))]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_sharing_changes_no_value(kind: str, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(SECOND) > 2 * SLIDING_WINDOW
    decoder, asked = Decoder(tiny_model(kind)), requests()
    whole = score(decoder, asked, batch_size=batch_size, branch=False)
    fed = tokens_fed(monkeypatch)
    shared = score(decoder, asked, batch_size=batch_size)
    assert [greedy for _, greedy in shared] == [greedy for _, greedy in whole]
    torch.testing.assert_close([value for value, _ in shared], [value for value, _ in whole], atol=1e-4, rtol=0)
    assert sum(fed) < 0.4 * sum(len(context) + len(tail) for context, tail in asked)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_go_on_from_their_beginnings(kind: str) -> None:
    decoder = Decoder(tiny_model(kind))
    rows = [FIRST + tokens(3), FIRST + tokens(11), SECOND + tokens(7), tokens(5)]
    shared = [40, 40, 25, 0]
    reader = Reader(decoder, [row[:count] for row, count in zip(rows, shared, strict=True)])
    start = reader.start(rows, shared)
    assert start.ids_BS.shape == (4, 11)
    assert not reader._slots
    mask, cache = decoder.mask_behind(start.pads, start.width), start.cache or decoder.new_cache()
    found = decoder.hidden(start.ids_BS, mask=mask, position_ids_BS=start.positions_BS, cache=cache)
    for row, hidden_SD in zip(rows, found, strict=True):
        expected = decoder.hidden(torch.tensor([row]))[0, -3:]
        torch.testing.assert_close(hidden_SD[-3:], expected, atol=1e-5, rtol=1e-4)
