"""Whether a written text ends in a loop: how a damaged or sampled model's writing most often breaks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

LOOP_COPIES = 3
LOOP_CHARACTERS = 24
"""A text loops where its end is at least so many copies of one piece, and these together are at least so long."""


def ends_in_loop(text: str) -> bool:
    """Whether the last characters are LOOP_COPIES or more copies of one piece, LOOP_CHARACTERS long or more together.

    The last copy may be cut off, as the limit of new tokens does it; white space counts as one space.
    """
    text = " ".join(text.split())
    # the space after the last copy is lost at the end of the text
    return any(
        periodic_end(whole, period) >= max(LOOP_COPIES * period, LOOP_CHARACTERS)
        for whole in (text, f"{text} ")
        for period in range(1, len(whole) // LOOP_COPIES + 1)
    )


class Loop(NamedTuple):
    """Where a text begins to repeat one piece until its end."""

    start: int
    """Place of the first token of the first copy."""
    period: int
    """Tokens of the piece."""


def loop_at_end(tokens: Sequence[int], *, longest_period: int) -> Loop | None:
    """The loop that the tokens end in: LOOP_COPIES or more copies of one piece, the last of which may be cut off behind
    the third.

    Of several periods that one whose loop begins first, then the shortest. None = they end in none.
    """
    periods = range(1, min(longest_period, len(tokens) // LOOP_COPIES) + 1)
    lengths = ((periodic_end(tokens, period), period) for period in periods)
    loops = [Loop(len(tokens) - length, period) for length, period in lengths if length >= LOOP_COPIES * period]
    return min(loops, default=None)


def periodic_end(items: Sequence[Any], period: int) -> int:
    """Length of the longest end of ``items`` in which every item is that of ``period`` places before, or among the
    first ``period``."""
    before = len(items) - period - 1
    while before >= 0 and items[before] == items[before + period]:
        before -= 1
    return len(items) - before - 1
