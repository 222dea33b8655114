"""The stage `depth`: teacher, cut and healed model swept over the same columns, and what moved from one to another.

Code of a stage is imported where it is used, so that a verb loads only what it runs.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.depth import DepthUse
from shoal.errors import UserError
from shoal.models.anatomy import text_config
from shoal.models.checkpoint_files import model_fingerprint
from shoal.models.load import load_config
from shoal.progress import doing
from shoal.recipe.edits import insertions
from shoal.runtime import barrier, is_main

from .evaluate import require_models_of_this_run
from .measure import measure
from .run import BESIDE, MEASURED, Run

log = logging.getLogger(__name__)

CHEAPEST_METRIC = "block_influence"
"""What models other than the teacher are measured by besides the sweep, since nothing is chosen for them."""


def depth(run: Run) -> None:
    """depth/<role>/ of every model that exists, and depth_use.json with its figure. All ranks take part.

    Raises:
        UserError: no swept tasks in the recipe, nothing to compare the teacher with, or a model beside it of another
            number of layers or with another tokenizer.
    """
    from shoal.compress.sweeps.depth_use import SweptRole, depth_use
    from shoal.figures.depth_use import depth_use_figure
    from shoal.figures.style import save_figure

    models = _models(run)
    for role, own in models.items():
        log.info("depth: %s", role)
        measure(own)
    if is_main():
        swept = [SweptRole(role, own.dir) for role, own in models.items()]
        inputs = {role: model_fingerprint(own.base) for role, own in models.items()}
        inputs |= {f"{own.role}, importance": own.importance.provenance.fingerprint for own in swept}
        with doing("depth: what moved"):
            use = depth_use(swept, num_layers=run.num_layers, provenance=Provenance(inputs))
            use.write(run.dir / DepthUse.FILE)
            save_figure(depth_use_figure(use), run.dir / "figures" / "depth_use.svg")
        log.info("depth: %s", use.in_words())
    barrier()


def _models(run: Run) -> dict[str, Run]:
    """What is measured, by role: the teacher as always, the others over its sweep of layers alone."""
    settings = run.recipe.measure
    if insertions(run.recipe.prune.edits):
        raise UserError(
            "depth: compares layers by the teacher's numbers, and those that prune.edits inserts have none; leave "
            "depth out for a model that grows"
        )
    if settings.sweep is None or not settings.sweep.tasks or "layer" not in settings.sweep.operators:
        raise UserError("depth: needs tasks to sweep the layers over; name some in measure.sweep.tasks")
    folders = {role: run.root / name for role, name in MEASURED.items()}
    folders = {role: folder for role, folder in folders.items() if (folder / "config.json").is_file()}
    require_models_of_this_run(run, {"teacher": run.teacher, **folders})
    if settings.beside is not None:
        _check_beside(run)
        folders[BESIDE] = replace(run, measured=BESIDE).base
    if not folders:
        raise UserError(
            f"depth: {run.root} holds no cut model yet, and measure.beside names none; run `shoal prune` first, or "
            "set measure.beside"
        )
    whole = replace(settings, diagnostics=settings.memory_gb is None)
    other_ways = {"greedy": None, "greedy_weights": {}, "spare_heads": False, "donor": None, "donor_revision": None}
    sweep = replace(settings.sweep, operators=("layer",), **other_ways)
    of_the_teacher = {"scale_removals": False, "images": None, "probes": (), "heads": None, "vision_states": None}
    layers_alone = replace(whole, sweep=sweep, metrics=(CHEAPEST_METRIC,), **of_the_teacher)
    others = replace(run, recipe=replace(run.recipe, measure=layers_alone))
    return {
        "teacher": replace(run, recipe=replace(run.recipe, measure=whole)),
        **{role: replace(others, measured=role) for role in folders},
    }


def _check_beside(run: Run) -> None:
    """Refuse a model whose layers are not the teacher's, one for one, or that reads other tokens."""
    from shoal.eval.harness.tokenizer_check import require_same_tokenizer

    path = replace(run, measured=BESIDE).base
    config = text_config(load_config(path, trust_remote_code=run.recipe.trust_remote_code))
    if config.num_hidden_layers != run.num_layers:
        raise UserError(
            f"measure.beside: {run.recipe.measure.beside} has {config.num_hidden_layers} layers and the teacher "
            f"{run.num_layers}; name a model of as many"
        )
    folders = {"teacher": run.teacher, BESIDE: path}  # both are asked in the teacher's tokens
    require_same_tokenizer(folders, trust_remote_code=run.recipe.trust_remote_code)
