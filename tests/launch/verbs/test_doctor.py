"""What `shoal doctor` looks at, and that it says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import environment, run_ranks

from shoal.launch import cli
from shoal.launch.verbs import doctor


def told(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, dict[str, Any]]]:
    code = cli._main(["doctor", "--json", *words])
    return code, {row["what"]: row for row in json.loads(capsys.readouterr().out)}


@pytest.mark.slow
def test_a_machine_without_a_gpu_says_so_and_the_rest_is_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, rows = told(capsys, "--run-dir", str(tmp_path / "runs"))
    assert code == 0
    assert rows["GPU memory free"]["found"] == "no GPU: trainings run on the CPU"
    assert {rows[what]["verdict"] for what in ("devices", "host memory free", "run directory", "its loss")} == {"ok"}
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.slow
def test_what_is_wrong_ends_the_command_with_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(doctor, "LEAST_HOST", 2**60)
    code, rows = told(capsys, "--run-dir", str(tmp_path / "file"))
    assert code == 1
    assert rows["run directory"]["found"] == f"{tmp_path / 'file'}: File exists"
    assert [rows[what]["verdict"] for what in ("run directory", "host memory free", "devices")] == ["wrong"] * 2 + [
        "ok"
    ]


@pytest.mark.slow
@pytest.mark.prove
def test_ranks_look_at_what_is_between_them(tmp_path: Path) -> None:
    result = run_ranks(["doctor", "--run-dir", str(tmp_path)], ranks=2, env=environment(), cwd=tmp_path)
    rows = {line.partition("  ")[0]: line for line in result.stderr.splitlines()}
    for what, found in (("clocks", "s apart"), ("all-reduce within a node", "GB/s"), ("devices", "2 x ")):
        assert found in rows[what]
        assert rows[what].rstrip().endswith("ok")
