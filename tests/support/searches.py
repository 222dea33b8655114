"""Sections of small searches, and a stand-in for training."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.plan import PruningPlan
from shoal.artifacts.training import Training
from shoal.launch.verbs import distill
from shoal.launch.verbs.run import Run, open_run
from shoal.recipe.recipe import load_recipe

MEASURE = {"num_tokens": 64, "sequence_length": 32, "batch_size": 2, "metrics": ["angular"]}


EVAL = {"tasks": ["knowledge_generation"], "limit": 2, "perplexity_tokens": 200, "sequence_length": 64}


class Healer:
    """Stands in for the launcher: the "healed" student has the next of ``scales`` times its head."""

    def __init__(self, *scales: float) -> None:
        self.scales = list(scales)
        self.healed: list[str] = []

    def __call__(self, launched: Run, file: Path) -> None:
        recipe = launched.recipe
        assert load_recipe(file) == recipe, "the launched ranks read another recipe"
        run = open_run(recipe)
        self.healed.append(run.dir.name)
        if not self.scales:
            raise KeyboardInterrupt
        shutil.copytree(run.dir / "student", run.dir / "distilled")
        weights = load_file(run.dir / "student" / "model.safetensors")
        weights["lm_head.weight"] *= self.scales.pop(0)
        save_file(weights, run.dir / "distilled" / "model.safetensors", metadata={"format": "pt"})
        inputs = distill.training_inputs(run, PruningPlan.read(run.dir / "plan.json"))
        Training(Provenance(inputs), 2, recipe.distill.num_tokens, 1.0, (), {}, {}, 1).write(run.dir / "distill.json")
