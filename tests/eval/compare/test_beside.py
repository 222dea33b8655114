"""A checkpoint beside runs: asked what they were asked, once, and paired with them whatever its tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import merging_tokenizer, tiny_checkpoint

from shoal.artifacts.evaluation import Scores, Speed
from shoal.eval.compare.compare import RunComparison, compare_runs
from shoal.eval.compare.page import comparison_text
from shoal.launch.cli import main, run_verb

EVAL: dict[str, Any] = {
    "tasks": ["knowledge_continuation", "reasoning_worked"],
    "limit": 5,
    "perplexity_tokens": 900,
    "speed": [1],
}


@pytest.fixture(scope="module")
def run_dir(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two layers fewer that was cut and scored. Read only."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = folder / "recipe.yaml"
    settings = {"model": str(teacher), "run_dir": str(folder / "run"), "prune": {"drop": [1, 3]}, "eval": EVAL}
    settings["dtype"] = "float32"
    recipe.write_text(yaml.safe_dump(settings))
    assert [run_verb(verb, str(recipe), []) for verb in ("prune", "eval")] == [0, 0]
    return folder / "run"


def compared(*words: object, out: Path) -> Path:
    """The folder of the scores of the one checkpoint among ``words``, after `shoal compare`."""
    with pytest.raises(SystemExit) as ended:
        main(["compare", *map(str, words), "--out", str(out)])
    assert ended.value.code == 0
    (folder,) = (out / "models").iterdir()
    return folder


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["compare", *map(str, words)])
    told = capsys.readouterr().err
    assert (ended.value.code, told.count("shoal: error: ")) == (2, 1)
    return told.partition("shoal: error: ")[2]


def rows(comparison: RunComparison) -> list[tuple[str, str, str | None]]:
    return [(model.contender.letter, model.role, model.rival) for model in comparison.models]


@pytest.mark.slow
def test_a_checkpoint_is_scored_as_the_run_was_and_once(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run's own student, given as a checkpoint, must get the run's own numbers."""
    student = shutil.copytree(run_dir / "student", tmp_path / "as_it_is")
    scores = compared(run_dir, student, out=tmp_path / "out")
    own, of_run = Scores.load(scores / "eval/model.json"), Scores.load(run_dir / "eval/pruned.json")
    assert own.tasks == of_run.tasks
    assert own.provenance.inputs == of_run.provenance.inputs
    assert (own.num_layers, own.num_bytes) == (4, of_run.num_bytes)
    assert Speed.load(scores / "eval/speed.json").roles.keys() == {"teacher", "model"}
    comparison = compare_runs([run_dir, scores])
    assert rows(comparison) == [("A", "teacher", None), ("A", "pruned", None), ("B", "model", "pruned")]
    assert comparison.models[-1].speed_ratio is not None
    assert "the same model" in comparison_text(comparison)
    written = (scores / "eval/model.json").stat().st_mtime_ns
    compared(run_dir, student, out=tmp_path / "out")
    assert "eval: done already" in capsys.readouterr().err
    assert (scores / "eval/model.json").stat().st_mtime_ns == written


@pytest.mark.slow
def test_a_model_of_another_tokenizer_is_compared_on_what_counts_no_tokens(run_dir: Path, tmp_path: Path) -> None:
    other = tiny_checkpoint(tmp_path, "qwen2", seed=3, max_position_embeddings=512)
    for file in other.glob("tokenizer*"):
        file.unlink()
    merging_tokenizer().save_pretrained(other)
    comparison = compare_runs([run_dir, compared(run_dir, other, out=tmp_path / "out")])
    assert [task.task for task in comparison.tasks] == ["knowledge_continuation"]
    assert any("perplexity is not compared: it is a mean per token" in reason for reason in comparison.left_out)
    assert comparison.models[2].cells[0].difference is not None


def test_what_cannot_stand_beside_is_refused_before_anything_is_scored(
    run_dir: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.eval.evaluate.role_evaluation", lambda *_, **__: pytest.fail("scored"))
    monkeypatch.chdir(tmp_path)
    assert "pass at least one run directory" in refusal(capsys, teacher, run_dir / "student")
    assert "no such run directory" in refusal(capsys, "misspelt", teacher)
    moved = shutil.copytree(run_dir, tmp_path / "moved")
    (moved / "recipe.yaml").unlink()
    assert "moved: neither a run directory (it has no recipe.yaml" in refusal(capsys, "moved", teacher)
