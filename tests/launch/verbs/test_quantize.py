"""Quantised copies in a run: made once, of what was cut and healed, scored beside it and against the teacher's.

The stand-in for the libraries halves the bytes, by bfloat16.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.draft import Drafts
from shoal.artifacts.evaluation import Evaluation, Quantized
from shoal.artifacts.training import Training
from shoal.compress.quantize import copy as copying
from shoal.compress.quantize import formats
from shoal.errors import UserError
from shoal.eval import draft
from shoal.eval import evaluate as evaluation
from shoal.eval.compare.compare import compare_runs
from shoal.eval.compare.figure import pareto_panels
from shoal.eval.report.findings import compare, read_run
from shoal.eval.report.report import write_report
from shoal.launch.verbs import distill, evaluate, export, prune
from shoal.launch.verbs.run import Run, open_run
from shoal.launch.workflows import preflight
from shoal.launch.workflows.dry_run import run_dry_run
from shoal.models.load import Checkpoint
from shoal.recipe.recipe import parse_recipe

EVAL = {
    "tasks": ["retrieval_continuation"],
    "limit": 8,
    "perplexity_tokens": 200,
    "sequence_length": 64,
    "speed": False,
}


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Name of the folder and format of everything that was quantised, by the stand-in."""
    caplog.set_level(logging.INFO, logger="shoal")
    calls: list[tuple[str, str]] = []

    def halve(source: Checkpoint, folder: Path, format: str, **_: Any) -> None:
        calls.append((source.folder.name, format))
        AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.bfloat16).save_pretrained(folder)

    monkeypatch.setattr(copying, "save_quantised", halve)
    monkeypatch.setattr(formats, "_is_installed", lambda _: True)
    monkeypatch.setattr(formats, "version", lambda _: "1.0")
    return calls


def run_of(teacher: Path, folder: Path, **settings: Any) -> Run:
    raw = {"model": str(teacher), "run_dir": str(folder / "run"), "prune": {"drop": [1, 3]}, "eval": EVAL}
    return open_run(parse_recipe({**raw, "quantize": {"format": "int8"}, **settings}))


def heal(run: Run, seed: int = 1) -> None:
    """A distilled model of the recipe, without training it."""
    shutil.copytree(run.dir / "student", run.dir / "distilled", dirs_exist_ok=True)
    tiny_model("llama", seed=seed, num_hidden_layers=4).save_pretrained(run.dir / "distilled")
    inputs = distill.training_inputs(run, prune.read_plan(run))
    Training(Provenance(inputs), 1, 64, 1.0, (), {}, {}, 1).write(run.dir / Training.FILE)


