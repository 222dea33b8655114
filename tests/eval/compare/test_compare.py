"""Runs side by side: only what was measured alike shares a table, and every number in it is the statistics' own.

Covers: shoal.eval.compare.comparable, shoal.eval.compare.data, shoal.eval.compare.figure, shoal.eval.compare.page,
shoal.eval.compare.standings, shoal.figures.pareto.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
from html_page import Page

from shoal.artifacts.artifact import (
    Evaluation,
    ItemScore,
    Provenance,
    PruningPlan,
    Speed,
    SpeedScore,
    TaskScore,
    Training,
)
from shoal.artifacts.search import Interval
from shoal.cli import main
from shoal.errors import UserError
from shoal.eval.compare.comparable import distinct_names
from shoal.eval.compare.compare import Cell, RunComparison, compare_runs
from shoal.eval.compare.data import as_data
from shoal.eval.compare.figure import pareto_panels
from shoal.eval.compare.page import comparison_text, write_comparison
from shoal.eval.compare.standings import controls, mean_kept, standings, task_groups
from shoal.figures.pareto import ParetoPanel, ParetoPoint, frontier, pareto_figure
from shoal.figures.style import save_figure
from shoal.stats.paired import Retention, form_gap, holm, interval, paired, retention

SHARES = {"teacher": 0.9, "pruned": 0.4, "control": 0.95, "distilled": 0.7}
INPUTS: dict[str, Any] = {
    "data": "text-1",
    "seed": 0,
    "dtype": "bfloat16",
    "attention": "sdpa",
    "tasks": "files-1",
    "eval.limit": 100,
    "eval.limits": {},
    "eval.batch_size": 16,
    "eval.perplexity_data": [{"path": "python_docs_heldout", "name": None}],
    "eval.perplexity_tokens": 4000,
    "eval.sequence_length": 512,
}
ENVIRONMENT: dict[str, Any] = {"shoal": "0.1.0", "lm_eval": "0.4.13", "torch": "2.13.0", "device": "cpu"}
ATTACK = "\"><img src=x onerror=alert(1)><script>alert('x')</script>"
Change = Callable[[TaskScore], TaskScore]


def scored(task: TaskScore) -> TaskScore:
    """The same task with the mean and the interval of its items."""
    weights = [item.weight for item in task.items]
    mean = sum(item.score * item.weight for item in task.items) / sum(weights)
    draft = replace(task, score=mean, n=len(task.items))
    low, high = interval(draft)
    return replace(draft, ci_low=low, ci_high=high)


def choice(
    name: str, share: float, *, ability: str = "retrieval", protocol: str = "continuation", n: int = 100
) -> TaskScore:
    """About ``share`` of the items right; what is right at a lower share is right at a higher one too."""
    luck = random.Random(name)
    chance = 0.0 if protocol == "generation" else 0.25
    items = tuple(ItemScore(f"{name}-{i}", float(luck.random() < share), "", "gold") for i in range(n))
    return scored(TaskScore(name, ability, protocol, "acc", 0, 0, 0, n, chance, True, "1.0", 0, items))


def nats(level: float, n: int = 12, *, ids: str = "window") -> TaskScore:
    luck = random.Random(5)
    items = tuple(ItemScore(f"{ids}-{i}", level + luck.random(), weight=100.0 + i) for i in range(n))
    version = "1.0, windows of 512 tokens"
    return scored(
        TaskScore("perplexity", "language", "rolling", "nats_per_token", 0, 0, 0, n, 0, False, version, 0, items)
    )


def tasks(share: float) -> tuple[TaskScore, ...]:
    return (
        choice("retrieval_continuation", share),
        choice("retrieval_generation", share - 0.1, protocol="generation"),
        choice("knowledge_continuation", share, ability="knowledge"),
        nats(4 - 2 * share),
    )


def in_columns(share: float) -> tuple[TaskScore, ...]:
    """A look-up and its twin, which is harder, an ability that no text trains, and two benchmarks."""
    own = choice("retrieval_generation", share + 0.1, protocol="generation")
    twin = choice("retrieval_generation", share - 0.1, protocol="generation")
    return (
        replace(own, column="in"),
        replace(twin, task="retrieval_twin_generation", column="twin", twin_of="retrieval_generation"),
        replace(choice("needle_generation", share, protocol="generation"), column="out"),
        replace(choice("arc_continuation", share, ability="knowledge"), column="public"),
        replace(choice("piqa_continuation", share, ability="knowledge"), column="public"),
        nats(4 - 2 * share),
    )


def write_run(
    folder: Path,
    *,
    distilled: float = SHARES["distilled"],
    layers: int = 5,
    inputs: dict[str, Any] | None = None,
    environment: dict[str, Any] | None = None,
    teacher: str = "teacher-1",
    pruned: str | None = None,
    change: Change = lambda task: task,
    roles: tuple[str, ...] = ("teacher", "pruned", "distilled"),
    scores: Callable[[float], tuple[TaskScore, ...]] = tasks,
) -> Path:
    """A run directory whose teacher has 8 layers; ``change`` is made to every task's score."""
    contents = {"teacher": teacher, "pruned": pruned or f"pruned-{layers}"}
    contents |= {role: f"{role}-{folder.name}" for role in ("control", "distilled")}
    versions, drop = ENVIRONMENT | (environment or {}), tuple(range(1, 9 - layers))
    for role in roles:
        share = distilled if role == "distilled" else SHARES[role]
        made = Provenance(INPUTS | {"model": contents[role]} | (inputs or {}), versions)
        count = 8 if role in ("teacher", "control") else layers
        found = tuple(map(change, scores(share)))
        Evaluation(made, role, found, count * 10**6, count, count * 2 * 10**6, 9.0).write(folder / f"eval/{role}.json")
    of_teacher = {"model": teacher}
    PruningPlan(Provenance(of_teacher, versions), 8, drop, "as the recipe says").write(folder / "plan.json")
    if "distilled" in roles:
        trained = Provenance(of_teacher | {"student": contents["pruned"]}, versions)
        Training(trained, 10, 82_000, 1800.0, (), {}, {}, 10**9).write(folder / "distill.json")
    return folder


