"""Settings of on-policy training: the student learns from what it writes itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from shoal.recipe.section import Positive, Section, Shapes


@dataclass(frozen=True)
class OnPolicy(Section):
    """In a share of the steps the student's own samples stand in for the data (GKD, arXiv 2306.13649)."""

    share: Annotated[float, Field(ge=0, le=1), Shapes.TRAINING] = 0.5
    """Probability that a step trains on samples, GKD's lambda; 0 = never, 1 = in every step."""
    start: Annotated[float, Field(ge=0, lt=1), Shapes.TRAINING] = 0.0
    """Share of all steps that come before the first on-policy one: a student that cannot write yet wastes its time."""
    prompt_tokens: Annotated[Positive, Shapes.TRAINING] = 24
    """Tokens of running text that the student goes on from; of a conversation it gets all up to an assistant's turn."""
    new_tokens: Annotated[Positive, Shapes.TRAINING] = 128
    """Most tokens that the student writes after a prompt."""
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False), Shapes.TRAINING] = 1.0
    """Temperature of sampling, not of the loss; 0 = always the likeliest token."""
