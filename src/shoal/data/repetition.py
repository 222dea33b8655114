"""Whether a written text ends in a loop: how a damaged or sampled model's writing most often breaks."""

from __future__ import annotations

LOOP_COPIES = 3
LOOP_CHARACTERS = 24
"""A text loops where its end is at least so many copies of one piece, and these together are at least so long."""


def ends_in_loop(text: str) -> bool:
    """Whether the last characters are LOOP_COPIES or more copies of one piece, LOOP_CHARACTERS long or more together.

    The last copy may be cut off, as the limit of new tokens does it; white space counts as one space.
    """
    text = " ".join(text.split())
    # the space after the last copy is lost at the end of the text
    return any(_has_periodic_end(whole) for whole in (text, f"{text} "))


def _has_periodic_end(text: str) -> bool:
    for period in range(1, len(text) // LOOP_COPIES + 1):
        length = max(LOOP_COPIES * period, LOOP_CHARACTERS)
        if length <= len(text) and text[-length:-period] == text[len(text) - length + period :]:
            return True
    return False