def write_speed(folder: Path, factor: float, *, batch_size: int = 1) -> None:
    lucks = {"teacher": (1.0, 0.8, 1.0), "pruned": (1.0, 1.0, 0.9), "distilled": (1.0, 1.0, 0.9)}
    roles = {
        role: SpeedScore(1000.0, 20.0 * share, {"decode": tuple(20.0 * share * luck for luck in noise)})
        for role, share in {"teacher": 1.0, "pruned": factor, "distilled": factor}.items()
        for noise in [lucks[role]]
    }
    Speed(Provenance({"attention": "sdpa"}, ENVIRONMENT), roles, batch_size, 128, 32, "bfloat16").write(
        folder / "eval/speed.json"
    )


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """Two runs of one teacher: five layers of eight are left, or four, and the second was healed less."""
    return [write_run(tmp_path / "one"), write_run(tmp_path / "other", distilled=0.55, layers=4)]


def cell_of(comparison: Any, letter: str, role: str, task: str) -> Cell:
    (model,) = [one for one in comparison.models if (one.contender.letter, one.role) == (letter, role)]
    return next(cell for cell in model.cells if cell.score.task == task)


# --- the table ----------------------------------------------------------------------------------------------------


def test_rows_are_the_teacher_once_and_then_every_runs_models(two: list[Path]) -> None:
    rows = [(model.contender.letter, model.role) for model in compare_runs(two).models]
    assert rows == [("A", "teacher"), ("A", "pruned"), ("A", "distilled"), ("B", "pruned"), ("B", "distilled")]


def test_cells_hold_the_paired_statistics_of_the_items(two: list[Path]) -> None:
    comparison = compare_runs(two)
    for intact, one, other in zip(tasks(0.9), tasks(0.7), tasks(0.55), strict=True):
        cell = cell_of(comparison, "B", "distilled", one.task)
        assert cell.score == other
        assert cell.difference == paired(one, other)
        assert cell.kept == retention(intact, other)
    assert cell_of(comparison, "A", "distilled", "perplexity").difference is None
    assert cell_of(comparison, "A", "teacher", "perplexity").kept is None


