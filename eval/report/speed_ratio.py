"""How much faster a model is than the teacher that took turns with it, and how far that went apart between rounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shoal.artifacts.artifact import BatchSpeed, SpeedScore

Kind = Literal["prefill", "decode"]


@dataclass(frozen=True)
class SpeedRatio:
    """Speed over the teacher's; above 1 = faster."""

    value: float
    """Ratio of the two medians."""
    limits: tuple[float, float] | None
    """Smallest and largest ratio of one round, in which both took a turn; None where no rounds were kept."""

    def in_words(self) -> str:
        """`1.24 × [1.20, 1.31]`."""
        return f"{self.value:.2f} ×" + (f" [{self.limits[0]:.2f}, {self.limits[1]:.2f}]" if self.limits else "")


def speed_ratio(own: BatchSpeed | SpeedScore, teacher: BatchSpeed | SpeedScore, kind: Kind) -> SpeedRatio:
    """Round by round: what disturbs the machine for a while slows both, and little of it is left in their ratio."""
    field = f"{kind}_tokens_per_s"
    rounds = own.samples.get(kind, ()), teacher.samples.get(kind, ())
    ratios = [after / before for after, before in zip(*rounds, strict=True)] if len({*map(len, rounds)}) == 1 else []
    limits = (min(ratios), max(ratios)) if ratios else None
    return SpeedRatio(getattr(own, field) / getattr(teacher, field), limits)
