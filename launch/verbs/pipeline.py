"""`shoal run`: every stage that is not done, in order, after refusing what would be refused only hours later.

Code of a stage is imported where it is used, so that a verb loads only what it runs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from shoal.data.sources import load_texts
from shoal.machine import ranks_to_start
from shoal.progress import doing
from shoal.recipe.section import as_dict

from ..early.asked import Asked
from ..early.run_directory import refuse_trained
from .distill import check_distill, distill_is_done
from .evaluate import evaluate
from .measure import check_measure, importance_of, measure
from .prune import expected_plan, prune, refuse_impossible_plan
from .report import report
from .run import Run, locked, write_story


def run_all(run: Run, launch: Callable[[str, Run], None]) -> None:
    """Every stage that is not done; ``launch`` runs a stage by its verb in ranks.

    Training has processes of its own. Where there are GPUs, or several ranks are asked for, so has every stage: what
    this process held of a GPU would be missing there. The run directory is let go while launched ranks hold it.
    """
    apart = torch.accelerator.is_available() or ranks_to_start(run.recipe.num_processes) > 1

    def stage(verb: str, work: Callable[[Run], None]) -> None:
        if apart:
            launch(verb, run)
        else:
            with locked(run):
                work(run)

    with locked(run):
        with doing("checking all stages"):
            preflight(run)
        write_story(run)
        is_measured = importance_of(run).is_done()
    if not is_measured:
        stage("measure", measure)
        refuse_other_layers(run)
    stage("prune", prune)
    with locked(run):
        track(run)
        is_trained = distill_is_done(run)
    if not is_trained:
        launch("distill", run)
    stage("eval", evaluate)
    with locked(run):
        report(run)
        track(run)


def track(run: Run) -> None:
    """Log to W&B what the run directory holds now, as far as the recipe wants it; what fails there is only said."""
    from shoal.eval.report.findings import score_rows
    from shoal.tracking.wandb_run import log_results

    log_results(run.recipe.track, run.dir, as_dict(run.recipe), score_rows)


def refuse_other_layers(run: Run) -> None:
    """Refuse layers with which checkpoints could not go on, once importance.json tells them."""
    if importance_of(run).is_there():
        refuse_trained(Asked("run", run.recipe), expected_plan(run).drop)


def preflight(run: Run) -> None:
    """Refuse within seconds what a later stage would refuse after hours: layers, data, tasks, training arguments."""
    from shoal.eval.evaluate import checked_items
    from shoal.eval.tasks.load import tasks_of

    recipe = run.recipe
    refuse_impossible_plan(run)
    refuse_other_layers(run)
    if recipe.export.gguf:
        from shoal.compress.gguf import check_export

        check_export(run.config())
    check_measure(run)
    check_distill(run)
    for source in recipe.eval.perplexity_data:
        load_texts(source, max_characters=1)
    checked_items(tasks_of(recipe.eval), recipe.eval, config=run.config(), tokenizer=run.tokenizer())