@pytest.mark.slow
def test_p_values_are_corrected_over_the_whole_table(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, distilled=share, layers=n) for name, share, n in
            (("a", 0.7, 5), ("b", 0.6, 4), ("c", 0.5, 3))]  # fmt: skip
    comparison = compare_runs(runs)
    cells = [cell for model in comparison.models for cell in model.cells if cell.difference]
    assert len(cells) == comparison.num_differences == 2 * 2 * 4
    expected = holm([cell.difference.p_value for cell in cells if cell.difference])
    assert [cell.adjusted_p for cell in cells] == expected
    assert max(expected) > min(expected)
    again = write_run(tmp_path / "again", distilled=0.5, layers=3)  # its pruned model is that of c
    assert compare_runs([*runs, again]).num_differences == 2 * 2 * 4 + 4


def test_a_model_that_two_runs_share_is_not_compared_with_itself(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, distilled=share) for name, share in (("a", 0.7), ("b", 0.5))]
    comparison = compare_runs(runs)
    assert cell_of(comparison, "B", "pruned", "retrieval_continuation").difference is None
    assert comparison.num_differences == 4
    text = comparison_text(comparison)
    assert "The pruned models of A and B are one and the same" in text
    assert "the same model" in text
    labels = [point.label for point in pareto_panels(comparison)[0][0].points]
    assert labels == ["", "A, B", "A", "B"]


def test_better_and_worse_are_said_after_the_correction_only(two: list[Path]) -> None:
    comparison = compare_runs(two)
    cell = cell_of(comparison, "B", "distilled", "perplexity")
    assert cell.verdict == "worse"
    assert replace(cell, adjusted_p=0.05).verdict == "unclear"
    assert replace(cell, adjusted_p=0.049).verdict == "worse"
    assert "B distilled against A distilled: worse on" in comparison_text(comparison)


def test_tasks_of_few_items_are_named_before_the_numbers(two: list[Path]) -> None:
    line = "Too few items: fewer than 50, so the intervals are wide: perplexity (running text)."
    assert line in comparison_text(compare_runs(two))


def test_the_mean_over_tasks_adds_independent_limits_as_squares_and_shared_ones_as_they_are() -> None:
    def cell(name: str, kept: float, reach: float) -> Cell:
        return Cell(choice(name, 0.5, n=4), Retention(kept, kept - reach, kept + 2 * reach), None)

    one, other = cell("x", 0.6, 0.1), cell("y", 0.4, 0.2)
    weights = {"x": 0.5, "y": 0.5}
    found = mean_kept([one, other], weights)
    assert found is not None
    assert found.value == pytest.approx(0.5)
    assert found.ci_low == pytest.approx(0.5 - math.hypot(0.05, 0.1))
    assert found.ci_high == pytest.approx(0.5 + math.hypot(0.1, 0.2))
    shared = mean_kept([one, replace(other, score=replace(one.score, task="y"))], weights)
    assert shared is not None
    assert shared.ci_low == pytest.approx(0.5 - 0.15)
    assert mean_kept([one, other], {"x": 1.0}) == Interval(0.6, pytest.approx(0.5), pytest.approx(0.8))  # pyright: ignore[reportArgumentType]
    assert mean_kept([one, replace(other, kept=Retention(None, None, None, "why"))], weights) is None


# --- what comes back ----------------------------------------------------------------------------------------------


@pytest.fixture
def columned(tmp_path: Path) -> RunComparison:
    shares = (("a", 0.6), ("b", 0.7))
    return compare_runs([write_run(tmp_path / name, distilled=d, scores=in_columns) for name, d in shares])