def test_copies_are_made_once_and_again_for_another_model(
    teacher: Path, tmp_path: Path, saved: list[tuple[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of(teacher, tmp_path)
    with pytest.raises(UserError, match=r"run: there is no student to quantise yet; run `shoal distill` first"):
        export.quantize(run)
    prune.prune(run)
    export.quantize(run)
    assert saved == [("student", "int8"), ("llama", "int8")]
    assert "pruned to int8" in caplog.text
    assert "which is not healed: `shoal distill` comes before this" in caplog.text
    made = Quantized.read(run.dir / "quantized" / Quantized.FILE)
    assert (made.source, made.format, made.library) == ("pruned", "int8", "torchao 1.0")
    assert 0.5 < made.num_bytes / made.source_bytes < 0.55
    assert list(evaluate.roles(run)) == ["teacher", "pruned", "quantized", "teacher_quantized"]
    assert list(evaluate.roles(run_of(teacher, tmp_path, quantize=None))) == ["teacher", "pruned"]
    export.quantize(run)
    assert len(saved) == 2
    caplog.clear()
    heal(run)
    with pytest.raises(
        UserError, match=r"quantized/quantize.json: belongs to another run: model .* Run `shoal quantize"
    ):
        evaluate.require_models_of_this_run(run, evaluate.roles(run))
    export.quantize(run)
    assert saved[2:] == [("distilled", "int8")]
    assert "not healed" not in caplog.text
    assert Quantized.read(run.dir / "quantized" / Quantized.FILE).source == "distilled"
    evaluate.require_models_of_this_run(run, evaluate.roles(run))


def test_only_what_a_format_reads_makes_its_copy_again(
    teacher: Path, tmp_path: Path, saved: list[tuple[str, str]]
) -> None:
    for settings in ({}, {"group_size": 32}, {"num_tokens": 9}, {"teacher_format": "nf4"}, {"teacher_format": "none"}):
        run = run_of(teacher, tmp_path, quantize={"format": "int8", **settings})
        prune.prune(run)
        export.quantize(run)
    assert saved == [("student", "int8"), ("llama", "int8"), ("llama", "nf4")]
    assert list(evaluate.roles(run)) == ["teacher", "pruned", "quantized"]
    asked = evaluate.quantized_inputs(run_of(teacher, tmp_path, quantize={"format": "w4a16_gptq"}), "quantized")
    assert asked.keys() == {
        *("model", "data", "seed", "quantize.format", "quantize.group_size", "quantize.num_tokens"),
        "distill.sequence_length",
    }


def test_calibration_text_is_the_training_text(teacher: Path, tmp_path: Path) -> None:
    own = {"data": ["docstrings", "teacher_text"], "sequence_length": 64}
    run = run_of(teacher, tmp_path, quantize={"format": "w4a16_gptq", "num_tokens": 200}, distill=own)
    assert export._calibration_rows(run).shape == (4, 64)
    alone = run_of(teacher, tmp_path, quantize={"format": "w4a16_gptq"}, distill={"data": ["teacher_text"]})
    with pytest.raises(
        UserError, match=r"distill.data holds no text but what the teacher writes; name a source beside"
    ):
        export._calibration_rows(alone)


@pytest.mark.slow
def test_copies_are_scored_and_paired_and_stand_in_report_and_comparison(
    teacher: Path, tmp_path: Path, saved: list[tuple[str, str]]
) -> None:
    run = run_of(teacher, tmp_path)
    prune.prune(run)
    heal(run)
    export.quantize(run)
    evaluate.evaluate(run)
    scored = {role: Evaluation.read(run.dir / "eval" / f"{role}.json") for role in evaluate.roles(run)}
    assert scored["quantized"].num_parameters == scored["distilled"].num_parameters
    assert scored["quantized"].num_bytes == Quantized.read(run.dir / "quantized" / Quantized.FILE).num_bytes
    result = read_run(run.dir)
    rows = {row.any_score.task: row for row in compare(result).rows}
    change = rows["perplexity"].differences["teacher_quantized", "quantized"]
    means = [
        next(s for s in scored[r].tasks if s.task == "perplexity").score for r in ("quantized", "teacher_quantized")
    ]
    assert change.difference == pytest.approx(means[0] - means[1])
    assert change.ci_low < change.difference < change.ci_high
    write_report(run.dir)
    text = (run.dir / "report.md").read_text()
    assert "## Quantised" in text
    assert "| quantized | distilled | int8 |" in text
    ratio = scored["quantized"].num_bytes / scored["teacher_quantized"].num_bytes
    assert f"At {ratio:.2f} times the bytes" in text
    assert "What quantising cost the student: quantized minus distilled" in text
    assert "The quantised student against the quantised teacher: quantized minus teacher_quantized" in text
    other = tmp_path / "other"
    shutil.copytree(run.dir, other)
    comparison = compare_runs([run.dir, other])
    assert {model.role for model in comparison.models} == set(scored)
    for row in pareto_panels(comparison):
        points = {point.role: point.cost for panel in row if panel.cost == "bytes" for point in panel.points}
        assert points["quantized"] == scored["quantized"].num_bytes


@pytest.mark.slow
def test_scores_of_the_copy_of_before_are_noticed_after_a_kill(
    teacher: Path, tmp_path: Path, saved: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies of the model before and after another training have the same number of bytes."""
    run = run_of(teacher, tmp_path, quantize={"format": "int8", "teacher_format": "none"})
    prune.prune(run)
    for seed in (1, 2):
        heal(run, seed)
        export.quantize(run)
        if seed == 1:
            evaluate.evaluate(run)
    scored = evaluation.role_evaluation

    def killed(role: str, *parts: Any, **settings: Any) -> Evaluation:
        if role == "quantized":
            raise KeyboardInterrupt
        return scored(role, *parts, **settings)

    monkeypatch.setattr(evaluation, "role_evaluation", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(run)
    with pytest.raises(UserError, match=r"eval/quantized.json: model is .* in .*/quantized/quantize.json"):
        read_run(run.dir)
    monkeypatch.undo()
    evaluate.evaluate(run)
    assert "quantized" in read_run(run.dir).evaluations


def test_copies_are_no_drafts(
    teacher: Path, tmp_path: Path, saved: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers does not load a GGUF file, and no speed of copies is measured that could tell whether one pays."""
    run, asked = run_of(teacher, tmp_path), list[str]()
    prune.prune(run)
    export.quantize(run)

    def measured(_: Checkpoint, drafts: dict[str, Checkpoint], *others: Any, **settings: Any) -> Drafts:
        asked.extend(drafts)
        return Drafts(Provenance({}), {})

    monkeypatch.setattr(draft, "measure_drafts", measured)
    evaluate._draft(run, evaluate._checkpoints(run, evaluate.roles(run)))
    assert asked == ["pruned"]


def test_formats_are_refused_before_any_work(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_is_installed", lambda module: module == "torchao")
    run = run_of(teacher, tmp_path, quantize={"format": "int8", "teacher_format": "nf4"})
    for refuse in (export.check_quantize, preflight.preflight, run_dry_run):
        with pytest.raises(UserError, match=r"^quantize.teacher_format: nf4 is made and loaded by bitsandbytes, which"):
            refuse(run)
    assert not run.dir.exists()
    with pytest.raises(UserError, match=r"the recipe does not say into which format; add for instance quantize.format"):
        export.check_quantize(run_of(teacher, tmp_path, quantize=None))


def test_formats_of_two_engines_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"quantize.teacher_format: q4_k_m is scored by llama.cpp and quantize.format in"
    ):
        run_of(tmp_path, tmp_path, quantize={"format": "int8", "teacher_format": "q4_k_m"})


@pytest.mark.slow
def test_a_dry_run_tells_of_the_copies(teacher: Path, tmp_path: Path, saved: list[tuple[str, str]]) -> None:
    run = run_of(teacher, tmp_path, distill={"num_tokens": 64, "sequence_length": 32})
    told = run_dry_run(run)
    assert "quantized: int8, teacher_quantized: int8" in told
    assert "teacher, pruned, distilled, quantized, teacher_quantized, each" in told
    prune.prune(run)
    heal(run)
    export.quantize(run)
    assert "quantize  done" in run_dry_run(run)


@pytest.mark.slow
def test_scores_of_another_engine_are_shown_and_never_paired(
    teacher: Path, tmp_path: Path, saved: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(teacher, tmp_path)
    prune.prune(run)
    export.quantize(run)
    evaluate.evaluate(run)
    for role in ("quantized", "teacher_quantized"):  # as a GGUF file's
        file = run.dir / "eval" / f"{role}.json"
        file.write_text(file.read_text().replace('"engine": "transformers"', '"engine": "llama.cpp"'))
    comparison = compare(read_run(run.dir))
    assert {role for row in comparison.rows for role in row.scores} == {"teacher", "pruned"}
    assert {pair for row in comparison.elsewhere for pair in row.differences} == {("teacher_quantized", "quantized")}
    assert not comparison.refused
    write_report(run.dir)
    text = (run.dir / "report.md").read_text()
    assert "quantized and teacher_quantized were scored by llama.cpp, all else by transformers" in text
    assert "What quantising cost" not in text
    other = tmp_path / "other"
    shutil.copytree(run.dir, other)
    table = compare_runs([run.dir, other])
    assert {model.role for model in table.models} == {"teacher", "pruned"}
    assert "A's quantized is left out: another engine scored it, with which nothing pairs." in table.notes
