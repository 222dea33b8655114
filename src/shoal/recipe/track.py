"""What becomes of results: W&B, the Hub; the recipe's sections `track` and `export`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from shoal.recipe.section import Section


@dataclass(frozen=True)
class Track(Section):
    """Where curves, scores, figures and reports go: Weights & Biases. The run has the name of its directory, or
    WANDB_NAME."""

    wandb: Literal["online", "offline", "off"] | None = None
    """None = online where somebody is logged in to W&B (a key in the environment or of `wandb login`),
    offline after WANDB_MODE=offline, else off."""
    project: str = "shoal"
    """W&B project."""
    tags: tuple[str, ...] = ()
    """Tags of the W&B run."""


@dataclass(frozen=True)
class Export(Section):
    """Where the result is published."""

    hub_repo: str | None = None
    """`owner/name` on the Hub to push the distilled checkpoint and its model card to."""
    private: bool = True
    """Make a new repository private; one that is there already and public is refused."""
    gguf: bool = False
    """Write the result as one GGUF file too, for llama.cpp, in the precision it is stored in."""


def contradictions(export: Export) -> Iterator[str]:
    """`place: what is wrong`, for everything that single fields cannot express."""
    if export.hub_repo is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", export.hub_repo):
        yield f"export.hub_repo: must have the form owner/name (got {export.hub_repo!r})"
