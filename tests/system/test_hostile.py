"""Wrong and hostile input of every kind: the exit code, one message that begins as it should, and nothing left behind.

hostile.yaml has the cases: files that are made, words of the command or a call of Python, and what must be said.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostile import apart, fresh, make, outcome, read_cases
from ranks import call_apart
from training_runs import finished, run, write_recipe

MOST_LINES = 12
CASES = read_cases(Path(__file__).with_name("hostile.yaml"))
COMMANDS = {
    name: case
    for name, case in CASES.items()
    if not {"stdout", "python"} & case.keys() and "\0" not in "".join(case["shoal"])
}
"""Those that a shell can start."""


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher around the command."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(logging.getLogger("datasets"), "handlers", [])  # one of them writes to an earlier test's stream


@pytest.fixture
def whole(once: Callable[..., Path], teacher: Path) -> Callable[[], Path]:
    """A folder with a recipe and its run/, finished but for the report. Read only."""

    def everything(folder: Path) -> None:
        path = write_recipe(folder, teacher, steps=2)
        settings = yaml.safe_load(path.read_text()) | {"run_dir": "run"}
        path.write_text(yaml.safe_dump(settings | {"measure": {"num_tokens": 512, "sequence_length": 64}}))
        for verb in ("measure", "prune", "distill", "eval"):
            finished(run(path, verb=verb))

    return lambda: once("whole", everything)


@pytest.mark.every_case
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if case.get("quick") else pytest.mark.prove) for name, case in CASES.items()]
)
def test_what_is_wrong_is_said(name: str, teacher: Path, tmp_path: Path, whole: Callable[[], Path]) -> None:
    case = arranged(name, teacher, tmp_path, whole)
    before = sorted(tmp_path.rglob("student/*"))
    found: Any
    if case.get("apart"):
        found = json.loads(call_apart(apart, case, tmp_path).stderr.splitlines()[-1])
    else:
        found = outcome(case, tmp_path)
    require(case, tmp_path, *found)
    assert not (tmp_path / "PWNED").exists()
    assert sorted(tmp_path.rglob("student/*")) == before


@pytest.mark.every_case
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if COMMANDS[name].get("early") else pytest.mark.prove) for name in COMMANDS]
)
def test_a_process_that_has_loaded_nothing_says_it_before_it_loads_torch(
    name: str, teacher: Path, tmp_path: Path, whole: Callable[[], Path]
) -> None:
    case = arranged(name, teacher, tmp_path, whole)
    code, said, has_loaded = fresh(case, tmp_path)
    require(case, tmp_path, code, said)
    assert not (has_loaded and case.get("early") and not case.get("loads")), "torch was loaded to say it"


def arranged(name: str, teacher: Path, folder: Path, whole: Callable[[], Path]) -> dict[str, Any]:
    """The row ``name``, whose files are in ``folder`` now."""
    case, head = CASES[name], "model: model\nrun_dir: run\ntrack: {wandb: off}\n"
    if case.get("with") == "run":
        shutil.copytree(whole() / "run", folder / "run")
        head = (whole() / "recipe.yaml").read_text()
    shutil.copytree(teacher, folder / "model")
    make(folder, {"recipe.yaml": head + case.get("recipe", ""), **case["files"]})
    return case


def require(case: dict[str, Any], folder: Path, code: int, said: str) -> None:
    """What a row asks of the end of a process that has said this."""
    said = said.replace(str(folder), "HERE")
    expected = case.get("code", 2)
    errors = re.split(r"(?m)^shoal(?: \w+)?: error: ", said)
    assert code == expected, said
    assert len(errors) == 1 + (expected == 2), said
    assert re.match(case["says"], errors[-1], re.DOTALL) if expected == 2 else re.search(case["says"], said), said
    assert "Traceback" not in said
    assert expected != 2 or len(said.splitlines()) <= MOST_LINES


def test_the_table_is_long_enough() -> None:
    assert len(CASES) >= 300
    assert 40 <= sum(case.get("quick", False) for case in CASES.values()) <= 60


def test_a_reader_that_leaves_early_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`| head -1` closes the pipe; the command goes on with what it writes to files."""
    monkeypatch.chdir(tmp_path)
    script = "from shoal.launch.cli import _print\nfor _ in range(3): _print('x' * 100_000)\nopen('done', 'w').close()"
    done = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "{script}" | head -c 1 > /dev/null; echo "${{PIPESTATUS[0]}}"'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "0\n"
    assert done.stderr == ""
    assert Path("done").is_file()
