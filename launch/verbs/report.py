"""The stage `report`: one page about a run directory, then what the recipe exports: a GGUF file, a push to the Hub.

Code of a stage is imported where it is used, so that a verb loads only what it runs.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.identity import Identity
from shoal.artifacts.importance import Importance
from shoal.atomic_files import written_folder
from shoal.errors import UserError
from shoal.models.checkpoint_files import model_fingerprint
from shoal.progress import doing

from ..early.run_directory import require_distilled
from .evaluate import eval_inputs, require_models_of_this_run, roles, scores_of
from .measure import importance_of
from .run import Run, write_story

log = logging.getLogger(__name__)


def report(run: Run) -> None:
    """report.html and report.md, then what the recipe exports: a GGUF file with the model card, a push to the Hub."""
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
    elif run.recipe.export.gguf:
        write_card(run)


def write_card(run: Run) -> None:
    """README.md and figures next to the weights in distilled/, as a push has them."""
    from shoal.eval.report.card import model_card
    from shoal.eval.report.hub import complete_export
    from shoal.eval.report.report import FIGURES_DIR

    if (folder := run.dir / "distilled").is_dir():
        complete_export(folder, model_card(run.dir, base_folder=run.teacher), run.dir / FIGURES_DIR)
        log.info("card: %s", folder / "README.md")


def _require_this_run(run: Run) -> None:
    """Refuse to report or export results that other settings made, naming the first that differs."""
    folders = roles(run)
    require_models_of_this_run(run, folders)
    if (run.dir / Importance.FILE).is_file():
        importance_of(run).require()
    for role, folder in folders.items():
        if (asked := scores_of(run, role, eval_inputs(run, folder))).path.is_file():
            asked.require()


def export_gguf(run: Run) -> None:
    """gguf/<model>-<role>.gguf, proven, of the distilled checkpoint, or of the pruned one where there is no other."""
    from shoal.compress import gguf

    folders = roles(run)
    role = next((role for role in ("distilled", "pruned") if role in folders), None)
    if role is None:
        raise UserError(f"{run.dir}: has no model to export yet; run `shoal prune` first")
    inputs = {"model": model_fingerprint(folders[role]), "converter": gguf.converter_fingerprint()}
    path = run.dir / gguf.Gguf.FILE
    if Identity(gguf.Gguf, path, inputs, "gguf").is_done() and (path.parent / gguf.Gguf.load(path).file).is_file():
        return
    name = re.sub(r"[^\w.-]+", "-", f"{Path(run.recipe.model).name}-{role}.gguf")
    log.info("gguf: converting %s with llama.cpp's converter", folders[role])
    with written_folder(path.parent) as temporary:
        proof = gguf.export_gguf(folders[role], temporary / name)
        gguf.Gguf(Provenance(inputs), name, proof).save(temporary / path.name)
    log.info("gguf: %s: %s", path.parent / name, proof.in_words())


def push(run: Run) -> None:
    """Push distilled/ with its model card to the Hub, with the results of this recipe alone."""
    _require_this_run(run)
    export(run)


def export(run: Run) -> None:
    """Push distilled/ with its model card to the Hub, where export.hub_repo says."""
    from shoal.eval.report.card import model_card
    from shoal.eval.report.hub import push

    require_distilled(run.recipe)
    assert run.recipe.export.hub_repo is not None
    url = push(
        run.dir / "distilled",
        model_card(run.dir, base_folder=run.teacher),
        run.recipe.export.hub_repo,
        private=run.recipe.export.private,
    )
    log.info("export: %s", url)
