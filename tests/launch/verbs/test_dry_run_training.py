"""What `shoal distill --dry-run` tells.

Covers: shoal.train.preflight.estimate.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from jobs import CUT, LENGTH, spec_of

from shoal.launch.cli import run_verb
from shoal.recipe.distill import Distill
from shoal.train.preflight.estimate import estimate
from shoal.train.student.control import control_spec


@pytest.mark.slow
def test_the_report_tells_what_a_control_adds(tmp_path: Path) -> None:
    spec = spec_of(Distill(sequence_length=LENGTH, trainable="from_first_cut"), CUT, student_layers=4)
    told = estimate(spec, tmp_path / "run", control=control_spec(spec)).told
    (line,) = (line for line in told.splitlines() if line.startswith("control: "))
    assert "trained on the same rows, 6 layers, " in line
    assert line.endswith("GB at the peak of a rank (fits)")


@pytest.mark.slow
def test_the_report_names_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Distill(sequence_length=LENGTH, trainable="from_first_cut", precision="bf16-mixed")
    told = estimate(spec_of(settings, CUT, student_layers=4), tmp_path / "run").told
    for words in (
        "student: 4 layers",
        "teacher: 6 layers",
        "ZeRO 3 ",
        "this recipe",
        "% of ",
        "frozen weights are stored once",
        "the lowest 2 layer(s) are run once for both",
        "cheapest setting that fits",
    ):
        assert words in told, words
    assert "control: " not in told
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_verb_says_it_without_a_launcher_and_writes_nothing(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr("shoal.ranks.allowed_cores", lambda: 3)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"model: {teacher}\nrun_dir: {tmp_path}/run\nprune: {{drop: [2, 4]}}\n"
        "num_processes: 3\ndistill: {sequence_length: 64, batch_size: 6, lora: {r: 2}, trainable: near_gaps,\n"
        "          teacher: {kind: recorded, prefix: true}}\n"
    )
    assert run_verb("distill", str(file), [], dry_run=True) == 0
    told = capsys.readouterr().out
    assert "step:    3 rank(s) x 1 micro-batch(es) x 2 row(s) x 64 tokens" in told
    assert "weights, recorded before, and not loaded, " in told
    assert "the lowest 1 layer(s) are not run, the state above is recorded" in told
    assert run_verb("distill", str(file), ["distill.batch_size=7"], dry_run=True) == 2
    assert "7 rows cannot be divided over 3 ranks" in capsys.readouterr().err
    (tmp_path / "a.jsonl").write_text('{"file": "a.png", "question": "a", "completion": "b"}\n')
    images = f"distill.data={{path: {tmp_path}/a.jsonl, column: {{image: file, prompt: question, completion: answer}}}}"
    assert run_verb("distill", str(file), ["distill.teacher=live", images], dry_run=True) == 2
    assert "does not read images; remove the sources with images" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
