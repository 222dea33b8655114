"""Trainings of tiny models, as their preflight describes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import NUM_LAYERS, tiny_config

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.plan import Plan
from shoal.models.load import Checkpoint, LoadSettings
from shoal.recipe.distill import Distill
from shoal.train.preflight.memory import Job, job
from shoal.train.student.spec import Ranks, TrainSpec, train_spec

CPU = torch.device("cpu")


ONE_RANK = Ranks(1, 1, CPU)


ROWS, LENGTH = 3, 64


def dropping(*layers: int, num_layers: int = NUM_LAYERS) -> Plan:
    return Plan(Provenance({}), num_layers, layers, "")


def spec_of(settings: Distill, plan: Plan, *, student_layers: int, **changes: Any) -> TrainSpec:
    """Of a llama on one rank of a CPU."""
    load = LoadSettings(changes.pop("dtype", "stored"))
    teacher, student = (
        Checkpoint(Path(name), tiny_config("llama", num_hidden_layers=layers), load)
        for name, layers in (("teacher", plan.num_layers), ("student", student_layers))
    )
    return train_spec(teacher, student, plan, settings, changes.get("ranks", ONE_RANK))


CUT = dropping(2, 4)


def job_of(**settings: Any) -> Job:
    """On a GPU of which only the name is needed; four ranks."""
    given = {
        "sequence_length": LENGTH,
        "deepspeed": "zero0",
        "num_tokens": 100_000,
        "watch": None,
        "precision": "bf16-mixed",
    }
    ranks, plan = Ranks(4, 2, torch.device("cuda")), settings.pop("plan", CUT)
    return job(spec_of(Distill(**given | settings), plan, student_layers=4, dtype="bfloat16", ranks=ranks))
