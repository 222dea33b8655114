"""The stage `report`: one page about a run directory, then what the recipe exports.

Code of a stage is imported where it is used, so that a verb loads only what it runs.
"""

from __future__ import annotations

import logging

from shoal.artifacts.importance import Importance
from shoal.progress import doing

from .evaluate import eval_inputs, require_models_of_this_run, roles, scores_of
from .export import export, export_gguf
from .measure import importance_of
from .run import Run, write_story

log = logging.getLogger(__name__)


def require_results(run: Run) -> None:
    """Refuse to report what is not there, before the lock and run.json would make a run directory of it."""
    from shoal.eval.report.findings import read_run

    read_run(run.dir)


def report(run: Run) -> None:
    """report.html and report.md, then what the recipe exports: a GGUF file, a push to the Hub."""
    from shoal.eval.report.report import write_report

    _require_this_run(run)
    write_story(run)
    with doing("writing the report"):
        path = write_report(run.dir)
    log.info("report: %s", path)
    if run.recipe.export.gguf:
        export_gguf(run)
    if run.recipe.export.hub_repo is not None:
        export(run)


def _require_this_run(run: Run) -> None:
    """Refuse to report or export results that other settings made, naming the first that differs."""
    folders = roles(run)
    require_models_of_this_run(run, folders)
    if (run.dir / Importance.FILE).is_file():
        importance_of(run).require()
    for role, folder in folders.items():
        if (asked := scores_of(run, role, eval_inputs(run, folder))).path.is_file():
            asked.require()
