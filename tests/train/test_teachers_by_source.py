"""Several teachers, each for its sources: two recordings of one teacher are one recording."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import tiny_checkpoint
from training_runs import Trial, finished, recipe, run, unfinished, write_recipe

from shoal.data.packing import read_rows
from shoal.train.teacher.recording_plan import RecordingManifest


def settings(folder: Path) -> dict[str, Any]:
    """Of two sources with a teacher each, and a loss term each, whose curves are then the teachers'."""
    data = []
    for number, letter in enumerate("ab"):
        path = folder / f"{letter}.jsonl"
        texts = [" ".join(f"{letter * (1 + n % 7)}{n}" for n in range(start, start + 30)) for start in range(40)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        data.append({"path": str(path), "teacher": number, "losses": [f"forward_kl_{number + 1}"]})
    return {
        "data": data,
        "losses": [{"kind": "forward_kl"}, {"kind": "forward_kl"}],
        "trainer": {"save_strategy": "steps", "save_steps": 4},
    }


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, teacher: Path, cut: Path) -> tuple[Path, dict[str, Any]]:
    """A folder with recordings `all`, `0` and `1` of one teacher, and the settings."""
    folder = tmp_path_factory.mktemp("recorded")
    both = settings(folder)
    path = recipe(folder / "by", teacher, cut, **both, teacher={"recorded": [str(folder / name) for name in "01"]})
    for name, own in {"all": "null", "0": "0", "1": "1"}.items():
        finished(run(path, f"record.folder={folder / name}", f"record.teacher={own}", verb="record"))
    return folder, both


@pytest.fixture(scope="module")
def several(recorded, tmp_path_factory: pytest.TempPathFactory, teacher: Path, cut: Path) -> Trial:
    folder, both = recorded
    teachers = {"recorded": [str(folder / "0"), str(folder / "1")]}
    return finished(run(recipe(tmp_path_factory.mktemp("several"), teacher, cut, **both, teacher=teachers)))


def test_two_recordings_of_one_teacher_are_one_recording(recorded, several, teacher, cut, tmp_path):
    folder, both = recorded
    counts = [RecordingManifest.read(folder / name / RecordingManifest.FILE).num_rows for name in ("all", "0", "1")]
    assert counts == [32, 16, 16]
    one = finished(run(recipe(tmp_path, teacher, cut, **both, teacher={"recorded": str(folder / "all")})))
    assert several.curve() == one.curve()
    assert all(torch.equal(weight, one.weights()[name]) for name, weight in several.weights().items())
    (rows,) = (several.dir / "text").glob("rows-*")
    sources = read_rows(rows).sources_NS
    assert sources is not None
    assert all(len(row.unique()) == 1 for row in sources)
    assert f"teacher 1: 16 rows of {folder / '1'}" in several.log
    history = [row for row in several.training.history if "loss" in row]
    assert all("forward_kl_1" in row or "forward_kl_2" in row for row in history)
    went_on = finished(run(unfinished(several, tmp_path / "on", step=4)))
    assert went_on.curve() == several.curve()


def test_another_teacher_for_one_source_changes_what_is_learnt_of_that_source(
    recorded, several, teacher, cut, tmp_path
):
    folder, both = recorded
    other = tiny_checkpoint(tmp_path / "other", "llama", seed=1, num_hidden_layers=4)
    teachers = {"recorded": [str(folder / "0"), str(tmp_path / "1")]}
    path = write_recipe(tmp_path / "by", other, **both, teacher=teachers)
    finished(run(path, f"record.folder={tmp_path / '1'}", "record.teacher=1", verb="record"))
    mixed = finished(run(recipe(tmp_path / "mixed", teacher, cut, **both, teacher=teachers)))
    first = [next(row for row in trial.training.history if "loss" in row) for trial in (mixed, several)]
    assert first[0].get("forward_kl_1") == first[1].get("forward_kl_1")
    assert first[0]["forward_kl_2"] != first[1]["forward_kl_2"]
    # the same run directory is another training with other teachers
    shutil.copytree(mixed.dir, tmp_path / "again" / "run")
    again = yaml.safe_load(mixed.recipe.read_text())
    again["run_dir"] = str(tmp_path / "again" / "run")
    again["distill"]["teacher"] = {"recorded": [str(folder / "0"), str(folder / "1")]}
    (tmp_path / "again" / "recipe.yaml").write_text(yaml.safe_dump(again))
    result = run(tmp_path / "again" / "recipe.yaml").result
    assert result is not None
    assert result.returncode == 2
    assert "distill.teacher is" in result.stderr


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        (["all", "1"], "belongs to another run: row"),
        (["0", "nowhere"], "nowhere: holds no recording.json, which says whose signals it has"),
        (["0", "1", "all"], "distill.teacher.recorded.2: no source of distill.data names teacher 2; leave it out"),
    ],
)
def test_recordings_that_are_not_those_of_the_sources_are_refused(recorded, teacher, cut, tmp_path, teachers, message):
    folder, both = recorded
    path = recipe(tmp_path, teacher, cut, **both, teacher={"recorded": [str(folder / name) for name in teachers]})
    result = run(path).result
    assert result is not None
    assert result.returncode == 2
    assert message in result.stderr
