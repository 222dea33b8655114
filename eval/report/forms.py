"""What the form of the questions adds to a score: the same items in the trained form and in its twin, role by role."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shoal.artifacts.evaluation import Interval, TaskScore
from shoal.stats.paired import SIGNIFICANT, PairedDifference, form_gap, form_gap_change


@dataclass(frozen=True)
class Form:
    """The form gap of every role on one twin: its score in the trained form minus that of the twin."""

    gaps: dict[str, PairedDifference]
    growth: dict[str, Interval]
    """Role -> its gap minus the teacher's."""
    higher_is_better: bool
    adjusted_p: dict[str, float] = field(default_factory=dict)
    """p-values of the gaps after Holm's correction over all twins."""

    def is_learnt(self, role: str) -> bool:
        """Whether the gap of ``role`` is significant, in favour of the trained form, and larger than the teacher's."""
        if role not in self.growth or self.adjusted_p[role] >= SIGNIFICANT:
            return False
        sign = 1 if self.higher_is_better else -1
        growth = self.growth[role]
        return sign * self.gaps[role].difference > 0 and min(sign * growth.ci_low, sign * growth.ci_high) > 0


def form_of(own: Mapping[str, TaskScore], twin: Mapping[str, TaskScore]) -> Form:
    """The form gaps between a task (role -> score) and its twin, without corrected p-values.

    Raises:
        UserError: the two are not asked alike, or their items are others.
    """
    pairs = {role: (own[role], score) for role, score in twin.items() if role in own}
    before = pairs.get("teacher")
    return Form(
        gaps={role: form_gap(*pair) for role, pair in pairs.items()},
        growth={
            role: Interval(*form_gap_change(before, pair))
            for role, pair in pairs.items()
            if before is not None and role != "teacher"
        },
        higher_is_better=next(iter(twin.values())).higher_is_better,
    )
