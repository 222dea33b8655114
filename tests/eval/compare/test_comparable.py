"""What may share a table: only what was measured alike, by one teacher, on tasks that all runs have."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from compared_runs import Change, cell_of, nats, scored, tasks, write_run
from html_page import Page

from shoal.artifacts.evaluation import Scores
from shoal.errors import UserError
from shoal.eval.compare.compare import compare_runs, content_of
from shoal.eval.compare.page import comparison_text, write_comparison


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda task: scored(replace(task, items=task.items[: len(task.items) // 2])), "n is 100 in one .* and 50 in"),
        (lambda task: replace(task, version="2.0"), "version is '1.0' in one evaluation and '2.0'"),
        (lambda task: replace(task, num_fewshot=5), "num_fewshot is 0 in one evaluation and 5"),
        (lambda task: replace(task, engine="vllm"), "engine is 'transformers' in one evaluation and 'vllm'"),
        (lambda task: replace(task, matching=2), "matching is 1 in one evaluation and 2"),
    ],
)
def test_scores_of_another_measurement_are_refused(tmp_path: Path, change: Change, message: str) -> None:
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", change=change)
    with pytest.raises(UserError) as refused:
        compare_runs([one, other])
    lines = str(refused.value).split("\n")
    assert lines[0] == "compare: these runs cannot stand in one table"
    told = f"{other}/eval/teacher.json and {one}/eval/teacher.json: task 'retrieval_continuation': "
    assert re.match(f"{re.escape(told)}{message}", lines[1])
    assert lines[-1].startswith("Run `shoal eval` with the same settings in all of them")


@pytest.mark.slow
def test_runs_in_different_precision_share_a_page_that_says_so(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one")
    other = write_run(tmp_path / "other", inputs={"dtype": "float32"}, distilled=0.5, layers=4)
    comparison = compare_runs([one, other])
    said = "The runs were scored in different precisions: A in bfloat16, B in float32."
    text = comparison_text(comparison)
    assert said in text
    assert "B distilled against A distilled, in another precision: worse on" in text
    write_comparison(comparison, tmp_path / "out")
    page = Page((tmp_path / "out/compare.html").read_text()).words
    assert said in page
    data = json.loads((tmp_path / "out/compare.json").read_text())
    assert not any("precision" in reason for reason in data["left_out"])
    assert [(model["run"], model["dtype"]) for model in data["models"]] == [
        *[("A", "bfloat16")] * 3,
        *[("B", "float32")] * 2,
    ]
    same = compare_runs([one, write_run(tmp_path / "same", distilled=0.5, layers=4)])
    assert "precision" not in comparison_text(same)


def test_a_precision_that_moves_the_teachers_own_score_is_refused(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", inputs={"dtype": "float32"})
    found = Scores.load(other / "eval/teacher.json")
    items = tuple(replace(item, score=0.0) if i < 40 else item for i, item in enumerate(found.tasks[0].items))
    changed = (scored(replace(found.tasks[0], items=items)), *found.tasks[1:])
    replace(found, tasks=changed).save(other / "eval/teacher.json")
    with pytest.raises(UserError, match=r"for the same teacher on the same items .*: the precision moves it"):
        compare_runs([one, other])


def test_one_teacher_with_other_scores_is_refused_and_a_few_flips_are_told(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other")
    found = Scores.load(other / "eval/teacher.json")

    def with_flips(count: int) -> None:
        right = [i for i, item in enumerate(found.tasks[0].items) if item.score == 1][:count]
        items = tuple(replace(x, score=0.0) if i in right else x for i, x in enumerate(found.tasks[0].items))
        changed = scored(replace(found.tasks[0], items=items))
        replace(found, tasks=(changed, *found.tasks[1:])).save(other / "eval/teacher.json")

    with_flips(2)
    assert any("answered 2 of 300 items differently in B and A" in note for note in compare_runs([one, other]).notes)
    with_flips(20)
    with pytest.raises(UserError, match=r"for the same teacher on the same items .*: something that is not recorded"):
        compare_runs([one, other])


def test_another_teacher_is_refused_unless_the_user_says_so(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", teacher="teacher-2", distilled=0.6)
    with pytest.raises(UserError, match=r"model is 'teacher-2', but 'teacher-1' in .*add --across-teachers"):
        compare_runs([one, other])
    comparison = compare_runs([one, other], across_teachers=True)
    assert [content_of(own.evaluation) for own in comparison.models if own.role == "teacher"] == [
        "teacher-1",
        "teacher-2",
    ]
    assert [task.task for task in comparison.tasks][-1] == "perplexity"


def test_between_tokenizers_scores_per_token_are_left_out(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one")
    other = write_run(
        tmp_path / "other", teacher="teacher-2", scores=lambda share: (*tasks(share)[:3], nats(2.0, ids="other tokens"))
    )
    comparison = compare_runs([one, other], across_teachers=True)
    assert "perplexity" not in [task.task for task in comparison.tasks]
    assert "perplexity is not compared: it is a mean per token, and the models' tokeni" in comparison.left_out[0]
    others = [
        write_run(tmp_path / name, scores=lambda share: (*tasks(share)[:3], replace(nats(2.0), task="gsm8k_worked")))
        for name in ("three", "four")
    ]
    told = compare_runs(others, across_teachers=True).left_out
    assert told[0].endswith("tokenizers differ shows only in scores of perplexity, which are missing.")


@pytest.mark.slow
def test_a_run_without_its_teacher_uses_that_of_another_run(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one")
    other = write_run(tmp_path / "other", roles=("pruned", "distilled"), distilled=0.5)
    comparison = compare_runs([one, other])
    assert cell_of(comparison, "B", "distilled", "retrieval_continuation").kept is not None
    assert any(note.startswith("B has no evaluation of its teacher; the evaluation of") for note in comparison.notes)
    (other / "plan.json").unlink()
    with pytest.raises(UserError, match="its teacher is unknown"):
        compare_runs([one, other])
    found = compare_runs([one, other], across_teachers=True)
    assert cell_of(found, "B", "distilled", "retrieval_continuation").kept is None


def test_a_task_that_one_run_lacks_is_left_out_and_named(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one")
    other = write_run(tmp_path / "other", scores=lambda share: tasks(share)[1:], inputs={"eval.tasks": ["fewer"]})
    comparison = compare_runs([one, other])
    assert [task.task for task in comparison.tasks] == ["retrieval_generation", "knowledge_continuation", "perplexity"]
    expected = f"retrieval_continuation is not compared: it is not in {other}/eval/teacher.json and 2 more."
    assert comparison.left_out[0] == expected
    assert expected in comparison_text(comparison)


def test_folders_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one")
    cut = write_run(tmp_path / "cut", roles=("teacher",))
    (cut / "student").mkdir()
    refusals: list[tuple[list[Path], str]] = [
        ([one, cut / "../one"], "is given twice"),
        ([one, write_run(tmp_path / "bare", roles=())], "has no evaluation, so eval/ has no score of a pruned model"),
        (
            [one, write_run(tmp_path / "intact", roles=("teacher",))],
            "only the teacher was .* `shoal prune`, then `shoal",
        ),
        ([one, cut], "only the teacher was evaluated.*; run `shoal eval` with its recipe first"),
    ]
    for folders, message in refusals:
        with pytest.raises(UserError, match=message):
            compare_runs(folders)
