"""`shoal run`: every stage that is not done, in order, after refusing what would be refused only hours later.

Code of a stage is imported where it is used, so that a verb loads only what it runs.
"""

from __future__ import annotations

from collections.abc import Callable

from shoal.data.sources import load_texts
from shoal.inference.vllm import check_vllm
from shoal.recipe.section import as_dict

from .distill import check_distill, distill_is_done
from .evaluate import evaluate
from .measure import check_measure, measure
from .prune import prune, refuse_impossible_plan
from .report import report
from .run import Run, locked, write_story


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
    from shoal.eval.report.findings import score_rows
    from shoal.tracking.wandb_run import log_results

    log_results(run.recipe.track, run.dir, as_dict(run.recipe), score_rows)


def preflight(run: Run) -> None:
    """Refuse within seconds what a later stage would refuse after hours: layers, data, tasks, training arguments.

    Raises:
        UserError: as the stages do.
    """
    from shoal.eval.evaluate import checked_items
    from shoal.eval.tasks.load import tasks_of

    recipe = run.recipe
    refuse_impossible_plan(run)
    if recipe.export.gguf:
        from shoal.compress.gguf import check_export

        check_export(run.config())
    check_measure(run)
    check_distill(run)
    if recipe.eval.backend == "vllm":
        check_vllm("eval.backend")
    for source in recipe.eval.perplexity_data:
        load_texts(source, max_characters=1)
    checked_items(tasks_of(recipe.eval), recipe.eval, config=run.config(), tokenizer=run.tokenizer())
