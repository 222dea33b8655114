"""A training of the lab: the recipe's, but for what a part changes, into a folder of its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from shoal import runtime
from shoal.artifacts.identity import Identity
from shoal.artifacts.training import Training
from shoal.launch.verbs.distill import training_inputs, training_spec
from shoal.launch.verbs.prune import read_plan
from shoal.launch.verbs.run import Run
from shoal.train.distill import distill
from shoal.train.student.spec import Ranks, TrainSpec


def described(run: Run, part: str, settings: Any) -> tuple[TrainSpec, dict[str, Any]]:
    """The training of the run's student, on this process alone, and its identity with the ``settings`` of ``part``."""
    plan = read_plan(run)
    runtime.set_up_distributed(run.recipe.distill.timeout_s)
    spec = training_spec(run, plan, Ranks.here())
    spec = dataclasses.replace(spec, settings=dataclasses.replace(spec.settings, watch=None))
    return spec, {**training_inputs(run, plan), f"lab.{part}": dataclasses.asdict(settings)}


def train(run: Run, spec: TrainSpec, inputs: dict[str, Any], folder: Path) -> str:
    """Train into ``folder``, unless that is done; what to say of it."""
    file = folder / Training.FILE
    if not Identity(Training, file, inputs, "lab").is_done():
        runtime.seed_everything(run.recipe.seed)
        distill(spec, run_dir=folder, text=run.dir / "text", inputs=inputs, start_tracking=lambda: None)
    runtime.leave_distributed()
    training = Training.read(file)
    losses = [row["loss"] for row in training.history if "loss" in row]
    return (
        f"{folder / 'distilled'}: trained on {training.num_tokens:,} tokens, loss {losses[0]:.4f} to {losses[-1]:.4f}; "
        f"`shoal compare {run.dir} {folder / 'distilled'}` scores it beside the run"
    )
