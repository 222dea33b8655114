"""What `shoal doctor` looks at, and that it says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import environment, run_ranks

from shoal import runtime
from shoal.launch import cli
from shoal.launch.verbs import doctor
from shoal.launch.verbs.doctor import Row


def told(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, dict[str, Any]]]:
    code = cli._main(["doctor", "--json", *words])
    return code, {row["what"]: row for row in json.loads(capsys.readouterr().out)}


@pytest.mark.slow
def test_a_machine_without_a_gpu_says_so_and_the_rest_is_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "LEAST_HOST", 2**20)  # other programs may hold the rest
    code, rows = told(capsys, "--run-dir", str(tmp_path / "runs"))
    assert code == 0
    assert rows["GPU memory free"]["found"] == "no GPU: training runs on the CPU"
    assert {
        rows[what]["verdict"] for what in ("libraries", "devices", "host memory free", "run directory", "its loss")
    } == {"ok"}
    assert list((tmp_path / "runs").iterdir()) == []


def test_libraries_of_other_versions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "untested", lambda: iter([("trl", "9.9.1", "<1.17,>=1.15"), ("peft", "", ">=0.20")]))
    assert doctor._libraries() == Row(
        "libraries", "trl 9.9.1, peft not installed", "trl<1.17,>=1.15, peft>=0.20", "wrong"
    )


@pytest.mark.slow
def test_what_is_wrong_ends_the_command_with_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "LEAST_HOST", 2**60)
    code, rows = told(capsys, "--run-dir", "/proc/nowhere")
    assert code == 1
    assert rows["run directory"]["found"] == "/proc/nowhere: No such file or directory"
    assert [rows[what]["verdict"] for what in ("run directory", "host memory free", "devices")] == ["wrong"] * 2 + [
        "ok"
    ]


def test_what_is_wrong_with_one_rank_is_in_the_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else the command would end with code 1 beside a table in which all is well."""
    here = [
        Row("kernel", "runs", "runs", "ok"),
        Row("package", "runs", "runs", "ok"),
        Row("loss", "falls", "falls", "ok"),
        Row("rate", "7 GB/s", "", "ok", -7.0),
    ]
    there = [
        Row("kernel", "OSError: no image", "runs", "wrong"),
        Row("package", "not installed", "", "not checked"),
        Row("loss", "falls", "falls", "ok"),
        Row("rate", "5 GB/s", "", "ok", -5.0),
    ]
    monkeypatch.setattr(doctor, "_rows", lambda run_dir: here)
    monkeypatch.setattr(runtime, "together", lambda decide: [decide(), there])
    code, rows = told(capsys, "--run-dir", str(tmp_path))
    assert code == 1
    assert [(row["found"], row["verdict"]) for row in rows.values()] == [
        ("OSError: no image (rank 1)", "wrong"),
        ("not installed (rank 1)", "wrong"),
        ("falls", "ok"),
        ("5 GB/s (rank 1)", "ok"),
    ]


def test_a_package_that_breaks_or_gives_no_numbers_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randn", lambda *_, **__: torch.ones(1))
    tried = {"json": lambda package, x: x / 0, "os.path": lambda package, x: package.none, "re": lambda package, x: x}
    monkeypatch.setattr(doctor, "KERNELS", tried)
    found = [doctor._kernel(package, torch.device("cuda"))[1::2] for package in tried]
    broken = ("AttributeError: module 'posixpath' has no attribute 'none'", "wrong")
    assert found == [("produces numbers that are not finite", "wrong"), broken, ("runs", "ok")]


@pytest.mark.slow
@pytest.mark.prove
def test_ranks_look_at_what_is_between_them(tmp_path: Path) -> None:
    result = run_ranks(["doctor", "--run-dir", str(tmp_path)], ranks=2, env=environment(), cwd=tmp_path)
    rows = {line.partition("  ")[0]: line for line in result.stderr.splitlines()}
    for what, found in (("clocks", "s apart"), ("all-reduce within a node", "GB/s"), ("devices", "2 x ")):
        assert found in rows[what]
        # how fast depends on what else runs
        assert what.startswith("all-reduce") or rows[what].rstrip().endswith("ok")
