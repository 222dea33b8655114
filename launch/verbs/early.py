"""What is refused before torch and transformers are loaded, which takes seconds."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from shoal.components import require_layers
from shoal.compress.free_layers import refuse_impossible_layers
from shoal.errors import UserError
from shoal.eval.tasks.names import refuse_unknown
from shoal.inference.vllm import check_vllm
from shoal.model_names import name_of_model, refuse_no_model, refuse_revision
from shoal.recipe.distill import Live, Recorded
from shoal.recipe.losses import HiddenStates
from shoal.recipe.measure import METRICS, no_metric
from shoal.recipe.prune import CutThese
from shoal.recipe.recipe import Recipe
from shoal.recipe.section import AUTO, DataSource
from shoal.recipe.trainer_arguments import read_deepspeed

CUT = ("prune", "distill", "run")
"""Verbs that cut the model where there is no student yet."""


def refuse_early(verb: str, recipe: Recipe) -> None:
    """Refuse what ``verb`` would find missing or impossible later on.

    Raises:
        UserError: no such run directory, model, task, metric, data or DeepSpeed file, layers that the model does not
            have, or a package that a format or an engine needs.
    """
    if verb == "report" and not Path(recipe.run_dir).expanduser().is_dir():
        raise UserError(f"{recipe.run_dir}: no such run directory; run a stage of the recipe first")
    if verb == "push":
        require_distilled(recipe)
    if verb != "report":
        refuse_no_model(recipe.model)
        refuse_revision(recipe.model, recipe.revision)
    _refuse_names(verb, recipe)
    if verb in ("report", "push") or "LOCAL_RANK" in os.environ:  # a rank's launcher has looked
        return
    if sources := _sources(verb, recipe):
        from shoal.data.sources import local_files

        for source in sources:
            if source.path != AUTO:  # a folder of this name is none of its text
                local_files(source)
    from shoal.models.download import num_layers_said  # loads the Hub's library

    num_layers = num_layers_said(recipe.model, recipe.revision)
    if verb in CUT and num_layers is not None:
        refuse_impossible_layers(recipe.prune, num_layers)
    if verb in ("distill", "run") and num_layers is not None:
        terms = (term for term in recipe.distill.terms if isinstance(term, HiddenStates))
        wrong = [layer for term in terms for layer in term.layers or () if not 0 <= layer < num_layers]
        require_layers(wrong, num_layers, "distill.losses: hidden_states: layers")


def require_distilled(recipe: Recipe) -> None:
    """Refuse a push of nothing, or to nowhere."""
    run_dir = Path(recipe.run_dir).expanduser()
    if recipe.export.hub_repo is None:
        raise UserError(f"shoal push {run_dir}: says not where to; name the repository, owner/name, behind it")
    if not (run_dir / "distilled" / "config.json").is_file():
        raise UserError(f"{run_dir / 'distilled'}: nothing to export yet; run `shoal distill` first")


def _refuse_names(verb: str, recipe: Recipe) -> None:
    sweep, distill, run_dir = recipe.measure.sweep, recipe.distill, Path(recipe.run_dir).expanduser()
    if verb in ("measure", "run") and sweep is not None:
        refuse_unknown(sweep.tasks, recipe.eval.include_path, setting="measure.sweep.tasks")
    if verb in CUT and sweep is None and not (run_dir / "importance.json").exists():
        _refuse_unmeasured(recipe)
    if verb in ("record", "distill", "run"):
        read_deepspeed(distill.deepspeed)
        if distill.lora is not None:
            distill.lora.require_packages()
        if distill.watch is not None:
            refuse_unknown(distill.watch.tasks, recipe.eval.include_path, setting="distill.watch.tasks")
        by_vllm = (n for n, source in enumerate(distill.data) if source.generate and source.generate.backend == "vllm")
        if (number := next(by_vllm, None)) is not None and not any((run_dir / "text").glob("written-*")):
            check_vllm(f"distill.data.{number}.generate.backend")  # what is written is read without it
        teacher = distill.teacher
        if verb == "record" and isinstance(teacher, Live):
            raise UserError("distill.teacher: is live, and nothing is recorded of it; add distill.teacher=recorded")
        by_vllm = teacher if isinstance(teacher, Recorded) and teacher.backend == "vllm" else None
        if by_vllm and not (by_vllm.folder(recipe.run_dir) / "recording.json").is_file():  # else it may be needless
            check_vllm("distill.teacher.backend")
    if verb in ("eval", "run"):
        refuse_unknown(recipe.eval.tasks, recipe.eval.include_path)
        if recipe.eval.backend == "vllm":
            check_vllm("eval.backend")


def _refuse_unmeasured(recipe: Recipe) -> None:
    """Refuse to choose by a metric that there is not, or that will not be measured."""
    chosen = set() if isinstance(recipe.prune, CutThese) else recipe.prune.chosen_by
    for name in sorted(chosen - {*recipe.measure.metrics}):
        if name not in METRICS:
            raise no_metric(name, f"prune.metric={name}")
        raise UserError(f"prune.metric={name}: is not measured; name it in measure.metrics")


def _sources(verb: str, recipe: Recipe) -> tuple[DataSource, ...]:
    """The data that ``verb`` reads."""
    prune = recipe.prune
    measured = verb in ("measure", "run") or (verb in CUT and (not isinstance(prune, CutThese) or prune.changes))
    return (
        *(recipe.measure.data if measured else ()),
        *(recipe.distill.data if verb in ("record", "distill", "run") else ()),
        *(recipe.eval.perplexity_data if verb in ("eval", "run") and recipe.eval.perplexity_tokens else ()),
    )


def init_file(asked: argparse.Namespace) -> Path:
    """The file that `shoal init` writes.

    Raises:
        UserError: it is there or cannot be, or there is no such model.
    """
    refuse_no_model(asked.model)
    refuse_revision(asked.model, asked.revision)
    if asked.out == "":
        raise UserError("--out: is empty; name a file, or leave it out")
    file = Path(asked.out or f"{name_of_model(asked.model)}.yaml").expanduser()
    if file.exists():
        raise UserError(f"{file}: is there already; name another file with --out, or remove it")
    if not file.parent.is_dir():
        raise UserError(f"{file.parent}: no such folder; make it, or name another file with --out")
    from shoal.models.download import num_layers_said

    num_layers_said(asked.model, asked.revision, with_weights=False)  # refuses what is no model
    return file
