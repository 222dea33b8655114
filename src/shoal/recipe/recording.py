"""The recipe section of `shoal record`: which of the teacher's signals are written to disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from shoal.recipe.section import Positive, Section, Shapes, Text


@dataclass(frozen=True)
class Record(Section):
    """What `shoal record` keeps of the teacher for every token of the training rows."""

    top_k: Annotated[Positive, Shapes.SIGNALS | Shapes.TRAINING] = 32
    """Most probable next tokens kept per position, with their log-probabilities; the rest is kept as one sum."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False), Shapes.SIGNALS | Shapes.TRAINING] = 1.0
    """Temperature of the teacher's softmax. What is recorded serves loss terms of this temperature only: the mass
    outside the top k is not known at another."""
    states: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Shapes.SIGNALS | Shapes.TRAINING] = ()
    """Teacher layers whose outputs are kept too, in bfloat16: two bytes per hidden dimension, token and layer."""
    num_tokens: Annotated[Positive | None, Shapes.BY_CONTENT] = None
    """Tokens to record; None = distill.num_tokens. Either is rounded up to whole optimizer steps."""
    folder: Annotated[Text | None, Shapes.NOTHING] = None
    """Folder of the files; None = signals/ in run_dir."""
    rows_per_shard: Annotated[Positive, Shapes.NOTHING] = 64
    """Training rows in one file. A recording that was interrupted goes on at the next file."""
    batch_size: Annotated[Positive, Shapes.NOTHING] = 8
    """Rows that the teacher reads at one time on every rank."""
