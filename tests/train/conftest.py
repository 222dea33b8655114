"""What trainings of tests begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def cut(once: Any, teacher: Path) -> Path:
    """A run directory in which the cut of ``teacher`` is made already. Read only."""
    from training_runs import prepare  # loads torch

    return once("cut", lambda folder: prepare(folder, teacher)) / "run"


@pytest.fixture(scope="session")
def folders(once: Any, teacher: Path) -> tuple[Path, Path]:
    """A teacher, and a student of four layers."""
    from tiny import tiny_checkpoint

    student = once("student", lambda folder: tiny_checkpoint(folder, "llama", num_hidden_layers=4))
    return teacher, student / "llama"
