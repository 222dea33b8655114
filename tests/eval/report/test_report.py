"""The report says what the results allow and no more, works after any stage, and is safe to pass on.

Covers: shoal.eval.report.tables, shoal.eval.report.wording.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from cases import cases
from html_page import Page
from results import NUM_LAYERS, QUICKSTART, SKILL, choice, evaluation, importance, write_run

from shoal.artifacts.evaluation import TaskScore
from shoal.compress.sweeps.atlas import build_atlas
from shoal.errors import UserError
from shoal.eval.harness.rates import with_rates
from shoal.eval.report.findings import compare, protocol_gaps
from shoal.eval.report.report import write_report
from shoal.eval.report.run import read_run
from shoal.eval.report.tables import MOST_FLIPS
from shoal.stats.paired import paired


@pytest.mark.slow
def test_a_swept_run_shows_its_atlas(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    scores = {role: [choice(role, "retrieval", "retrieval", "continuation")] for role in SKILL}
    removed = [scores["pruned"], scores["distilled"]] * (NUM_LAYERS // 2)
    replace(importance(), atlas=build_atlas(scores["teacher"], removed)).save(folder / "importance.json")
    text = write_report(folder).read_text()
    assert "Ablation of every layer, by ability and protocol" in text
    assert (folder / "figures/atlas.png").stat().st_size > 1000


def test_tasks_at_chance_are_listed_and_not_hidden(report: tuple[Page, str, Path]) -> None:
    page, markdown, _ = report
    section = markdown.split("## Teacher near chance")[1].split("\n## ")[0]
    assert "reasoning, generated" in section
    assert "retrieval, option text" not in section
    assert "reasoning, generated" in markdown.split("## Teacher near chance")[0]
    assert "Teacher near chance" in page.words


def test_protocol_gap_is_share_kept_by_likelihood_minus_generation(report: tuple[Page, str, Path]) -> None:
    rows = compare(read_run(report[2])).rows
    ((likely, written, gap),) = protocol_gaps(rows, "pruned")
    first, second = likely.retained["pruned"].value, written.retained["pruned"].value
    assert first is not None
    assert second is not None
    assert (likely.key[1], written.key[1]) == ("continuation", "generation")
    assert gap[0] == pytest.approx(first - second)


def test_flips_show_both_texts_and_their_counts(report: tuple[Page, str, Path]) -> None:
    page, markdown, folder = report
    row = next(row for row in compare(read_run(folder)).rows if row.key[0] == "retrieval_continuation")
    won = paired(row.scores["pruned"], row.scores["distilled"]).won
    assert won > MOST_FLIPS
    assert f"retrieval, option text: {won} items recovered by distillation" in page.words
    assert "retrieval\\_continuation" not in markdown  # inside a word it is no markup
    assert f"retrieval, option text: {won} items recovered by distillation, {MOST_FLIPS} shown" in markdown
    assert "pruned answered so" in page.words
    assert len(page.all("details")) > 3


@pytest.mark.slow
def test_no_secret_of_settings_or_environment_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_" + "s" * 34
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setenv("SOME_PASSWORD", "pass-in-environment")
    trainer = {"optim_args": f"use {secret}", "per_device_train_batch_size": 2}
    write_run(tmp_path, recipe={"distill": {"num_tokens": 4321, "trainer": trainer}})
    write_report(tmp_path)
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text()
        assert secret not in text
        assert "pass-in-environment" not in text
        assert "num_tokens: 4321" in text
        assert "per_device_train_batch_size: 2" in text


@pytest.mark.slow
@pytest.mark.parametrize(("kept", "said"), cases(__file__).items())
def test_report_works_after_any_single_stage(tmp_path: Path, kept: str, said: str) -> None:
    write_run(tmp_path / "whole")
    target = tmp_path / "part" / kept
    target.parent.mkdir(parents=True)
    for file in (tmp_path / "whole" / kept).parent.glob(f"{target.stem}.*json*"):
        shutil.copy(file, target.parent)
    page = Page(write_report(tmp_path / "part").read_text())
    assert page.crossed == []
    assert said in page.words


def test_report_refuses_a_folder_without_results(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no result to report"):
        write_report(tmp_path)
    for text, message in (("{", "is not valid JSON"), ("[]", "must be a mapping of settings, got list")):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(UserError, match=rf"run\.json: {message}"):
            write_report(tmp_path)


@pytest.mark.slow
def test_report_repeats_byte_for_byte(tmp_path: Path) -> None:
    write_run(tmp_path)
    first = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == first


def climbing(role: str, level: int) -> TaskScore:
    """A task of a family that gets harder, every item of which knows how its text went."""
    share = 0.9 if level == 1 else 0.5 if level == 2 else 0.02
    task = choice(role, f"track_{level}", "reasoning", "generation", chance=0.0, share=share)
    rates = {"malformed": float(role == "pruned"), "repetition": 0.0, "cut_off": 0.0, "tokens": 12.0}
    items = tuple(replace(item, rates=rates, question=f"What is {item.id}?") for item in task.items)
    return with_rates(replace(task, family="track", level=float(level), items=items))


@pytest.mark.slow
def test_levels_rates_and_questions_are_told(tmp_path: Path) -> None:
    for role in SKILL:
        evaluation(role, tuple(climbing(role, level) for level in (1, 2, 3))).save(tmp_path / "eval" / f"{role}.json")
    page = Page(write_report(tmp_path).read_text())
    assert "Track, generated, levels 1 to 3: clearly above chance are teacher up to 2" in page.words
    assert (tmp_path / "figures/levels.png").stat().st_size > 1000
    assert "Without a readable answer 0.0 % [0.0, 3.7] 100.0 % [96.3, 100.0] 0.0 % [0.0, 3.7]" in page.words
    assert "Many texts of the pruned model have no readable answer." in page.words
    told = "Without a readable answer, which counts as wrong: pruned 100 % on track 1 (generated) and 100 % on"
    assert told in page.words
    assert "Question What is track_1-" in page.words
    assert "question" in (tmp_path / "report.md").read_text()


def test_readers_see_words_and_find_identifiers_in_the_appendix(quickstart: tuple[Page, str, Path]) -> None:
    page, markdown, folder = quickstart
    names = [task[0] for task in QUICKSTART] + ["reasoning_worked"]
    seen = re.sub(r"^```.*?^```$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    before, appendix = seen.split("**Tasks by their names**")
    figures = "".join(file.read_text() for file in (folder / "figures").glob("*.svg"))
    for name in names:
        assert not re.search(rf"{name}(?!-\d)", before), name
        assert f"| {name} |" in appendix
        assert name not in figures
    titles = [attributes["title"] for attributes in page.all("th") if "title" in attributes]
    assert "retrieval_generation, generation, match" in titles
    assert "retrieval, generated" in page.words
