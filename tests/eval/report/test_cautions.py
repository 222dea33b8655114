"""What weakens a result is said before it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from html_page import Page
from results import (
    DROP,
    choice,
    evaluation,
    plan,
    training,
    write_quickstart,
    write_run,
)
from told_report import told

from shoal.artifacts.plan import ClosedGap, PruningPlan
from shoal.artifacts.width import KeptWidth
from shoal.eval.report.cautions import cautions_section
from shoal.eval.report.findings import Comparison, Run, compare, read_run


def test_scores_of_other_settings_are_left_out_by_name(tmp_path: Path) -> None:
    write_run(tmp_path)
    other = choice("distilled", "retrieval_continuation", "retrieval", "continuation", num_fewshot=5)
    evaluation("distilled", tasks=(other,)).write(tmp_path / "eval" / "distilled.json")
    run = read_run(tmp_path)
    comparison = compare(run)
    row = next(row for row in comparison.rows if row.key[0] == "retrieval_continuation")
    assert "distilled" not in row.scores
    assert "num_fewshot is 0 in one evaluation and 5 in the other" in comparison.refused[0]
    assert "because settings differ" in told(tmp_path)


def test_an_evaluation_of_another_plan_is_pointed_out(tmp_path: Path) -> None:
    write_run(tmp_path)
    plan(DROP[:1]).write(tmp_path / "plan.json")
    assert "it belongs to another plan" in told(tmp_path)


EVERY_TASK = {task.task: 0 for task in evaluation("teacher").tasks}


def read(source: str, **found: int) -> dict:
    """What distill.json says of its data: one source, and how many items of which task were found in it."""
    overlap = {task: {"items": 10, "compared": 9, "found": count, "examples": []} for task, count in found.items()}
    searched = {"overlap": overlap, "tokens_searched_for_overlap": 5000} if found else {}
    return {"sources": {source: {"tokens": 1}}, **searched}


@pytest.mark.parametrize(
    ("data", "tasks", "said"),
    [
        (read("python_docs"), None, "Training and evaluation items are disjoint"),
        (read("my.jsonl"), None, "It was not checked whether training text and evaluation items overlap"),
        (read("python_docs_heldout"), None, "which is evaluation text"),
        (read("python_docs"), "mmlu", "overlap for: MMLU, option text"),
        (
            read("my.jsonl", **EVERY_TASK),
            None,
            f"No evaluation item of {len(EVERY_TASK)} tasks was found in the first 5,000 tokens of the training",
        ),
        (read("my.jsonl", mmlu=0), "gsm8k", "overlap for: GSM8K, option text"),  # evaluated after the search
        (read("python_docs", mmlu=0), "gsm8k", "overlap for: GSM8K, option text"),
        (read("python_docs", mmlu=0), "knowledge_continuation", "No evaluation item of 1 tasks was found"),
        (read("my.jsonl", mmlu=0), "knowledge_continuation", "overlap for: knowledge, option text"),
        (read("python_docs"), "wikitext2_rolling", "overlap for: "),
        (
            read("my.jsonl", mmlu=0, gsm8k=3),
            None,
            "first 5,000 tokens of the training text, by 13 words in succession: 3 of 9",
        ),
    ],
)
def test_overlap_of_training_and_evaluation_is_stated(
    tmp_path: Path, data: dict, tasks: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path)
    replace(training(), data=data).write(tmp_path / "distill.json")
    if tasks:
        own = (choice("teacher", tasks, "knowledge", "continuation"),)
        evaluation("teacher", tasks=own).write(tmp_path / "eval" / "teacher.json")
    assert said in told(tmp_path)


def compensated(text: dict) -> PruningPlan:
    """A plan whose gap was closed after ``text``."""
    return replace(plan(), gaps=(ClosedGap(DROP[0], DROP[-1], 1.2, False, 1, 1, 1, 1),), text=text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (read("python_docs"), None),
        (read("my.jsonl"), "It was not checked whether compensation text and evaluation items overlap for: my.jsonl"),
        (read("python_docs_heldout"), "Compensation was fitted to python_docs_heldout, which is evaluation text"),
        (read("my.jsonl", **EVERY_TASK), None),
        (read("my.jsonl", mmlu=2), "in the first 5,000 tokens of the text of prune.compensate, by 13 words in"),
    ],
)
def test_overlap_of_compensation_and_evaluation_is_a_caution(tmp_path: Path, text: dict, said: str | None) -> None:
    write_run(tmp_path)
    replace(training(), data=read("python_docs")).write(tmp_path / "distill.json")
    before = told(tmp_path)
    compensated(text).write(tmp_path / "plan.json")
    after = told(tmp_path)
    assert said is None or said in after
    assert said is None or said not in before
    assert ("of compensation and evaluation" in after) == (said is not None)
    replace(compensated(text), gaps=()).write(tmp_path / "plan.json")
    assert said is None or said not in told(tmp_path), "what stayed open was not fitted to any text"
    replace(compensated(text), gaps=(), width=KeptWidth(kv_groups=1)).write(tmp_path / "plan.json")
    wide = told(tmp_path)
    assert ("of calibration and evaluation" in wide) == (said is not None)
    assert ("the text of prune.width" in wide) == (said is not None and "the text of" in said)


def test_cautions_come_first_and_say_where_nothing_was_found(report: tuple[Page, str, Path]) -> None:
    titles = re.findall(r"^## (.*)$", report[1], flags=re.MULTILINE)
    assert titles[:2] == ["Read with care", "Before and after"]
    section = report[1].split("## Read with care")[1].split("\n## ")[0]
    told = "The intact teacher is not 3 standard errors above chance on reasoning (generated)."
    assert f"**At chance from the start.** {told}" in section
    nothing = cautions_section(*nothing_to_say())
    assert "Nothing was found" in str(nothing)


def nothing_to_say() -> tuple[Run, Comparison]:
    tasks = {
        role: tuple(choice(role, f"retrieval_{how}", "retrieval", how) for how in ("continuation", "generation"))
        for role in ("teacher", "pruned")
    }
    run = Run(Path(), None, {}, None, None, None, {role: evaluation(role, own) for role, own in tasks.items()}, None)
    return run, compare(run)


def test_machines_and_versions_that_differ_are_a_caution(tmp_path: Path) -> None:
    write_run(tmp_path)
    other = evaluation("distilled")
    environment = {**other.provenance.environment, "torch": "2.12.0"}
    replace(other, provenance=replace(other.provenance, environment=environment)).write(
        tmp_path / "eval/distilled.json"
    )
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
    assert said in str(cautions_section(run, compare(run)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ({"ability_texts": {"tokens": 5}}, "Its training text has that form, with other items."),
        ({"my.jsonl": {"tokens": 5}}, "Whether its training text has that form is not known here."),
    ],
)
def test_a_distilled_model_that_beats_its_teacher_may_have_learnt_the_form(
    tmp_path: Path, sources: dict, said: str
) -> None:
    write_quickstart(tmp_path)
    replace(training(), data={"sources": sources}).write(tmp_path / "distill.json")
    text = told(tmp_path)
    assert "The distilled model beats its teacher on 3 scores: it may have learnt the form of the questions." in text
    assert f"knowledge (generated) and reasoning (worked answers). {said}" in text
    assert "what is more than the teacher has is no share of it, see “Read with care”" in text
    write_run(tmp_path / "worse")
    assert "beats its teacher" not in told(tmp_path / "worse")


def test_the_precision_is_told_where_the_run_has_it_recorded(tmp_path: Path) -> None:
    write_run(tmp_path)
    assert "Numeric precision" not in told(tmp_path)
    story = json.loads((tmp_path / "run.json").read_text())
    why = "bfloat16 is 60 times slower on this processor."
    story["numerics"] = {"dtype": "float32", "precision": "float32", "reason": why, "device": "some CPU"}
    (tmp_path / "run.json").write_text(json.dumps(story))
    settings = told(tmp_path).split("## Exact settings and versions")[1]
    line = "models are measured and evaluated in float32 and training computes in float32, on some CPU: bfloat16 is 60"
    assert f"Numeric precision: {line} times slower on this processor.\n" in settings
    story["numerics"] |= {"precision": "auto", "size": 0.5, "size_reason": "half of the tokens, as this is slow"}
    (tmp_path / "run.json").write_text(json.dumps(story))
    text = told(tmp_path)
    assert "training computes as DeepSpeed is configured, on some CPU" in text
    assert "on this processor. Sizes: half of the tokens, as this is slow.\n" in text
