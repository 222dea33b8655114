"""What a reader sees first claims what tests show and no more.

Covers: shoal.stats.means.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from cases import cases
from html_page import Page
from results import choice, counted, evaluation, plan, write_formed
from told_report import told

from shoal.artifacts.evaluation import ItemScore, TaskScore
from shoal.artifacts.plan import PlannedChange
from shoal.eval.harness.samples import with_interval
from shoal.eval.report.findings import compare
from shoal.eval.report.headline import Shares, facts, headline
from shoal.eval.report.report import write_report
from shoal.eval.report.run import read_run
from shoal.task_words import OUTSIDE

CASES = cases(__file__)


def test_five_sentences_say_what_was_lost_came_back_and_is_still_lost(tmp_path: Path) -> None:
    run = read_run(write_formed(tmp_path))
    cut, lost, back, missing, follows = headline(run, compare(run))
    assert cut.startswith("6 of the 30 decoder layers of demo:smollm2-135m were dropped (layers 12 to 14, 21, 25, 26, ")
    assert lost == (
        "Before training, the pruned model keeps 48 % [40, 56] of the teacher's score above chance (mean of 4 tasks "
        "outside the trained wording), least on retrieval, reworded, generated (20 % [7, 36])."
    )
    assert back.endswith(" distilled model keeps 68 % [60, 76]; the share kept rose by +20 points [+15, +26].")
    assert missing == "Still lost: the control (the teacher after the same training) is +33 points [+26, +42] ahead."
    assert follows.startswith("Train longer, or drop fewer layers: clearly worse than the teacher on retrieval (rewo")


def test_a_run_that_max_minutes_made_smaller_says_so_first(tmp_path: Path) -> None:
    run = replace(read_run(write_formed(tmp_path)), numerics={"size": 0.2})
    assert headline(run, compare(run))[0].startswith("Short run: only 20 % of its recipe's tokens and items.")


def test_a_mean_share_is_that_of_its_tasks(tmp_path: Path) -> None:
    """Against means by hand; tasks of different abilities share no items."""
    run = read_run(write_formed(tmp_path))
    rows = [row for row in compare(run).rows if row.column in OUTSIDE and row.retained["pruned"].value is not None]
    shares = Shares.of(rows)
    for role, kept in shares.kept.items():
        by_hand = [
            (row.scores[role].score - row.any_score.chance) / (row.scores["teacher"].score - row.any_score.chance)
            for row in rows
        ]
        assert kept.value == pytest.approx(sum(by_hand) / len(by_hand))
    change = shares.changes["pruned", "distilled"]
    assert change.value == pytest.approx(shares.kept["distilled"].value - shares.kept["pruned"].value)


def test_a_role_that_was_asked_otherwise_is_not_called_chance(tmp_path: Path) -> None:
    for role, version in (("teacher", "1"), ("pruned", "1"), ("distilled", "2")):
        task = replace(counted(role, "arc", "arc", "continuation", 0.25, 1000, 700), version=version)
        evaluation(role, (task,)).save(tmp_path / "eval" / f"{role}.json")
    told = headline(run := read_run(tmp_path), compare(run))[-1]
    assert told.startswith("Not enough data: no task has comparable scores of all models; run `shoal eval` again")


@pytest.mark.parametrize(("n", "right", "column", "begins"), CASES["decisions"])
def test_what_follows_is_said_by_rules(tmp_path: Path, n: int, right: dict[str, int], column: str, begins: str) -> None:
    for role, count in right.items():
        task = replace(counted(role, "arc_easy_continuation", "arc", "continuation", 0.25, n, count), column=column)
        made = evaluation("teacher" if role == "control" else role, (task,))
        replace(made, role=role).save(tmp_path / "eval" / f"{role}.json")
    write_report(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["headline"][-1].startswith(begins)
    assert results["decision"] == begins.partition(":")[0].lower()
    assert len(results["headline"]) <= 5


def test_a_control_that_lacks_a_task_still_counts_where_it_was_asked(tmp_path: Path) -> None:
    """Scoring one role anew, with other tasks, is no other run."""
    for role, count in {"teacher": 1500, "pruned": 1000, "distilled": 1500, "control": 1900}.items():
        tasks = [
            replace(counted(role, name, name, "continuation", 0.25, 2000, count), column="public")
            for name in ("arc", "boolq")
        ]
        made = evaluation("teacher" if role == "control" else role, tuple(tasks[: 1 if role == "control" else 2]))
        replace(made, role=role).save(tmp_path / "eval" / f"{role}.json")
    told = headline(run := read_run(tmp_path), compare(run))
    assert "mean of 2 tasks outside" in told[1]
    assert told[3].startswith("Still lost: the control (the teacher after the same training) is +40 points")
    assert "the control has clearly more" in told[4]


def test_the_speed_at_a_glance_has_the_range_of_its_rounds(report: tuple[Page, str, Path]) -> None:
    run = read_run(report[2])
    assert run.speed is not None
    noisy = {
        role: replace(run.speed.roles[role], decode_tokens_per_s=median, samples={"decode": samples})
        for role, median, samples in (("teacher", 10.0, (8.0, 10.0, 16.0)), ("distilled", 12.0, (12.0, 14.0, 8.0)))
    }
    glance = facts(replace(run, speed=replace(run.speed, roles=noisy)))
    assert ("1.20 ×", "decoding speed (timing rounds: 0.50 to 1.50 ×)") in glance


@pytest.mark.parametrize(
    ("drop", "said"),
    [
        ((), "Changed in the model: attention 3 silent and layer 5 swapped."),
        (
            (2,),
            "1 of the 8 decoder layers of the model was dropped (layer 2, counted from 0). "
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
    assert ("Dropped: layers" in page) == bool(drop)


def test_a_verdict_that_many_comparisons_could_bring_about_is_not_said(tmp_path: Path) -> None:
    """Lost on 9 items and won on 1 is clear alone (p = 0.02), not among ten tasks without any change."""

    def task(number: int, lost: range) -> TaskScore:
        items = tuple(ItemScore(str(i), float(i % 4 > 0 and i not in lost), "a", "a") for i in range(200))
        made = replace(choice("teacher", f"task_{number}", f"skill {number}", "continuation"), items=items, n=200)
        return with_interval(replace(made, score=sum(item.score for item in items) / 200))

    for count, worse in ((1, 1), (10, 0)):
        for role, lost in (("teacher", range(3, 4)), ("pruned", range(101, 112))):
            tasks = tuple(task(number, lost if number == 0 else range(0)) for number in range(count))
            evaluation(role, tasks).save(tmp_path / "eval" / f"{role}.json")
        text = told(tmp_path)
        assert text.count("▼ worse") == worse
        # the interval of that task leaves out 0 alone; where nothing changed it is wider than it has to be
        assert text.count("○ likely but not confirmed") == text.count("| likely but not confirmed \\[") == (count == 10)
        assert ("“Likely but not confirmed”: the interval excludes 0, but p ≥ 0.05" in text) == (count == 10)
        assert text.count("○ no clear change") == text.count(", few changed") == count - 1
        assert ("“Few changed”: fewer than 5 answers changed" in text) == (count == 10)
        assert "contain the true value in 92 to 100 %" not in text, "there are 200 items"


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
