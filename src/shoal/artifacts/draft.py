"""How students do as drafts for their teacher in speculative decoding (Leviathan et al. 2023, arXiv:2211.17192)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from shoal.artifacts.artifact import Artifact
from shoal.artifacts.evaluation import Interval

MOST_DRAFTED = 8
"""Largest number of tokens drafted in a round that is counted."""
TextKind = Literal["held_out", "written"]


@dataclass(frozen=True)
class Acceptance:
    """What the teacher accepts of a draft's tokens, under one way of decoding."""

    share: Interval
    """Mean over positions of the chance that the draft's token is accepted."""
    accepted: tuple[float | None, ...]
    """Mean number of accepted tokens in a round that drafts 1, 2, ... MOST_DRAFTED, where rounds follow one another
    along the texts; None = no text is long enough."""


@dataclass(frozen=True)
class DraftText:
    """One draft on one kind of text."""

    text: TextKind
    """held_out = eval.perplexity_data; written = what the teacher has written itself, greedily, for eval.tasks."""
    num_texts: int
    num_positions: int
    sampled: Acceptance
    """Tokens are drawn at temperature 1: at a position sum_x min(p(x), q(x)) = 1 - total variation of p and q."""
    greedy: Acceptance
    """Tokens are first choices: at a position 1 where both models have the same one, else 0."""


@dataclass(frozen=True)
class Drafts(Artifact):
    """eval/draft.json: what the teacher accepts of the tokens of every cut model."""

    FILE: ClassVar[str] = "eval/draft.json"

    roles: dict[str, tuple[DraftText, ...]]
    """Role -> its acceptance on held-out text and, where the teacher has written any, on that."""

    def contradictions(self) -> Iterator[str]:
        for role, texts in self.roles.items():
            for index, own in enumerate(texts):
                for way in ("sampled", "greedy"):
                    acceptance: Acceptance = getattr(own, way)
                    place = f"roles.{role}.{index}.{way}"
                    if not 0 <= acceptance.share.value <= 1:
                        yield f"{place}.share.value: is {acceptance.share.value}"
                    if len(acceptance.accepted) != MOST_DRAFTED:
                        yield f"{place}.accepted: has {len(acceptance.accepted)} values, not {MOST_DRAFTED}"
