"""What trainings of tests begin with."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """A run directory in which the cut of ``teacher`` is made already. Read only."""
    from training_runs import prepare  # loads torch

    return prepare(tmp_path_factory.mktemp("cut"), teacher)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A teacher, and a student of four layers."""
    from tiny import tiny_checkpoint

    folder = tmp_path_factory.mktemp("models")
    return tiny_checkpoint(folder / "teacher", "llama"), tiny_checkpoint(
        folder / "student", "llama", num_hidden_layers=4
    )
