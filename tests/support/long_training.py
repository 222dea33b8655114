"""A training that is long enough to be interrupted."""

from __future__ import annotations

import shutil
import time
from functools import cache
from pathlib import Path

import yaml

from shoal.launch.verbs.prune import prune
from shoal.launch.verbs.run import open_run
from shoal.recipe.recipe import load_recipe

DROP = [2, 3]


STEPS = 8


MANY_STEPS = 60
"""Long enough to be interrupted in the middle."""


MANY = {"num_tokens": 64 * 4 * MANY_STEPS}


def recipe(folder: Path, teacher: Path, **distill) -> Path:
    """A recipe whose training is small, exact and long enough to be interrupted."""
    settings = {
        "model": str(teacher),
        "run_dir": str(folder / "run"),
        "dtype": "float32",
        "prune": {"drop": DROP},
        "track": {"wandb": "off"},
        "distill": {
            "data": "python_docs",
            "num_tokens": 64 * 4 * STEPS,
            "sequence_length": 64,
            "precision": "float32",
            "deepspeed": "deepspeed/zero0.json",
            "batch_size": 4,
            "watch": None,
            "trainer": {"learning_rate": 1e-3, "save_steps": 2},
            **distill,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@cache
def _cut(teacher: Path) -> Path:
    path = recipe(teacher.parent / "cut", teacher)
    prune(open_run(load_recipe(str(path), [])))
    return path.parent / "run"


def pruned_recipe(folder: Path, teacher: Path, **distill) -> Path:
    """A recipe whose student is made already."""
    shutil.copytree(_cut(teacher), folder / "run")
    return recipe(folder, teacher, **distill)


def wait_for(condition, what: str, timeout_s: float = 120):
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)
    return found
