"""The verb of the lab: its list, and what it refuses before anything is loaded.

Covers: shoal.lab.settings.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import make_dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from shoal.lab import command
from shoal.launch.verbs.run import Run
from shoal.recipe.recipe import load_recipe
from shoal.recipe.section import Section


def test_the_list_has_a_line_for_every_part() -> None:
    listed = command.lab(Namespace(words=[]))
    assert [line.split()[2] for line in listed.splitlines()] == list(command.PARTS)


def test_a_run_directory_that_the_lab_began_knows_its_recipe(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts end by naming `shoal distill RUN_DIR`."""

    def work(run: Run, settings: Section) -> str:
        (run.dir / "echo.json").write_text("{}")
        return f"worked in {run.dir.name}"

    keys = make_dataclass("Echo", [], bases=(Section,))
    monkeypatch.setitem(command.PARTS, "echo", (keys, "says where it worked"))
    monkeypatch.setitem(sys.modules, "shoal.lab.echo", SimpleNamespace(work=work))
    recipe = tmp_path / "own.yaml"
    recipe.write_text(f"{{model: {teacher}, run_dir: {tmp_path / 'run'}, dtype: float32}}")
    assert command.lab(Namespace(words=["echo", str(recipe)])) == "worked in run"
    assert load_recipe(tmp_path / "run").model == str(teacher)
