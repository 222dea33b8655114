"""`shoal run`: every stage that is not done, in order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.recipe.section import as_dict

from ..verbs.distill import distill_is_done
from ..verbs.evaluate import evaluate
from ..verbs.measure import measure
from ..verbs.prune import prune
from ..verbs.report import report
from ..verbs.run import Run, locked, write_story
from .preflight import preflight


def run_all(run: Run, launch: Callable[[Run], None]) -> None:
    """Every stage that is not done; ``launch`` runs the distill stage under the DeepSpeed launcher.

    The run directory is let go while the launched ranks hold it.
    """
    with locked(run):
        preflight(run)
        write_story(run)
        measure(run)
        prune(run)
        track(run)
        is_done = distill_is_done(run)
    if not is_done:
        launch(run)
    with locked(run):
        evaluate(run)
        report(run)
        track(run)


def track(run: Run) -> None:
    """Log to W&B what the run directory holds now, as far as the recipe wants it; what fails there is only said."""
    from shoal.tracking.wandb_run import log_results

    def score_rows(folder: Path) -> list[dict[str, Any]]:
        from shoal.eval.report.score_rows import score_rows

        return score_rows(folder)

    log_results(run.recipe.track, run.dir, as_dict(run.recipe), score_rows)
