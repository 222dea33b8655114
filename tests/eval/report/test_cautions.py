"""What weakens a result is said before it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from html_page import Page
from results import choice, evaluation, training, write_quickstart, write_run
from told_report import told

from shoal.eval.report.card import model_card
from shoal.eval.report.cautions import cautions
from shoal.eval.report.findings import Comparison, compare
from shoal.eval.report.page import render
from shoal.eval.report.report import contents
from shoal.eval.report.run import Run, read_run


def test_scores_of_other_settings_are_left_out_by_name(tmp_path: Path) -> None:
    write_run(tmp_path)
    other = choice("distilled", "retrieval_continuation", "retrieval", "continuation", num_fewshot=5)
    evaluation("distilled", tasks=(other,)).save(tmp_path / "eval" / "distilled.json")
    run = read_run(tmp_path)
    comparison = compare(run)
    row = next(row for row in comparison.rows if row.key[0] == "retrieval_continuation")
    assert "distilled" not in row.scores
    assert "num_fewshot is 0 in one evaluation and 5 in the other" in comparison.refused[0]
    assert "because the settings differ" in told(tmp_path)


EVERY_TASK = {task.task: 0 for task in evaluation("teacher").tasks}


def read(source: str, **found: int) -> dict:
    """What distill.json says of its data: one source, and how many items of which task were found in it."""
    overlap = {task: {"items": 10, "compared": 9, "found": count, "examples": []} for task, count in found.items()}
    searched = {"overlap": overlap, "tokens_searched_for_overlap": 5000} if found else {}
    return {"sources": {source: {"tokens": 1}}, **searched}


@pytest.mark.parametrize(
    ("data", "tasks", "said"),
    [
        (read("python_docs"), None, "Training and evaluation share no items"),
        (read("my.jsonl"), None, "Not checked for overlap of training text and evaluation items"),
        (read("python_docs_heldout"), None, "which is evaluation text, is part of the training text"),
        (read("python_docs"), "mmlu", "evaluation items: MMLU, option text"),
        (
            read("my.jsonl", **EVERY_TASK),
            None,
            f"No evaluation item of {len(EVERY_TASK)} tasks occurs in the first 5,000 tokens of the training",
        ),
        (read("my.jsonl", mmlu=0), "gsm8k", "evaluation items: GSM8K, option text"),  # evaluated after the search
        (read("python_docs", mmlu=0), "gsm8k", "evaluation items: GSM8K, option text"),
        (read("python_docs", mmlu=0), "knowledge_continuation", "No evaluation item of 1 tasks occurs"),
        (read("my.jsonl", mmlu=0), "knowledge_continuation", "evaluation items: knowledge, option text"),
        (read("python_docs"), "wikitext2_rolling", "and evaluation items: "),
        (read("my.jsonl", mmlu=0, gsm8k=3), None, "tokens of the training text (13 equal words in a row): 3 of 9"),
    ],
)
def test_overlap_of_training_and_evaluation_is_stated(
    tmp_path: Path, data: dict, tasks: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path)
    replace(training(), data=data).save(tmp_path / "distill.json")
    if tasks:
        own = (choice("teacher", tasks, "knowledge", "continuation"),)
        evaluation("teacher", tasks=own).save(tmp_path / "eval" / "teacher.json")
    assert said in told(tmp_path)


def test_cautions_come_first_and_say_where_nothing_was_found(report: tuple[Page, str, Path]) -> None:
    titles = re.findall(r"^## (.*)$", report[1], flags=re.MULTILINE)
    assert titles[:2] == ["Read with care", "Before and after"]
    section = report[1].split("## Read with care")[1].split("\n## ")[0]
    told = "The teacher is not 3 standard errors above chance on reasoning (generated)."
    assert f"**At chance from the start.** {told}" in section
    run, comparison = nothing_to_say()
    assert cautions(run, comparison) == ()
    assert "No problem was found" in render("report", "md", **contents(run, comparison, {}))


@pytest.mark.parametrize(("n", "is_said"), [(49, True), (50, False)])
def test_so_few_items_that_intervals_are_no_95_percent_are_a_caution_of_report_and_card(
    tmp_path: Path, n: int, is_said: bool
) -> None:
    write_run(tmp_path)
    for role in ("teacher", "pruned", "distilled"):
        own = choice(role, "retrieval_continuation", "retrieval", "continuation", n=n)
        evaluation(role, (own,)).save(tmp_path / "eval" / f"{role}.json")
    said = "Fewer than 50 items, so the intervals are wide and contain the true value in 92 to 100 % of cases, not in"
    assert (said in told(tmp_path)) == (said in " ".join(model_card(tmp_path).split())) == is_said


def nothing_to_say() -> tuple[Run, Comparison]:
    tasks = {
        role: tuple(choice(role, f"retrieval_{how}", "retrieval", how) for how in ("continuation", "generation"))
        for role in ("teacher", "pruned")
    }
    run = Run(Path(), None, None, None, None, {role: evaluation(role, own) for role, own in tasks.items()}, None)
    return run, compare(run)


def test_machines_and_versions_that_differ_are_a_caution(tmp_path: Path) -> None:
    write_run(tmp_path)
    other = evaluation("distilled")
    environment = {**other.provenance.environment, "torch": "2.12.0"}
    replace(other, provenance=replace(other.provenance, environment=environment)).save(tmp_path / "eval/distilled.json")
    text = told(tmp_path)
    assert (
        "The models were not scored with the same torch. torch: 2.13.0 for teacher, 2.13.0 for pruned, 2.12.0" in text
    )


def test_a_likelihood_score_that_hides_damage_is_a_caution() -> None:
    run, _ = nothing_to_say()
    said_well = choice("teacher", "retrieval_continuation", "retrieval", "continuation")
    pruned = (said_well, run.evaluations["pruned"].tasks[1])
    run = replace(run, evaluations={**run.evaluations, "pruned": evaluation("pruned", pruned)})
    said = "The pruned model keeps 100 % of retrieval (option text), but"
    assert said in str(cautions(run, compare(run)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ({"ability_texts": {"tokens": 5}}, "Its training text has this wording, with other items."),
        ({"my.jsonl": {"tokens": 5}}, "It is not known whether its training text has this wording"),
    ],
)
def test_a_distilled_model_that_beats_its_teacher_may_have_learnt_the_form(
    tmp_path: Path, sources: dict, said: str
) -> None:
    write_quickstart(tmp_path)
    replace(training(), data={"sources": sources}).save(tmp_path / "distill.json")
    text = told(tmp_path)
    assert "The distilled model beats its teacher on 3 scores: it may have learnt the wording of the questions." in text
    assert f"knowledge (generated) and reasoning (worked answers). {said}" in text
    assert "scores above the teacher have no share, see “Read with care”" in text
    write_run(tmp_path / "worse")
    assert "beats its teacher" not in told(tmp_path / "worse")
