"""`shoal run`: every stage that is not done, in order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shoal.recipe.section import as_dict
from shoal.stages.distill import distill_is_done
from shoal.stages.evaluate import evaluate
from shoal.stages.measure import measure
from shoal.stages.preflight import preflight
from shoal.stages.prune import prune
from shoal.stages.report import report
from shoal.stages.run import Run, locked, write_story


def run_all(run: Run, launch_distill: Callable[[], None]) -> None:
    """Every stage that is not done; ``launch_distill`` runs the distill stage under the DeepSpeed launcher.

    The run directory is let go while the launched ranks hold it.
    """
    with locked(run):
        preflight(run)
        write_story(run)
        measure(run)
        prune(run)
        track(run)
        distilled = distill_is_done(run)
    if not distilled:
        launch_distill()
    with locked(run):
        evaluate(run)
        report(run)
        track(run)


def track(run: Run) -> None:
    """Log to W&B what the run directory holds now, as far as the recipe wants it; what fails there is only said."""
    from shoal.tracking.wandb_results import Rows, log_results

    def score_rows(folder: Path) -> Rows:
        from shoal.eval.report.score_rows import score_rows

        return score_rows(folder)

    log_results(run.recipe.track, run.dir, as_dict(run.recipe), teacher=run.teacher, score_rows=score_rows)