def test_models_rank_by_columns_outside_the_trained_form_that_count_the_same(columned: RunComparison) -> None:
    found = standings(columned, task_groups(columned))
    assert [(one.model.contender.letter, one.model.role) for one in found] == [
        *(("A", "teacher"), ("B", "distilled"), ("A", "distilled"), ("A", "pruned"), ("B", "pruned"))
    ]
    teacher, model = in_columns(0.9), in_columns(0.7)
    looked_up, twin, needle, arc, piqa = (
        retention(*pair).value or 0.0 for pair in zip(teacher[:5], model[:5], strict=True)
    )
    assert found[1].mean is not None
    assert found[1].mean.value == pytest.approx((twin + needle + (arc + piqa) / 2) / 3)
    kept = {title: value.value for title, value in found[1].kept.items() if value}
    assert list(kept) == ["Twin forms", "Untrained abilities", "Public benchmarks", "Trained form"]
    assert kept["Public benchmarks"] == pytest.approx((arc + piqa) / 2)
    assert kept["Trained form"] == pytest.approx(looked_up)


def test_means_are_compared_over_the_same_items(columned: RunComparison) -> None:
    _, best, first, *_ = standings(columned, task_groups(columned))
    assert best.against is not None
    assert best.mean is not None
    assert first.mean is not None
    assert first.against is None
    assert best.against.value == pytest.approx(best.mean.value - first.mean.value)
    assert best.against.ci_high - best.against.ci_low < best.mean.ci_high - best.mean.ci_low, "the items are shared"


def test_every_model_has_its_form_gap(columned: RunComparison) -> None:
    for one, share in zip(standings(columned, task_groups(columned))[:2], (0.9, 0.7), strict=True):
        gap = form_gap(*in_columns(share)[:2])
        assert one.form is not None
        assert astuple(one.form) == pytest.approx((gap.difference, gap.ci_low, gap.ci_high))


def test_a_control_tells_what_the_text_teaches_and_what_is_still_lost_by_column(tmp_path: Path) -> None:
    roles = ("teacher", "pruned", "control", "distilled")
    one = write_run(tmp_path / "one", scores=in_columns, roles=roles)
    other = write_run(tmp_path / "other", scores=in_columns, distilled=0.6, layers=4)
    comparison = compare_runs([one, other])
    assert ("A", "control") in [(model.contender.letter, model.role) for model in comparison.models]
    found = controls(comparison, task_groups(comparison))
    assert list(found) == [("A", "form learnt"), ("A", "still lost")]
    teacher, control, model = (in_columns(share)[1] for share in (0.9, 0.95, 0.7))
    for what, before, after in (("form learnt", teacher, control), ("still lost", control, model)):
        change, told = paired(before, after), found["A", what]["Twin forms"]
        assert told is not None
        assert astuple(told) == pytest.approx(
            [x / teacher.score for x in (change.difference, change.ci_low, change.ci_high)]
        )
    text = comparison_text(comparison)
    assert "A, form learnt (control − teacher)" in text
    assert "A, still lost (distilled − control)" in text
    assert "A control" in text
    assert "control" not in [point.role for row in pareto_panels(comparison) for point in row[0].points]
    assert "control against" not in text
    assert as_data(comparison)["controls"][0]["what"] == "form learnt"
    assert comparison.num_differences == 2 * len(comparison.tasks), "of cut models alone"


def test_the_page_says_what_ranks_and_the_figure_what_its_axis_holds(columned: RunComparison) -> None:
    text = comparison_text(columned)
    assert "in the mean of twin forms, untrained abilities and public benchmarks." in text
    assert re.search(r"B distilled keeps the most of its teacher: \d+ %", text)
    assert "each is the mean of its tasks and counts the same" in text
    against = "B distilled against A distilled"
    outside, inside = (line for line in text.splitlines() if line.startswith(against))
    assert re.match(rf"{against}: .*(perplexity|of 5 tasks)", outside)
    assert re.match(rf"{against}, in the trained form: .*(retrieval \(generated\)|on 1 of 1 task)", inside)
    assert "retrieval (generated" not in outside
    assert "The teacher's says how much harder that form is" in text
    panels = [row[0] for row in pareto_panels(columned)]
    assert [(panel.title, panel.form) for panel in panels] == [
        ("Mean of the 3 rows below", "untrained form"),
        ("Twin forms", "untrained form"),
        ("Untrained abilities", "untrained form"),
        ("Public benchmarks, mean of 2 tasks", "untrained form"),
        ("Trained form", "trained form"),
    ]
    data = as_data(columned)
    assert data["ranked_by"] == ["Twin forms", "Untrained abilities", "Public benchmarks"]
    assert data["standings"][1]["role"] == "distilled"
    assert data["standings"][0]["form_gap"]["value"] > 0
    assert [task["column"] for task in data["tasks"]] == ["twin", "out", "public", "public", "in", ""]


