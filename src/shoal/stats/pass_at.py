"""pass@k: how often at least one of k drawn texts is right, and what became of answers that are no longer first.

N items, n texts drawn for each, of which c are right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from shoal.artifacts.evaluation import Interval, PassAt, TaskScore
from shoal.recipe.evaluate import Samples
from shoal.stats.intervals import wilson
from shoal.stats.paired import bootstrap_mean, is_binary


def pass_at(num_drawn: int, num_right: int, k: int) -> float:
    """The chance that at least one of ``k`` texts is right, taken from n that were drawn: 1 - C(n - c, k) / C(n, k).

    The unbiased estimate from n >= k texts (Chen et al. 2021, arXiv 2107.03374, equation 1). 1 - (1 - c / n)**k is too
    low, because it takes a text more than once.
    """
    return 1 - math.comb(num_drawn - num_right, k) / math.comb(num_drawn, k)


def pass_at_chance(chance: float, k: int) -> float:
    """What a guesser reaches whose single text is right with ``chance``: 1 - (1 - chance)**k."""
    return 1 - (1 - chance) ** k


def with_samples(score: TaskScore, samples: Samples, num_right: Sequence[int]) -> TaskScore:
    """The score with the number of right texts by item, and pass@k with its 95 % interval over the items.

    Wilson's interval where every item is 0 or 1, as it is of k = n; else bootstrap.
    """
    items = tuple(replace(item, num_right=right) for item, right in zip(score.items, num_right, strict=True))
    passed = []
    for k in sorted(set(samples.k)):
        values = [pass_at(samples.n, right, k) for right in num_right]
        whole = all(value in (0.0, 1.0) for value in values)
        low, high = wilson(sum(values), len(values)) if whole else bootstrap_mean(values)
        mean, chance = math.fsum(values) / len(values), pass_at_chance(score.chance, k)
        passed.append(PassAt(k, mean, max(low, 0.0), min(high, 1.0), chance))
    return replace(score, items=items, samples=samples, pass_at=tuple(passed))


@dataclass(frozen=True)
class LostAnswers:
    """Items that one model's greedy text has right and another's has wrong."""

    demoted: int
    """Items of which at least one text that the other model drew is right."""
    gone: int
    """Items of which none is."""

    @property
    def count(self) -> int:
        return self.demoted + self.gone

    def share(self, count: int) -> Interval:
        """``count`` of them as a share, with Wilson's 95 % interval; there is at least one item."""
        return Interval(count / self.count, *wilson(count, self.count))


def lost_answers(before: TaskScore, after: TaskScore) -> LostAnswers:
    """What became of the right answers of ``before`` that the greedy text of ``after`` has wrong; all are 0 or 1."""
    assert after.samples is not None
    assert is_binary(before)
    right = {item.id for item in before.items if item.score == 1}
    drawn = [item.num_right for item in after.items if item.id in right and item.score == 0]
    demoted = sum(bool(num_right) for num_right in drawn)
    return LostAnswers(demoted, len(drawn) - demoted)
