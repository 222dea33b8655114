"""`shoal lab NAME RECIPE_OR_RUN_DIR [key=value ...]`: run one part of the lab on a run's model."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

from shoal.errors import UserError
from shoal.launch.early import refuse_early
from shoal.launch.early.model_files import refuse_model
from shoal.progress import loading
from shoal.recipe.asked import ALLOW
from shoal.recipe.messages import checked
from shoal.recipe.recipe import apply_override, read_settings, settled
from shoal.recipe.remembered import remembering
from shoal.recipe.section import Section

from .settings import DepthUse, Diagnostics, Heads, Patching, Reading, Sweeps

PARTS: dict[str, tuple[type[Section], str]] = {
    "depth_use": (
        DepthUse,
        "ablation of the layers of teacher, pruned and distilled model on the same tasks, compared",
    ),
    "diagnostics": (
        Diagnostics,
        "which layers write, erase and decide: residual flow, logit lens, effects of skipped layers",
    ),
    "heads": (Heads, "which heads copy what is asked for, and the layers that prune.protect should name"),
    "patching": (Patching, "through which states an answer reaches the last token, by patching activations"),
    "reading": (Reading, "what a layer does for other tokens of the prompt, and what where an answer is predicted"),
    "sweeps": (Sweeps, "tasks without single heads or key-value groups, with ever fewer layers, with a donor's layers"),
}
"""Name of every part, which is also its module here -> its keys, and what it says, in a line."""


def lab(asked: argparse.Namespace) -> str:
    """Run the part that the first of ``asked.words`` names on the run that the second names; the rest are its settings,
    as key=value. Returns what is to be printed; without words a list of the parts.

    Raises:
        UserError: no such part, no run, or settings that the part does not take.
    """
    if not asked.words:
        width = max(map(len, PARTS))
        return "\n".join(f"shoal lab {name:{width}}  {about}" for name, (_, about) in PARTS.items())
    name, *rest = asked.words
    if name not in PARTS:
        raise UserError(f"shoal lab {name}: there is no such part; there are {', '.join(PARTS)}")
    if not rest or "=" in rest[0]:
        raise UserError(f"shoal lab {name}: name a recipe or a run directory, such as `shoal lab {name} runs/mine`")
    allow = [word for word in rest if word.startswith(f"{ALLOW}=")]
    rest = [word for word in rest if word not in allow]
    said_of_run, file = read_settings(rest[0], allow)
    recipe = settled(said_of_run, file, allow)
    refuse_early("lab", recipe)
    said: dict[str, Any] = {}
    for override in rest[1:]:
        apply_override(said, override)
    settings: Any = checked(PARTS[name][0], said, source=f"shoal lab {name}", overrides=rest[1:])
    for model in filter(None, (getattr(settings, key, None) for key in ("donor", "beside"))):
        refuse_model("lab", recipe, model, getattr(settings, "donor_revision", None))
    if name in ("depth_use", "sweeps") and recipe.measure.sweep is None:
        raise UserError(f"shoal lab {name}: needs layers swept over tasks; name some in measure.sweep.tasks")
    with loading():
        from shoal.launch.verbs.run import locked, open_run

        part = importlib.import_module(f"shoal.lab.{name}")
    with remembering(Path(recipe.run_dir).expanduser(), said_of_run) as memory:
        run = open_run(recipe, memory=memory)
        with locked(run):
            return part.work(run, settings)
