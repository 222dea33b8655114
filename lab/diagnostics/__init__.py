"""Who writes, erases and decides along the depth of a model: diagnostics.json.

diagnose        all of it
residual_flow   directions and sizes of what is written
effects         skipped layers, erased states
path_gradients  integrated gradients
runs            runs from any layer on, and what the head makes of every state
figure          the curves
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from shoal.launch.verbs.measure import packed_rows
from shoal.launch.verbs.run import Run
from shoal.recipe.section import Section

from ..results import identity, made, model_of, text_identity, told
from .diagnose import Diagnostics, Effort, diagnose
from .figure import diagnostics_figure


@dataclass(frozen=True)
class Settings(Section):
    """What is diagnosed over the text of `measure`."""

    gradient_prompts: Annotated[int, Field(ge=0)] = 0
    """Prompts over which integrated gradients are taken, by far the most expensive part; 0 = none."""


def diagnostics(run: Run, settings: Settings) -> Diagnostics:
    """diagnostics.json of the run's model, made where it is not there yet."""
    return made(
        run,
        Diagnostics,
        identity(run, settings, **text_identity(run)),
        lambda provenance: diagnose(
            model_of(run),
            packed_rows(run),
            provenance=provenance,
            batch_size=run.recipe.measure.batch_size,
            effort=Effort(gradient_prompts=settings.gradient_prompts),
            seed=run.recipe.seed,
        ),
        diagnostics_figure,
    )


def work(run: Run, settings: Settings) -> str:
    """The effective depth, in words."""
    return told(run, diagnostics(run, settings))
