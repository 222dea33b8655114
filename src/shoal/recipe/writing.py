"""Settings of the text that the teacher writes itself before training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from shoal.recipe.section import DataSource, Positive, Section, Shapes, Text


@dataclass(frozen=True)
class Writing(Section):
    """What stands behind the source `teacher_text`."""

    prompts: Annotated[DataSource | None, Shapes.BY_CONTENT] = None
    """What the teacher answers: texts it goes on from, or conversations (`messages`, or `prompt` and `completion`), of
    which it writes the last assistant's turn anew. None = openings of the prose sources beside it."""
    num_tokens: Annotated[Positive, Shapes.TEXT | Shapes.TRAINING] = 10_000
    """Tokens of prompts and written text together, about, before any text is rejected."""
    prompt_tokens: Annotated[Positive, Shapes.TEXT | Shapes.TRAINING] = 24
    """Tokens of an opening; without effect where there are prompts."""
    max_prompt_tokens: Annotated[Positive, Shapes.TEXT | Shapes.TRAINING] = 1024
    """Most tokens of a prompt; longer ones are left out."""
    new_tokens: Annotated[Positive, Shapes.TEXT | Shapes.TRAINING] = 232
    """Most tokens that the teacher writes after a prompt."""
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False), Shapes.TEXT | Shapes.TRAINING] = 1.0
    """Temperature of sampling: 1 = the teacher's own distribution; 0 = always the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1), Shapes.TEXT | Shapes.TRAINING] = 1.0
    """Share of the probability whose likeliest tokens are drawn from; 1 = all tokens."""
    keep: Annotated[Literal["all", "correct"], Shapes.TEXT | Shapes.TRAINING] = "all"
    """correct = only answers whose final answer is that of the prompt's own `completion` or last assistant's turn."""
    batch_size: Annotated[Positive, Shapes.TEXT] = 16
    """Texts per rank and forward, written and kept together: what a kill costs at most."""
    folder: Annotated[Text | None, Shapes.NOTHING] = None
    """Folder in which written text is kept, to be shared between runs: the same model, prompts and settings find it
    there. None = RUN_DIR/text."""
    backend: Annotated[Literal["transformers", "vllm"], Shapes.TEXT | Shapes.TRAINING] = "transformers"
    """Library that runs the teacher; vllm has to be installed, and writes on one rank."""
