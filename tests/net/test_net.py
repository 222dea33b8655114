"""The numbers of small recipes over all verbs, as they were before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.net.compare import differences
from tests.net.recipes import CASES

ROOT = Path(__file__).parents[2]
REFERENCE = Path(__file__).with_name("reference.json")
TOLERANCE = 0.03


@pytest.mark.prove
def test_numbers_are_those_of_the_reference(tmp_path: Path) -> None:
    """After a change on purpose: `python -m tests.net.record tests/net/reference.json --portable`."""
    command = [sys.executable, "-m", "tests.net.record", str(tmp_path / "new.json"), "--portable"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=590)
    old, new = (json.loads(file.read_text()) for file in (REFERENCE, tmp_path / "new.json"))
    assert not list(differences(old, new, TOLERANCE))


def test_every_case_has_a_reference_without_failures() -> None:
    reference = json.loads(REFERENCE.read_text())
    assert list(reference) == [*CASES, "python"]
    assert not [case for case, entries in reference.items() if "failed" in entries]


def test_differences_are_told_by_case_and_entry() -> None:
    old = {"cut": {"drop": [2, 3], "loss": [1.0, 2.0], "hash.bits": "a"}, "gone": {}}
    new = {"cut": {"drop": [2, 4], "loss": [1.0, 2.01], "hash.bits": "b"}}
    assert [line.partition(":")[0] for line in differences(old, new, 0.01)] == ["cut drop", "gone"]
    assert [line.partition(":")[0] for line in differences(old, new, None)] == [
        *("cut drop", "cut loss", "cut hash.bits", "gone")
    ]
