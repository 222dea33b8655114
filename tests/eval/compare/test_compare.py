"""Runs side by side: every number of the table is the statistics' own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from compared_runs import cell_of, choice, tasks, write_run, write_speed

from shoal.artifacts.evaluation import TaskScore
from shoal.eval.compare.compare import compare_runs
from shoal.eval.compare.figure import pareto_panels
from shoal.eval.compare.page import as_data, comparison_text
from shoal.launch.cli import main
from shoal.stats.paired import holm, paired, retention


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


def test_better_and_worse_are_said_after_the_correction_only(two: list[Path]) -> None:
    comparison = compare_runs(two)
    cell = cell_of(comparison, "B", "distilled", "perplexity")
    assert cell.verdict == "worse"
    assert replace(cell, adjusted_p=0.05).verdict == "unclear"
    assert replace(cell, adjusted_p=0.049).verdict == "worse"
    assert "B distilled against A distilled: worse on" in comparison_text(comparison)


@pytest.mark.parametrize(("distilled", "few"), [(0.71, True), (0.4, False)])
def test_what_few_changes_mean_for_an_interval_is_said_where_there_are_few(
    tmp_path: Path, distilled: float, few: bool
) -> None:
    other = write_run(tmp_path / "b", distilled=distilled, roles=("teacher", "distilled"))
    text = comparison_text(compare_runs([write_run(tmp_path / "a"), other]))
    assert (", few changed" in text) == ("they contain the true value in at least 97 % of cases" in text) == few
    assert "contain the true value in 92 to 100 % of cases, not in 95 %: perplexity (running text)" in text, (
        "12 windows"
    )


def test_a_missing_role_is_a_gap_that_is_named(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", roles=("teacher", "pruned"))
    other = write_run(tmp_path / "other", distilled=0.6)
    comparison = compare_runs([one, other])
    assert f"A has no distilled model: {one}/eval/distilled.json does not exist." in comparison.notes
    assert "A has none" in comparison_text(comparison)


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
    assert list(pareto_panels(comparison)) == ["parameters", "decode"]
    assert "30.0 (1.50 × [1.35, 1.88])" in comparison_text(comparison)
    write_speed(two[1], 1.8, batch_size=4)
    comparison = compare_runs(two)
    assert "The speeds of B are not shown: batch_size is 4 there and 1 in A." in (comparison.left_out)
    assert [model.speed_ratio for model in comparison.models if model.contender.letter == "B"] == [None, None]


def test_a_task_on_which_the_teacher_guesses_is_in_the_table_but_in_no_sentence_and_no_figure(tmp_path: Path) -> None:
    def guessing(share: float) -> tuple[TaskScore, ...]:
        return (*tasks(share), choice("reasoning_continuation", 0.25, ability="reasoning"))

    comparison = compare_runs([write_run(tmp_path / name, scores=guessing) for name in ("one", "other")])
    assert comparison.silent == {"reasoning_continuation"}
    assert "Near chance: on reasoning (option text)" in comparison_text(comparison)


@pytest.mark.slow
def test_the_command_prints_the_table_and_writes_everything(
    two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(two[0]), "--out", str(out), str(two[1])])
    assert ended.value.code == 0
    assert "B distilled against A distilled" in capsys.readouterr().out
    assert len(json.loads((out / "compare.json").read_text())["models"]) == 5
