"""A run directory remembers its recipe and every override; what is refused it forgets, and strangers are not believed.

Covers: shoal.launch.verbs.report.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.errors import UserError
from shoal.launch import early
from shoal.launch.cli import _main
from shoal.launch.verbs import prune, report
from shoal.launch.verbs.run import Run
from shoal.recipe.prune import CutThese
from shoal.recipe.recipe import read_settings
from shoal.recipe.remembered import FILE, memory_in


@pytest.fixture(autouse=True)
def _own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "mine"


@pytest.fixture
def recipe(teacher: Path, run_dir: Path, tmp_path: Path) -> str:
    """A recipe that drops two layers of the tiny model."""
    file = tmp_path / "my.yaml"
    file.write_text(f"model: {teacher}\nrun_dir: {run_dir}\nprune: {{drop: [1, 3]}}  # why\n")
    return str(file)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs that prune and report were given, which make a file instead; seed 13 is refused."""
    runs: list[Run] = []

    def work(run: Run) -> None:
        runs.append(run)
        if run.recipe.seed == 13:
            raise UserError("seed: 13")
        (run.dir / "made").touch()

    monkeypatch.setattr(prune, "prune", work)
    monkeypatch.setattr(report, "report", work)
    monkeypatch.setattr(early, "read_run", lambda _: None)
    return runs


def test_a_run_directory_alone_is_enough_and_later_overrides_are_added(
    recipe: str, run_dir: Path, seen: list[Run]
) -> None:
    assert _main(["prune", "--config", recipe, "eval.limit=5", "seed=7"]) == 0
    assert _main(["report", str(run_dir)]) == 0
    assert _main(["prune", str(run_dir), "eval.limit=6", "distill.trainer.learning_rate=1e-3"]) == 0
    assert _main(["report", "--config", str(run_dir)]) == 0
    assert [(run.recipe.seed, run.recipe.eval.limit) for run in seen] == [(7, 5), (7, 5), (7, 6), (7, 6)]
    assert all(run.recipe.prune == CutThese(drop=(1, 3)) and run.dir == run_dir for run in seen)
    assert seen[-1].recipe.distill.trainer == {"learning_rate": 1e-3}
    said, _ = read_settings(run_dir)
    assert said["eval"] == {"limit": 6}, "what was said, and no defaults"


def test_what_is_refused_is_not_remembered(recipe: str, run_dir: Path, seen: list[Run]) -> None:
    assert _main(["prune", recipe, "seed=13"]) == 2
    assert not run_dir.exists(), "nothing was made"
    assert _main(["prune", recipe, "seed=7"]) == 0
    before = memory_in(run_dir)
    assert _main(["prune", str(run_dir), "seed=13"]) == 2
    assert memory_in(run_dir) == before
    assert len(seen) == 3


def test_what_has_made_something_before_it_is_refused_is_remembered(
    recipe: str, run_dir: Path, seen: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, for one: the run directory goes on by its name."""

    def fill(run: Run) -> None:
        (run.dir / "half").touch()
        raise UserError("the disk is full")

    monkeypatch.setattr(prune, "prune", fill)
    assert _main(["prune", recipe, "seed=7"]) == 2
    assert _main(["report", str(run_dir)]) == 0
    assert seen[-1].recipe.seed == 7


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert _main(list(argv)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_strangers_are_not_believed(
    capsys: pytest.CaptureFixture[str], recipe: str, run_dir: Path, seen: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _main(["prune", recipe]) == 0
    file = run_dir / FILE
    signed = file.read_text()
    for text in (signed.replace("drop:", "spare:"), signed.replace("# signature ", "# sig "), "model: m\n"):
        file.write_text(text)
        assert "is not signed with your key, and somebody else's recipe can run code" in refusal(
            capsys, "report", str(run_dir)
        )
    file.write_text(signed.replace("- 3", "- 2"))
    monkeypatch.setenv("SHOAL_TRUSTED_RUNS", str(run_dir.parent))
    assert _main(["report", str(run_dir)]) == 0
    assert seen[-1].recipe.prune == CutThese(drop=(1, 2))


def test_secrets_are_not_kept_and_asked_for_again(
    capsys: pytest.CaptureFixture[str], recipe: str, run_dir: Path, seen: list[Run]
) -> None:
    secret = "hf_" + "s" * 34
    assert _main(["prune", recipe, f"track.tags=[a, {secret}]"]) == 0
    assert secret not in (run_dir / FILE).read_text()
    assert "shoal does not store secrets in a run directory; add track.tags.1=VALUE to the command" in refusal(
        capsys, "report", str(run_dir)
    )
    assert _main(["report", str(run_dir), f"track.tags.1={secret}"]) == 0
    assert seen[-1].recipe.track.tags == ("a", secret)
