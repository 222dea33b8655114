"""How training sources share the tokens where damage decides it, and what a pilot has shown of each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from shoal.artifacts.artifact import Artifact


@dataclass(frozen=True)
class SourceShare:
    """One source: what the cut took of it, and its share of the tokens."""

    source: str
    weight: float
    """Share by the recipe's weights alone."""
    teacher_nats: float
    """Nats per token on a sample of the source's packed rows."""
    student_nats: float
    """The same of the pruned student, before any training."""
    num_tokens: int
    """Learnt tokens of the sample."""
    share: float

    @property
    def damage(self) -> float:
        """Nats per token that the cut took; 0 where the student is no worse."""
        return max(0.0, self.student_nats - self.teacher_nats)


@dataclass(frozen=True)
class Shares(Artifact):
    """shares.json: the share of every source, by the damage that was measured on the pruned student."""

    FILE: ClassVar[str] = "shares.json"

    sources: tuple[SourceShare, ...]

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of every source."""
        return tuple(source.share for source in self.sources)

    def contradictions(self) -> Iterator[str]:
        yield from refused(self.shares, "sources")


@dataclass(frozen=True)
class PilotPoint:
    """The student during the pilot."""

    step: int
    nats: tuple[float, ...]
    """Nats per token on the sample of every source."""


@dataclass(frozen=True)
class Pilot(Artifact):
    """pilot.json: what the first steps of a training regained of every source, and the shares of all steps after."""

    FILE: ClassVar[str] = "pilot.json"

    sources: tuple[str, ...]
    num_steps: int
    """Optimizer steps of the pilot."""
    points: tuple[PilotPoint, ...]
    """Before the first step, after half of the steps, after all: those that there are so far."""
    tokens: tuple[int, ...] = ()
    """Tokens of every source in the pilot's rows."""
    slopes: tuple[float, ...] = ()
    """Nats per token that the next million tokens of every source would regain at the rate of the pilot's end."""
    shares: tuple[float, ...] = ()
    """Share of every source after the pilot; none = the pilot is not over."""

    def contradictions(self) -> Iterator[str]:
        if self.shares:
            yield from refused(self.shares, "shares")


def refused(shares: tuple[float, ...], place: str) -> Iterator[str]:
    """`place: what is wrong` with shares of one whole."""
    if not math.isclose(math.fsum(shares), 1.0, abs_tol=1e-9) or min(shares) <= 0:
        yield f"{place}: has shares {list(shares)}, which must be above 0 and sum to 1"
