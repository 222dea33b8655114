"""`shoal run --each`: a run of every combination, what they share of the teacher, and their comparison at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from compared_runs import write_run

from shoal.artifacts.evaluation import Scores
from shoal.launch import cli
from shoal.launch.verbs.several import combinations, run_each


def test_every_combination_is_a_run_of_its_own(tmp_path: Path) -> None:
    runs = combinations(tmp_path, ["prune.drop=[1, 2],[3]", "seed=0,1"])
    names = ["drop=1-2,seed=0", "drop=1-2,seed=1", "drop=3,seed=0", "drop=3,seed=1"]
    assert list(runs) == [tmp_path / name for name in names]
    assert runs[tmp_path / names[1]] == ["prune.drop=[1, 2]", "seed=1", f"run_dir={tmp_path / names[1]}"]


def test_what_the_teacher_gave_the_first_run_lies_ready_for_the_others(tmp_path: Path) -> None:
    runs = {tmp_path / name: (name,) for name in "abc"}
    told: list[Sequence[str]] = []

    def run_one(overrides: Sequence[str]) -> int:
        told.append(overrides)
        write_run(tmp_path / "a")
        return 3 if overrides == ("b",) else 0

    assert run_each(runs, run_one) == 3
    assert told == [("a",), ("b",)], "nothing runs after a run that failed"
    there, own = (Scores.load(tmp_path / name / "eval/teacher.json").tasks for name in "ab")
    assert own == there, "with its items"


def test_the_command_ends_with_the_comparison(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_verb(verb: str, config: str, overrides: Sequence[str], **_: Any) -> int:
        folder = Path(overrides[-1].partition("=")[2])
        write_run(folder)
        return 0

    monkeypatch.setattr(cli, "run_verb", run_verb)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {teacher}\nrun_dir: {tmp_path / 'runs'}\n")
    assert cli._main(["run", str(recipe), "--each", "seed=0,1"]) == 0
    assert "seed=0  dropping" in capsys.readouterr().out
    assert (tmp_path / "runs/compare/compare.html").is_file()