def test_runs_scored_in_the_trained_form_only_are_ranked_by_it_and_say_so(tmp_path: Path) -> None:
    def inside(share: float) -> tuple[TaskScore, ...]:
        return tuple(replace(task, column="in") for task in tasks(share)[:3])

    runs = [write_run(tmp_path / name, scores=inside, distilled=d) for name, d in (("a", 1.0), ("b", 0.5))]
    text = comparison_text(compare_runs(runs))
    assert re.search(r"A distilled keeps the most of its teacher: more than the teacher in trained form\.", text)
    assert "More than the teacher: in trained form A distilled." in text
    assert "no task outside the form of training text, so they are ranked in that form" in text
    half = write_run(tmp_path / "c", scores=in_columns)
    whole = write_run(tmp_path / "d", scores=lambda share: in_columns(share)[:1])
    assert "retrieval_twin_generation is left out" in comparison_text(compare_runs([half, whole]))


def test_results_that_record_no_column_say_so_and_rank_by_ability_and_protocol(two: list[Path]) -> None:
    groups = task_groups(compare_runs(two))
    assert list(groups.tasks) == ["Retrieval, option text", "Retrieval, generated", "Knowledge, option text"]
    assert groups.that_rank == tuple(groups.tasks)
    assert "Not all of these results say whether" in comparison_text(compare_runs(two))


