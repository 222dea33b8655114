"""What a reader sees first claims what tests show and no more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from html_page import Page
from results import choice, evaluation, plan
from told_report import told

from shoal.artifacts.evaluation import ItemScore, TaskScore
from shoal.artifacts.plan import PlannedChange
from shoal.eval.harness.samples import with_interval
from shoal.eval.report.findings import compare
from shoal.eval.report.headline import facts, headline
from shoal.eval.report.report import write_report
from shoal.eval.report.run import read_run


def test_headline_claims_only_what_the_tests_show(report: tuple[Page, str, Path]) -> None:
    run = read_run(report[2])
    text = " ".join(headline(run, compare(run)))
    assert "3 of the 8 decoder layers" in text
    assert "Cutting made all 3 scores worse" in text
    assert "Distilling made all 3 scores better than those of the cut model" in text
    assert "One task is left out" in text


def test_the_speed_at_a_glance_has_the_range_of_its_rounds(report: tuple[Page, str, Path]) -> None:
    run = read_run(report[2])
    assert run.speed is not None
    noisy = {
        role: replace(run.speed.roles[role], decode_tokens_per_s=median, samples={"decode": samples})
        for role, median, samples in (("teacher", 10.0, (8.0, 10.0, 16.0)), ("distilled", 12.0, (12.0, 14.0, 8.0)))
    }
    glance = facts(replace(run, speed=replace(run.speed, roles=noisy)))
    assert ("1.20 ×", "decoding speed (single rounds: 0.50 to 1.50 ×)") in glance


@pytest.mark.parametrize(
    ("drop", "said"),
    [
        ((), "Changed in the model: attention 3 silent and layer 5 swapped."),
        (
            (2,),
            "1 of the 8 decoder layers of the model was cut out (layer 2, counted from 0). "
            "Changed: attention 3 silent and layer 5 swapped.",
        ),
    ],
)
def test_changes_are_told(tmp_path: Path, drop: tuple[int, ...], said: str) -> None:
    changes = PlannedChange("skip", "attention 3 silent", (3,)), PlannedChange("swap", "layer 5 swapped", (5,))
    plan(drop, changes).save(tmp_path / "plan.json")
    run = read_run(tmp_path)
    assert headline(run, compare(run))[0] == said
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "attention 3 silent" in page
    assert ("Cut: layers" in page) == bool(drop)


def test_a_verdict_that_many_comparisons_could_bring_about_is_not_said(tmp_path: Path) -> None:
    """Lost on 9 items and won on 1 is clear alone (p = 0.02), not among ten tasks without any change."""

    def task(number: int, lost: range) -> TaskScore:
        items = tuple(ItemScore(str(i), float(i % 4 > 0 and i not in lost), "a", "a") for i in range(200))
        made = replace(choice("teacher", f"task_{number}", f"skill {number}", "continuation"), items=items, n=200)
        return with_interval(replace(made, score=sum(item.score for item in items) / 200))

    for count, worse, said in ((1, 1, "task 0 (option text) worse"), (10, 0, "0 of 10 scores worse")):
        for role, lost in (("teacher", range(3, 4)), ("pruned", range(101, 112))):
            tasks = tuple(task(number, lost if number == 0 else range(0)) for number in range(count))
            evaluation(role, tasks).save(tmp_path / "eval" / f"{role}.json")
        text = told(tmp_path)
        assert f"Cutting made {said}" in text
        assert text.count("▼ worse") == worse
        # the interval of that task leaves out 0 alone; where nothing changed it is wider than it has to be
        assert text.count("○ not clear by the corrected test") == (count == 10)
        assert text.count("○ no clear change") == text.count(", few changed") == count - 1
        assert ("“Few changed”: fewer than 5 answers did" in text) == (count == 10)
        assert "hold the truth in 92 to 100 of 100 cases" not in text, "there are 200 items"


@pytest.mark.slow
def test_the_report_opens_with_what_was_lost_and_what_came_back_in_numbers(quickstart: tuple[Page, str, Path]) -> None:
    opening = quickstart[1].split("\n## ")[0].replace("\\", "")
    for line in (
        "| retrieval, generated | 64 % [54, 73] | 22 % [15, 31] | 98 % [93, 99] | ▼ −42 points [−51, −31] | ▲ +76",
        "| retrieval, option text | 98 % [93, 99] | 66 % [56, 75] | 98 % [93, 99] | ▼ −32 points",
        "| knowledge, generated | 38 % [29, 48] | 1 % [0, 5] | 47 % [38, 57] |",
        "| reasoning, one step, option text | 48 % [38, 58] | 35 % [26, 45] | 46 % [37, 56] |",
        "| perplexity, running text, lower is better | 12.9 [11.4, 14.3] | 31.5 [28.0, 35.1] | 17.3 [15.7, 18.9] |",
        "no clear change [−5, +1]",
    ):
        assert line in opening
    assert "lettered options" not in opening, "the teacher is at chance there, so nothing was lost"
    assert quickstart[0].words.index("64 %") < quickstart[0].words.index("Read with care")
