"""What speculative decoding is worth: tokens of a round, and the speed-up that they make (arXiv:2211.17192).

In a round the draft writes g tokens, one after the other, and the teacher reads them in one step: it takes over the
first ones that it accepts, and one token of its own.

T positions of a text.
"""

from __future__ import annotations

from collections.abc import Sequence


def tokens_per_round(acceptance: float, num_drafted: int) -> float:
    """Expected tokens of a round where every drafted token is accepted with the same chance, whatever came before.

    (1 - a^(g+1)) / (1 - a), equation 1 of arXiv:2211.17192.
    """
    if acceptance == 1:
        return float(num_drafted + 1)
    return (1 - acceptance ** (num_drafted + 1)) / (1 - acceptance)


def speed_up(tokens: float, num_drafted: int, cost: float) -> float:
    """How many times faster text is written by rounds of so many ``tokens``; ``cost`` = a draft's step / a teacher's.

    The teacher's step over g + 1 tokens is taken to cost what one over a single token does (theorem 3.8).
    """
    return tokens / (num_drafted * cost + 1)


def best_length(tokens: Sequence[float | None], cost: float) -> tuple[int, float]:
    """The number of drafted tokens with the largest speed-up, and that speed-up; ``tokens`` of a round by g = 1, 2, ...

    Raises:
        ValueError: there is none.
    """
    speeds = [(speed_up(own, g, cost), -g) for g, own in enumerate(tokens, 1) if own is not None]
    best, shortest = max(speeds)
    return -shortest, best


def accepted_along(texts: Sequence[Sequence[float]], num_drafted: int) -> float | None:
    """Mean number of accepted tokens in a round of ``num_drafted``, where rounds follow one another along ``texts``.

    ``texts`` hold for every position the chance that a token drafted there is accepted. Easy positions stand together,
    and a round begins behind a hard one, so this is not what the mean chance alone tells. Exact: all ways in which
    rounds can follow one another count by their chances. Rounds that the end of a text could cut short are left out;
    None where that is all of them.
    """
    accepted = rounds = 0.0
    for chances_T in texts:
        begins_T = [1.0, *[0.0] * (len(chances_T) + num_drafted)]  # expected rounds that begin at each position
        for start in range(len(chances_T) - num_drafted):
            reached = begins_T[start]
            rounds += reached
            for step in range(num_drafted):
                going_on = reached * chances_T[start + step]
                begins_T[start + step + 1] += reached - going_on  # refused: the teacher's own token stands there
                reached = going_on
                accepted += reached
            begins_T[start + num_drafted + 1] += reached
    return accepted / rounds if rounds else None