# --- what may not share a table -----------------------------------------------------------------------------------


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
def test_runs_in_different_precision_share_a_table_that_says_so_above_everything(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one")
    other = write_run(tmp_path / "other", inputs={"dtype": "float32"}, distilled=0.5, layers=4)
    comparison = compare_runs([one, other])
    said = "The runs were not scored in the same precision: A in bfloat16, B in float32."
    text = comparison_text(comparison)
    assert text.index(said) < text.index("Parameters")
    assert "B distilled against A distilled, in another precision: worse on" in text
    write_comparison(comparison, tmp_path / "out")
    page = Page((tmp_path / "out/compare.html").read_text()).words
    assert 0 < page.index(said) < page.index("Models, their scores and their costs")
    data = json.loads((tmp_path / "out/compare.json").read_text())
    assert data["precision"].startswith(said)
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


# --- teachers -----------------------------------------------------------------------------------------------------


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


# --- what is there, and what is not -------------------------------------------------------------------------------


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


def test_a_missing_role_is_a_gap_that_is_named(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", roles=("teacher", "pruned"))
    other = write_run(tmp_path / "other", distilled=0.6)
    comparison = compare_runs([one, other])
    assert f"A has no distilled model here: {one}/eval/distilled.json does not exist." in comparison.notes
    assert "A has none" in comparison_text(comparison)


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


def test_speeds_are_relative_to_their_own_teacher_and_of_one_kind(two: list[Path]) -> None:
    write_speed(two[0], 1.5)
    write_speed(two[1], 1.8)
    comparison = compare_runs(two)
    found = [model.speed_ratio for model in comparison.models if model.speed_ratio]
    assert {ratio.value for ratio in found} == {1.0, 1.5, 1.8}
    assert found[0].limits == (1.0, 1.0)
    assert found[-1].limits == pytest.approx((1.8 * 0.9, 1.8 / 0.8))
    drawn = next(model for model in as_data(comparison)["models"] if (model["run"], model["role"]) == ("A", "pruned"))
    assert (drawn["decode_ratio"], drawn["decode_ratio_of_rounds"]) == (1.5, pytest.approx((1.35, 1.875)))
    assert [panel.cost for panel in pareto_panels(comparison)[0]] == ["parameters", "decode"]
    assert "30.0 (1.50 × [1.35, 1.88])" in comparison_text(comparison)
    write_speed(two[1], 1.8, batch_size=4)
    comparison = compare_runs(two)
    assert "The speeds of B are left out: batch_size is 4 there and 1 in A, so they are not of one kind." in (
        comparison.left_out
    )
    assert [model.speed_ratio for model in comparison.models if model.contender.letter == "B"] == [None, None]


@pytest.mark.slow
def test_bytes_are_a_cost_of_their_own_where_they_do_not_follow_the_parameters(two: list[Path]) -> None:
    assert [panel.cost for panel in pareto_panels(compare_runs(two))[0]] == ["parameters"]
    found = Evaluation.read(two[1] / "eval/distilled.json")
    replace(found, num_bytes=found.num_bytes * 2).write(two[1] / "eval/distilled.json")
    assert [panel.cost for panel in pareto_panels(compare_runs(two))[0]] == ["parameters", "bytes"]


def test_a_task_on_which_the_teacher_guesses_is_in_the_table_but_in_no_sentence_and_no_figure(tmp_path: Path) -> None:
    def guessing(share: float) -> tuple[TaskScore, ...]:
        return (*tasks(share), choice("reasoning_continuation", 0.25, ability="reasoning"))

    comparison = compare_runs([write_run(tmp_path / name, scores=guessing) for name in ("one", "other")])
    assert comparison.silent == {"reasoning_continuation"}
    assert not [row for row in pareto_panels(comparison) if "easoning" in row[0].title]
    assert "No signal on reasoning (option text)" in comparison_text(comparison)


# --- what is written ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_page_markdown_json_and_figure_tell_the_same(two: list[Path], tmp_path: Path) -> None:
    write_speed(two[0], 1.5)
    write_speed(two[1], 1.8)
    comparison = compare_runs(two)
    path = write_comparison(comparison, tmp_path / "out")
    names = ["compare.html", "compare.json", "compare.md", "pareto.png", "pareto.svg"]
    assert sorted(file.name for file in path.parent.iterdir()) == names
    page, markdown = Page(path.read_text()), (path.parent / "compare.md").read_text()
    data = json.loads((path.parent / "compare.json").read_text())
    cell = cell_of(comparison, "B", "distilled", "retrieval_continuation")
    assert cell.difference is not None
    found = data["models"][4]["cells"][0]
    assert (data["models"][4]["run"], data["models"][4]["role"]) == ("B", "distilled")
    assert (found["score"], found["ci_low"]) == (cell.score.score, cell.score.ci_low)
    assert found["difference"]["adjusted_p"] == cell.adjusted_p
    assert data["runs"][1]["training_tokens"] == 82_000
    score, change = f"{100 * cell.score.score:.1f} %", f"{100 * abs(cell.difference.difference):.1f} points"
    for text in (score, change, "82,000", "0.50", "30.0 (1.50 × ", "1.35, 1.88", "5.0 million", "10 MB"):
        assert text in page.words
        assert text in markdown
    assert "(pareto.png)" in markdown
    assert not [tag for tag, attributes in page.tags for name in attributes if name in ("src", "srcset")]
    assert [attributes["role"] for tag, attributes in page.tags if tag == "svg"] == ["img"]


@pytest.mark.slow
def test_hostile_names_stay_text_everywhere(tmp_path: Path) -> None:
    name = ATTACK.replace("/", "|")
    hostile = {"retrieval_continuation": f"{ATTACK}\x1b[31m"}

    def change(task: TaskScore) -> TaskScore:
        return replace(task, task=hostile.get(task.task, task.task), ability=ATTACK)

    runs = [write_run(tmp_path / "one", change=change), write_run(tmp_path / name, change=change, distilled=0.5)]
    comparison = compare_runs(runs)
    page = Page(write_comparison(comparison, tmp_path / "out").read_text())
    assert not [tag for tag, attributes in page.tags if tag == "img" or any(key.startswith("on") for key in attributes)]
    assert not [tag for tag, attributes in page.tags if tag == "script" and "alert" in str(attributes)]
    assert "<script>alert" not in "".join((tmp_path / "out" / "compare.html").read_text().split("</style>")[1:])
    assert "<img" not in (tmp_path / "out/compare.md").read_text()
    assert "<script>" not in (tmp_path / "out/pareto.svg").read_text()
    assert "\x1b" not in comparison_text(comparison)


def test_infinite_ends_are_null_in_json(tmp_path: Path) -> None:
    def one_window(share: float) -> tuple[TaskScore, ...]:
        return (nats(4 - 2 * share, n=1),)

    runs = [write_run(tmp_path / name, scores=one_window, distilled=d) for name, d in (("one", 0.7), ("other", 0.5))]
    comparison = compare_runs(runs)
    data = json.dumps(as_data(comparison), allow_nan=False)
    assert json.loads(data)["models"][4]["cells"][0]["difference"]["ci_low"] is None
    assert "too few items" in comparison_text(comparison)


# --- the figure ---------------------------------------------------------------------------------------------------


def point(label: str, cost: float, kept: float, role: str = "distilled") -> ParetoPoint:
    return ParetoPoint(label, role, cost, Interval(kept, kept - 0.1, kept + 0.1))


def test_the_frontier_holds_what_nothing_else_beats() -> None:
    points = (point("A", 10, 0.9), point("B", 8, 0.5), point("C", 8, 0.6), point("D", 9, 0.55), point("E", 6, 0.6))
    by_size = frontier(ParetoPanel("x", "parameters", points))
    assert [one.label for one in by_size] == ["E", "A"]
    by_speed = frontier(ParetoPanel("x", "decode", points))
    assert [one.label for one in by_speed] == ["A"]
    equal = (point("A", 8, 0.6), point("B", 8, 0.6))
    assert [one.label for one in frontier(ParetoPanel("x", "bytes", equal))] == ["A", "B"]


@pytest.mark.slow
def test_marks_of_equal_cost_stand_side_by_side_and_letters_and_stairs_are_drawn(tmp_path: Path) -> None:
    points = (point("", 10, 1.0, "teacher"), point("A", 6, 0.5), point("B", 6, 0.6), point("A, B", 6, 0.1, "pruned"))
    panel = ParetoPanel("Retrieval, generation", "parameters", points)
    figure = pareto_figure([[panel]], {"A": "one", "B": "other"})
    (ax,) = figure.axes
    marks = [line for line in ax.lines if line.get_marker() in ("o", "v", "s")]
    places = [float(line.get_xdata()[0]) for line in marks]  # pyright: ignore[reportArgumentType, reportIndexIssue]
    assert len(set(places)) == 4
    assert places[0] == 10
    assert [text.get_text() for text in ax.texts] == ["", "A", "B", "A, B"]
    stairs = [line for line in ax.lines if line.get_drawstyle() == "steps-post"]
    assert len(stairs) == 1
    assert [label.get_text() for legend in figure.legends for label in legend.get_texts()] == [
        *("teacher", "pruned", "distilled", "frontier"),
        *("A = one", "B = other"),
    ]
    save_figure(figure, tmp_path / "one.svg")
    save_figure(pareto_figure([[panel]], {"A": "one", "B": "other"}), tmp_path / "again.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "again.svg").read_bytes()


def test_a_figure_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="there is no retention to draw"):
        pareto_figure([], {})


# --- the command --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_prints_the_table_and_writes_everything(
    two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "out", tmp_path / "all.json"
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(two[0]), "--out", str(out), str(two[1]), "--json", str(data)])
    assert ended.value.code == 0
    assert "B distilled against A distilled" in capsys.readouterr().out
    assert json.loads(data.read_text())["models"] == json.loads((out / "compare.json").read_text())["models"]


def test_the_command_ends_with_2_and_one_message(
    two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for words, message in (
        ([str(two[0])], "needs two run directories"),
        ([*map(str, two), "--out", str(tmp_path / "file")], "set --out to another folder"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["compare", *words])
        assert ended.value.code == 2
        told = capsys.readouterr().err
        assert told.count("shoal: error: ") == 1
        assert message in told
