"""Settings of the text that the teacher writes itself before training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from shoal.recipe.section import DataSource, Positive, Section, Text


@dataclass(frozen=True)
class Writing(Section):
    """What stands behind the source `teacher_text`."""

    prompts: DataSource | None = None
    """What the teacher answers: texts it goes on from, or conversations (`messages`, or `prompt` and `completion`), of
    which it writes the last assistant's turn anew. None = openings of the prose sources beside it."""
    num_tokens: Positive = 10_000
    """About how many tokens of prompts and written text together, before any text is rejected."""
    prompt_tokens: Positive = 24
    """Length of an opening; of no meaning where there are prompts."""
    max_prompt_tokens: Positive = 1024
    """Longer prompts are left out."""
    new_tokens: Positive = 232
    """Most tokens it writes after a prompt."""
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """1 = the teacher's own distribution; 0 = always the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw only among the likeliest tokens that hold this share of the probability; 1 = among all."""
    keep: Literal["all", "correct"] = "all"
    """correct = only answers whose final answer is that of the prompt's own `completion` or last assistant's turn."""
    batch_size: Positive = 16
    """Texts per rank and forward, written and kept together: what a kill costs at most."""
    folder: Text | None = None
    """Where written text is kept, to be shared between runs: the same model, prompts and settings find it there. None =
    RUN_DIR/text."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """vllm has to be installed, and writes on one rank."""
