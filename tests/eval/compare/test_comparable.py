"""What may share a table: only what was measured alike, by one teacher, on tasks that all runs have."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from compared_runs import Change, cell_of, nats, scored, tasks, write_run
from html_page import Page

from shoal.artifacts.evaluation import Evaluation, TaskScore
from shoal.errors import UserError
from shoal.eval.compare.comparable import distinct_names
from shoal.eval.compare.compare import compare_runs
from shoal.eval.compare.data import as_data
from shoal.eval.compare.page import comparison_text, write_comparison


@pytest.mark.parametrize(
    ("inputs", "environment", "message"),
    [
        (
            {"eval.perplexity_data": [{"path": "prose"}], "data": "text-2"},
            {},
            "eval.perplexity_data is [{{'path': 'prose'}}], but [{{'path': 'python_docs_heldout'}}] in {one}",
        ),
        ({"data": "text-2"}, {}, "data is 'text-2', but 'text-1' in {one}"),
        ({"eval.perplexity_tokens": 8000}, {}, "eval.perplexity_tokens is 8000, but 4000 in {one}"),
        ({"eval.sequence_length": 256}, {}, "eval.sequence_length is 256, but 512 in {one}"),
        ({"tasks": "files-2"}, {}, "tasks is 'files-2', but 'files-1' in {one} (the content of the task files"),
        ({}, {"lm_eval": "0.5.0"}, "lm_eval is '0.5.0', but '0.4.13' in {one} (its version makes the prompts)"),
    ],
)
def test_settings_that_shape_scores_are_refused_with_file_field_and_both_values(
    tmp_path: Path, inputs: dict[str, Any], environment: dict[str, Any], message: str
) -> None:
    one = write_run(tmp_path / "one")
    other = write_run(tmp_path / "other", inputs=inputs, environment=environment)
    with pytest.raises(UserError) as refused:
        compare_runs([one, other])
    lines = str(refused.value).split("\n")
    assert lines[0] == "compare: these runs cannot stand in one table"
    assert lines[1].startswith(f"{other}/eval/teacher.json: {message.format(one=f'{one}/eval/teacher.json')}")
    assert lines[2].startswith("Run `shoal eval` with the same settings in all of them")
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("change", "inputs", "message"),
    [
        (
            lambda task: scored(replace(task, items=task.items[: len(task.items) // 2])),
            {"eval.limit": 50},
            "n of task 'retrieval_continuation' is 50, but 100 in {one} (eval.limit 50 and 100)",
        ),
        (
            lambda task: replace(task, version="2.0"),
            {},
            "version of task 'retrieval_continuation' is '2.0', but '1.0' in",
        ),
        (lambda task: replace(task, num_fewshot=5), {}, "num_fewshot of task 'retrieval_continuation' is 5, but 0 in"),
        (lambda task: replace(task, metric="f1"), {}, "metric of task 'retrieval_continuation' is 'f1', but 'acc' in"),
        (lambda task: replace(task, protocol="x"), {}, "protocol of task 'retrieval_continuation' is 'x', but 'contin"),
    ],
)
def test_scores_of_another_measurement_are_refused(
    tmp_path: Path, change: Change, inputs: dict[str, Any], message: str
) -> None:
    one = write_run(tmp_path / "one")
    other = write_run(tmp_path / "other", change=change, inputs=inputs)
    with pytest.raises(UserError) as refused:
        compare_runs([one, other])
    assert f"{other}/eval/teacher.json: {message.format(one=f'{one}/eval/teacher.json')}" in str(refused.value)


def test_answers_that_were_matched_by_other_code_are_refused_and_old_files_have_the_first(tmp_path: Path) -> None:
    def newer(task: TaskScore) -> TaskScore:
        return replace(task, matching=2) if task.protocol == "generation" else task

    runs = [write_run(tmp_path / "one"), write_run(tmp_path / "other", change=newer)]
    for file in runs[0].glob("eval/*.json"):  # as it was written before there were versions
        body = json.loads(file.read_text())
        for task in body["tasks"]:
            assert task.pop("matching") == 1
        file.write_text(json.dumps(body))
    with pytest.raises(UserError) as refused:
        compare_runs(runs)
    told = (
        f"{runs[1]}/eval/teacher.json: matching of task 'retrieval_generation' is 2, but 1 in "
        f"{runs[0]}/eval/teacher.json (the version of the code that reads written answers)"
    )
    assert told in str(refused.value)
    assert "retrieval_continuation" not in str(refused.value)


def test_scores_of_another_engine_are_refused_and_old_files_have_transformers(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "one"),
        write_run(tmp_path / "other", change=lambda task: replace(task, engine="vllm")),
    ]
    for file in runs[0].glob("eval/*.json"):  # as it was written before there was another
        body = json.loads(file.read_text())
        for task in body["tasks"]:
            assert task.pop("engine") == "transformers"
        file.write_text(json.dumps(body))
    with pytest.raises(UserError) as refused:
        compare_runs(runs)
    told = (
        f"{runs[1]}/eval/teacher.json: engine of task 'retrieval_generation' is 'vllm', but 'transformers' in "
        f"{runs[0]}/eval/teacher.json (eval.backend: another engine rounds and ties otherwise)"
    )
    assert told in str(refused.value)


def asking(prompts: str, question: str, **fields: Any) -> Change:
    def change(task: TaskScore) -> TaskScore:
        items = tuple(replace(item, question=f"{question} {item.id}") for item in task.items)
        return task if task.task == "perplexity" else replace(task, prompts=prompts, items=items, **fields)

    return change


def test_two_runs_with_different_prompts_are_refused_and_show_both(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", change=asking("p1", "What is"))
    other = write_run(tmp_path / "other", change=asking("p2", "Tell me"))
    with pytest.raises(UserError, match="prompts of task 'retrieval_continuation' is 'p2', but 'p1' in") as refused:
        compare_runs([one, other])
    assert "item 'retrieval_continuation-0' asks 'Tell me retrieval" in str(refused.value)
    assert "there and 'What is retrieval_continuation-0' here" in str(refused.value)


def test_prompts_that_differ_before_the_question_name_the_setting_that_may_have_done_it(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", change=asking("p1", "What is", num_fewshot=5))
    other = write_run(tmp_path / "other", change=asking("p2", "What is", num_fewshot=5), inputs={"seed": 7})
    with pytest.raises(UserError, match=r"prompts of task .* \(seed is 7 there and 0 here\)"):
        compare_runs([one, other])


def test_equal_prompts_make_up_for_task_files_and_versions_that_changed_elsewhere(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", change=asking("p1", "What is", num_fewshot=5))
    other = write_run(
        tmp_path / "other",
        change=asking("p1", "What is", num_fewshot=5),
        inputs={"seed": 7, "tasks": "files-2"},
        environment={"lm_eval": "0.5.0"},
    )
    assert len(compare_runs([one, other]).tasks) == 4


def test_the_seed_counts_only_where_examples_are_drawn_by_it(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", inputs={"seed": 7})
    assert len(compare_runs([one, other]).tasks) == 4
    for run, seed in (("one", 0), ("other", 7)):
        write_run(tmp_path / run, change=lambda task: replace(task, num_fewshot=5), inputs={"seed": seed})
    with pytest.raises(UserError, match=r"seed is 7, but 0 in .* \(it draws the few-shot examples\)"):
        compare_runs([one, other])


def test_items_of_equal_number_that_are_others_are_refused(tmp_path: Path) -> None:
    def others(task: TaskScore) -> TaskScore:
        return replace(task, items=tuple(replace(item, id=f"new-{item.id}") for item in task.items))

    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", change=others)
    with pytest.raises(
        UserError, match=r"other/eval/teacher\.json and .*one/eval/teacher\.json: task .*: items differ"
    ):
        compare_runs([one, other])


def test_what_only_moves_scores_by_rounding_is_said_and_not_refused(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one")
    other = write_run(
        tmp_path / "other", inputs={"attention": "eager", "eval.batch_size": 4}, environment={"torch": "2.12.0"}
    )
    notes = compare_runs([one, other]).notes
    assert "attention differs (sdpa in A, eager in B), which does not change what is asked." in notes
    assert "eval.batch_size differs (16 in A, 4 in B), which does not change what is asked." in notes
    assert "torch differs (2.13.0 in A, 2.12.0 in B), which does not change what is asked." in notes


@pytest.mark.slow
def test_runs_in_different_precision_share_a_page_that_says_so(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one")
    other = write_run(tmp_path / "other", inputs={"dtype": "float32"}, distilled=0.5, layers=4)
    comparison = compare_runs([one, other])
    said = "The runs were not scored in the same precision: A in bfloat16, B in float32."
    text = comparison_text(comparison)
    assert said in text
    assert "B distilled against A distilled, in another precision: worse on" in text
    write_comparison(comparison, tmp_path / "out")
    page = Page((tmp_path / "out/compare.html").read_text()).words
    assert said in page
    data = json.loads((tmp_path / "out/compare.json").read_text())
    assert data["left_out"] == []
    assert [(model["run"], model["dtype"]) for model in data["models"]] == [
        *[("A", "bfloat16")] * 3,
        *[("B", "float32")] * 2,
    ]
    same = compare_runs([one, write_run(tmp_path / "same", distilled=0.5, layers=4)])
    assert "precision" not in comparison_text(same)
    assert as_data(same)["precision"] is None


def test_a_precision_that_moves_the_teachers_own_score_is_refused(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", inputs={"dtype": "float32"})
    found = Evaluation.read(other / "eval/teacher.json")
    items = tuple(replace(item, score=0.0) if i < 40 else item for i, item in enumerate(found.tasks[0].items))
    changed = (scored(replace(found.tasks[0], items=items)), *found.tasks[1:])
    replace(found, tasks=changed).write(other / "eval/teacher.json")
    with pytest.raises(UserError, match=r"for the same teacher on the same items .*: the precision moves it"):
        compare_runs([one, other])


@pytest.mark.parametrize("asked", ["stored", "auto"])
def test_the_precision_of_the_checkpoint_is_told_where_the_run_took_that(tmp_path: Path, asked: str) -> None:
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", inputs={"dtype": asked})
    for name in ("student", "distilled"):
        (other / name).mkdir()
        (other / name / "config.json").write_text('{"dtype": "bfloat16"}')
    assert compare_runs([one, other]).precision == ""
    (other / "distilled/config.json").write_text('{"dtype": "float32"}')
    assert "A in bfloat16, B in bfloat16 and float32" in compare_runs([one, other]).precision
    (other / "distilled/config.json").write_text("{")
    with pytest.raises(UserError, match=r"distilled/config\.json: is not valid JSON"):
        compare_runs([one, other])


def test_one_teacher_with_other_scores_is_refused_and_a_few_flips_are_told(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other")
    found = Evaluation.read(other / "eval/teacher.json")

    def with_flips(count: int) -> None:
        right = [i for i, item in enumerate(found.tasks[0].items) if item.score == 1][:count]
        items = tuple(replace(x, score=0.0) if i in right else x for i, x in enumerate(found.tasks[0].items))
        changed = scored(replace(found.tasks[0], items=items))
        replace(found, tasks=(changed, *found.tasks[1:])).write(other / "eval/teacher.json")

    with_flips(2)
    assert any("answered 2 of 300 items otherwise in B than in A" in note for note in compare_runs([one, other]).notes)
    with_flips(20)
    with pytest.raises(UserError, match=r"for the same teacher on the same items .*: something that is not recorded"):
        compare_runs([one, other])


def test_all_problems_are_told_at_once_and_each_once(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one")
    other = write_run(tmp_path / "other", inputs={"eval.sequence_length": 256, "data": "text-2"}, teacher="teacher-2")
    with pytest.raises(UserError) as refused:
        compare_runs([one, other])
    lines = str(refused.value).split("\n")[1:-1]
    assert [re.sub(r".*json: ([\w.]+) is.*", r"\1", line) for line in lines] == [
        "model",
        "data",
        "eval.sequence_length",
    ]


def test_another_teacher_is_refused_unless_the_user_says_so(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", teacher="teacher-2", distilled=0.6)
    with pytest.raises(UserError, match=r"model is 'teacher-2', but 'teacher-1' in .*say --across-teachers"):
        compare_runs([one, other])
    comparison = compare_runs([one, other], across_teachers=True)
    assert [model.content for model in comparison.models if model.role == "teacher"] == ["teacher-1", "teacher-2"]
    assert [task.task for task in comparison.tasks][-1] == "perplexity"


def test_between_tokenizers_scores_per_token_are_left_out(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one")
    other = write_run(
        tmp_path / "other", teacher="teacher-2", scores=lambda share: (*tasks(share)[:3], nats(2.0, ids="other tokens"))
    )
    comparison = compare_runs([one, other], across_teachers=True)
    assert "perplexity" not in [task.task for task in comparison.tasks]
    assert "perplexity is left out: it counts tokens" in comparison.left_out[0]


@pytest.mark.slow
def test_a_run_without_its_teacher_uses_that_of_another_run(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one")
    other = write_run(tmp_path / "other", roles=("pruned", "distilled"), distilled=0.5)
    comparison = compare_runs([one, other])
    assert cell_of(comparison, "B", "distilled", "retrieval_continuation").kept is not None
    assert "B has no evaluation of its teacher; that of another run is used, of the same model." in comparison.notes
    (other / "plan.json").unlink()
    with pytest.raises(UserError, match="does not say what its teacher is"):
        compare_runs([one, other])
    found = compare_runs([one, other], across_teachers=True)
    assert cell_of(found, "B", "distilled", "retrieval_continuation").kept is None


def test_without_any_teacher_there_is_a_table_and_the_reason_why_no_figure(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, roles=("pruned", "distilled")) for name in ("one", "other")]
    page = write_comparison(compare_runs(runs), tmp_path / "out").read_text()
    assert "no run has an evaluation of its teacher" in page
    assert not (tmp_path / "out/pareto.png").exists()


def test_a_task_that_one_run_lacks_is_left_out_and_named(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one")
    other = write_run(tmp_path / "other", scores=lambda share: tasks(share)[1:], inputs={"eval.tasks": ["fewer"]})
    comparison = compare_runs([one, other])
    assert [task.task for task in comparison.tasks] == ["retrieval_generation", "knowledge_continuation", "perplexity"]
    expected = f"retrieval_continuation is left out: it is not in {other}/eval/teacher.json and 2 more."
    assert comparison.left_out[0] == expected
    assert expected in comparison_text(comparison)


def test_no_common_task_is_refused_with_what_there_is(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", scores=lambda share: tasks(share)[:1])
    other = write_run(tmp_path / "other", scores=lambda share: tasks(share)[1:2])
    with pytest.raises(UserError, match="no task was evaluated in all of these runs") as refused:
        compare_runs([one, other])
    assert f"{other}: retrieval_generation" in str(refused.value)


def test_folders_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other")
    cut = write_run(tmp_path / "cut", roles=("teacher",))
    (cut / "student").mkdir()
    refusals: list[tuple[list[Path], str]] = [
        ([one], "needs two run directories or more, there is .*one alone"),
        ([one, tmp_path / "other/../one"], "is given twice"),
        ([one, tmp_path / "nowhere"], "nowhere: no such run directory"),
        ([one, one / "plan.json"], "is a file; give the run directory"),
        ([one, write_run(tmp_path / "bare", roles=())], "holds no evaluation, so there is no score of a cut model"),
        (
            [one, write_run(tmp_path / "intact", roles=("teacher",))],
            "only the teacher was .* `shoal prune`, then `shoal",
        ),
        ([one, cut], "only the teacher was evaluated.*; run `shoal eval` with its recipe first"),
    ]
    for folders, message in refusals:
        with pytest.raises(UserError, match=message):
            compare_runs(folders)
    (other / "eval/pruned.json").write_text('{"schema": 1')
    with pytest.raises(UserError, match=r"other/eval/pruned\.json: is not valid JSON"):
        compare_runs([one, other])


def test_results_of_another_run_in_a_folder_are_refused(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other")
    write_run(tmp_path / "third", layers=4)
    (other / "plan.json").write_bytes((tmp_path / "third/plan.json").read_bytes())
    with pytest.raises(
        UserError, match=r"pruned\.json: num_layers is 5, but .*plan\.json keeps 4 of 8; run `shoal eval`"
    ):
        compare_runs([one, other])
    write_run(other, pruned="pruned-x")
    write_run(tmp_path / "fourth", pruned="pruned-y")
    (other / "distill.json").write_bytes((tmp_path / "fourth/distill.json").read_bytes())
    with pytest.raises(UserError, match=r"pruned\.json: model is 'pruned-x', but 'pruned-y' in .*distill\.json"):
        compare_runs([one, other])


def test_names_are_as_much_of_the_path_as_tells_them_apart() -> None:
    paths = [Path("/x/a/run"), Path("/x/b/run"), Path("/x/b/other")]
    assert distinct_names(paths) == ["a/run", "b/run", "b/other"]
    assert distinct_names(paths[1:]) == ["run", "other"]
