"""What is looked at before torch and transformers are loaded, which takes seconds: the list of all looks, in order.

asked          the command that was given, and what the files of its model say
model_files    files that are no checkpoint, and layers, lengths and sizes that the model does not have
settings       data, tasks, metrics, training and devices that are not there or do not fit
run_directory  results that are damaged or of another recipe, and no room for new ones
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from shoal.eval.report.run import read_run
from shoal.model_names import refuse_no_model
from shoal.ranks import refuse_no_address
from shoal.recipe.recipe import Recipe
from shoal.tracking.wandb_run import wandb_mode

from . import model_files, run_directory, settings
from .asked import CUT, LOAD, MEASURE, SCORE, TRAIN, Asked


class Look(NamedTuple):
    """One thing that is looked at."""

    at: Callable[[Asked], Any]
    verbs: tuple[str, ...]
    """Commands that need it."""
    once: bool = True
    """Not again in ranks, whose launcher has looked."""
    if_written: bool = False
    """Not in a dry run."""


LOOKS = (
    Look(lambda _: refuse_no_address(), LOAD, once=False),
    Look(lambda asked: read_run(asked.folder), ("report",)),
    Look(lambda asked: run_directory.require_distilled(asked.recipe), ("push",), once=False),
    Look(run_directory.refuse_no_token, ("push",), once=False, if_written=True),
    Look(lambda asked: refuse_no_model(asked.recipe.model, asked.recipe.revision), (*LOAD, "push"), once=False),
    Look(settings.refuse_columns, (*MEASURE, *CUT), once=False),
    Look(settings.refuse_ranks, ("measure", "distill", "eval", "run")),
    Look(settings.refuse_distillation, TRAIN, once=False),
    Look(settings.refuse_scoring, SCORE, once=False),
    Look(settings.refuse_data, LOAD),
    Look(model_files.refuse_layers, LOAD),
    Look(model_files.refuse_checkpoint, LOAD),
    Look(run_directory.refuse_results, (*LOAD, "report", "push")),
    Look(run_directory.refuse_made, ("distill", "eval", "report", "push")),
    Look(run_directory.refuse_trained, ("distill", "run")),
    Look(run_directory.refuse_place, (*LOAD, "report"), if_written=True),
    Look(lambda asked: wandb_mode(asked.recipe.track), (*LOAD, "report", "push"), if_written=True),
    Look(settings.refuse_machine, LOAD),
)


def refuse_early(verb: str, recipe: Recipe, *, writes: bool = True) -> None:
    """Refuse what ``verb`` would find missing or impossible later on. ``writes``: False for a dry run.

    Raises:
        UserError: as the functions of LOOKS.
    """
    asked, is_rank = Asked(verb, recipe), "LOCAL_RANK" in os.environ
    for look in LOOKS:
        if verb in look.verbs and (writes or not look.if_written) and not (is_rank and look.once):
            look.at(asked)
