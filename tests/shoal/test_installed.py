"""Libraries of other versions than the package asks for: one sentence at the start, in the shell and in Python."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from shoal import installed
from shoal.errors import UserError

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
INSIDES = ("transformers", "peft", "deepspeed", "trl", "lm-eval")
"""Libraries whose insides are used: the next minor release of each may change them."""
SENTENCE = (
    "trl is 9.9.1, with which this shoal is not tested; run `pip install 'trl{}'`, or set SHOAL_UNTESTED_VERSIONS=1"
)
FAKED = """
import importlib.metadata
real = importlib.metadata.version
importlib.metadata.version = lambda name: "9.9.1" if name == "trl" else real(name)
"""


def wanted(name: str) -> str:
    (found,) = [text for text in PROJECT["dependencies"] if Requirement(text).name == name]
    return str(Requirement(found).specifier)


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Sets the version in which a library seems to be installed."""
    real = importlib.metadata.version
    told: dict[str, str] = {}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: told.get(name) or real(name))
    monkeypatch.delenv(installed.CONSENT, raising=False)
    installed.refuse_untested.cache_clear()
    return lambda name, version: told.update({name: version})


def test_a_version_below_or_above_is_refused_by_name_with_the_fix(
    faked: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    faked("trl", "9.9.1")
    with pytest.raises(UserError) as refused:
        installed.refuse_untested()
    assert str(refused.value) == SENTENCE.format(wanted("trl"))
    faked("trl", "0.1")
    faked("torch", "2.0")
    with pytest.raises(
        UserError, match=r"^torch is 2\.0, trl is 0\.1, with .* 'torch>=[0-9.]+' 'trl<[0-9.]+,>=[0-9.]+'"
    ):
        installed.refuse_untested()
    monkeypatch.setenv(installed.CONSENT, "1")
    installed.refuse_untested()


def test_a_build_or_a_patch_of_a_tested_version_is_taken(faked: Callable[[str, str], None]) -> None:
    floor = wanted("torch").removeprefix(">=")
    for version in (f"{floor}.0+cpu", f"{floor}.9", f"{floor}.1+cu130"):
        faked("torch", version)
        assert "torch" not in [name for name, *_ in installed.untested()]


def test_a_library_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ["no-such-library>=1", "trl; extra == 'more'"])
    assert list(installed.untested()) == [("no-such-library", "", ">=1")]


@pytest.mark.slow
def test_the_command_and_python_say_it_before_they_load_torch(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != installed.CONSENT}

    def said(program: str) -> tuple[int, str]:
        told = FAKED + f"import sys\ntry:\n    {program}\nfinally:\n    assert 'torch' not in sys.modules"
        command = [sys.executable, "-c", told, "explain", "prune.num_drop"]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr.splitlines()[-1]

    sentence = SENTENCE.format(wanted("trl"))
    assert said("from shoal.launch import main; main()") == (2, f"shoal: error: {sentence}")
    assert said("import shoal; shoal.distill") == (1, f"shoal.errors.UserError: {sentence}")


@pytest.mark.parametrize("name", INSIDES)
def test_libraries_whose_insides_are_used_end_at_the_next_minor_release(name: str) -> None:
    (found,) = [Requirement(text) for text in PROJECT["dependencies"] if Requirement(text).name == name]
    assert {part.operator for part in found.specifier} == {">=", "<"}


def test_other_libraries_have_no_ceiling() -> None:
    others = [Requirement(text) for text in PROJECT["dependencies"]]
    assert not [own.name for own in others if own.name not in INSIDES and "<" in str(own.specifier)]
