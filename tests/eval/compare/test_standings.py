"""Where models stand: means over tasks, columns that count, controls."""

from __future__ import annotations

import math
import re
from dataclasses import astuple, replace
from pathlib import Path

import pytest
from compared_runs import choice, nats, write_run

from shoal.artifacts.evaluation import Interval, TaskScore
from shoal.eval.compare.compare import Cell, RunComparison, compare_runs
from shoal.eval.compare.figure import pareto_panels
from shoal.eval.compare.page import as_data, comparison_text
from shoal.eval.compare.standings import controls, mean_kept, standings, task_groups
from shoal.stats.paired import Retention, kept_change, retention, wording_gap


def in_columns(share: float) -> tuple[TaskScore, ...]:
    """A look-up, reworded too, which is harder, an ability that no text trains, and two benchmarks."""
    own = choice("retrieval_generation", share + 0.1, protocol="generation")
    reworded = choice("retrieval_generation", share - 0.1, protocol="generation")
    return (
        replace(own, column="in"),
        replace(reworded, task="retrieval_reworded_generation", column="reworded", reworded_of="retrieval_generation"),
        replace(choice("needle_generation", share, protocol="generation"), column="out"),
        replace(choice("arc_continuation", share, ability="knowledge"), column="public"),
        replace(choice("piqa_continuation", share, ability="knowledge"), column="public"),
        nats(4 - 2 * share),
    )


def test_the_mean_over_tasks_adds_limits_as_squares_with_the_luck_that_they_share() -> None:
    def cell(name: str, kept: float, reach: float, items: str) -> Cell:
        influences = dict(zip(items, (0.1, -0.2, 0.1), strict=True))
        return Cell(
            choice(name, 0.5, n=4), Retention(kept, kept - reach, kept + 2 * reach), None, influences=influences
        )

    one, other = cell("x", 0.6, 0.1, "abc"), cell("y", 0.4, 0.2, "def")
    weights = {"x": 0.5, "y": 0.5}
    found = mean_kept([one, other], weights)
    assert found is not None
    assert found.value == pytest.approx(0.5)
    assert found.ci_low == pytest.approx(0.5 - math.hypot(0.05, 0.1))
    assert found.ci_high == pytest.approx(0.5 + math.hypot(0.1, 0.2))
    for items, correlation in (("abc", 1.0), ("bad", -0.04 / 0.06)):
        shared = mean_kept([one, cell("y", 0.4, 0.2, items)], weights)
        assert shared is not None
        square = 0.05**2 + 2 * correlation * 0.05 * 0.1 + 0.1**2
        assert shared.ci_low == pytest.approx(0.5 - math.sqrt(square)), items
    elsewhere = replace(other, score=replace(other.score, ability="knowledge"), influences=one.influences)
    assert mean_kept([one, elsewhere], weights) == found, "equal ids of another ability are other items"
    assert mean_kept([one, other], {"x": 1.0}) == Interval(0.6, pytest.approx(0.5), pytest.approx(0.8))  # pyright: ignore[reportArgumentType]
    assert mean_kept([one, replace(other, kept=Retention(None, None, None, "why"))], weights) is None


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
    looked_up, reworded, needle, arc, piqa = (
        retention(*pair).value or 0.0 for pair in zip(teacher[:5], model[:5], strict=True)
    )
    assert found[1].mean is not None
    assert found[1].mean.value == pytest.approx((reworded + needle + (arc + piqa) / 2) / 3)
    kept = {title: value.value for title, value in found[1].kept.items() if value}
    assert list(kept) == ["Reworded questions", "Untrained abilities", "Public benchmarks", "Trained wording"]
    assert kept["Public benchmarks"] == pytest.approx((arc + piqa) / 2)
    assert kept["Trained wording"] == pytest.approx(looked_up)


def test_means_are_compared_over_the_same_items(columned: RunComparison) -> None:
    _, best, first, *_ = standings(columned, task_groups(columned))
    assert best.against is not None
    assert best.mean is not None
    assert first.mean is not None
    assert first.against is None
    assert best.against.value == pytest.approx(best.mean.value - first.mean.value)
    assert best.against.ci_high - best.against.ci_low < best.mean.ci_high - best.mean.ci_low, "the items are shared"


def test_every_model_has_its_wording_gap(columned: RunComparison) -> None:
    for one, share in zip(standings(columned, task_groups(columned))[:2], (0.9, 0.7), strict=True):
        gap = wording_gap(*in_columns(share)[:2])
        assert one.form is not None
        assert astuple(one.form) == pytest.approx((gap.difference, gap.ci_low, gap.ci_high))


def test_a_control_tells_what_the_text_teaches_and_what_is_still_lost_by_column(tmp_path: Path) -> None:
    roles = ("teacher", "pruned", "control", "distilled")
    one = write_run(tmp_path / "one", scores=in_columns, roles=roles)
    other = write_run(tmp_path / "other", scores=in_columns, distilled=0.6, layers=4)
    comparison = compare_runs([one, other])
    assert ("A", "control") in [(model.contender.letter, model.role) for model in comparison.models]
    found = controls(comparison, task_groups(comparison))
    assert list(found) == [("A", "learnt from the text"), ("A", "still lost")]
    teacher, control, model = (in_columns(share)[1] for share in (0.9, 0.95, 0.7))
    for what, before, after in (("learnt from the text", teacher, control), ("still lost", control, model)):
        told = found["A", what]["Reworded questions"]
        assert told is not None
        assert astuple(told) == pytest.approx(kept_change(teacher, before, after))
    text = comparison_text(comparison)
    assert "A, learnt from the text (control − teacher)" in text
    assert "A, still lost (distilled − control)" in text
    assert "A control" in text
    assert "control" not in [point.role for points in pareto_panels(comparison).values() for point in points]
    assert "control against" not in text
    assert comparison.num_differences == 2 * len(comparison.tasks), "of cut models alone"


def test_the_page_says_what_ranks_and_the_figure_what_its_axis_holds(columned: RunComparison) -> None:
    text = comparison_text(columned)
    assert "in the mean of reworded questions, untrained abilities and public benchmarks." in text
    assert re.search(r"B distilled keeps the most of its teacher: \d+ %", text)
    assert "Each of these is the mean of its tasks" in text
    against = "B distilled against A distilled"
    outside, inside = (line for line in text.splitlines() if line.startswith(against))
    assert re.match(rf"{against}: .*(perplexity|of 5 tasks)", outside)
    assert re.match(rf"{against}, in the trained wording: .*(retrieval \(generated\)|on 1 of 1 task)", inside)
    assert "retrieval (generated" not in outside
    assert "The teacher's gap shows how much harder" in text
    data = as_data(columned)
    assert data["ranked_by"] == ["Reworded questions", "Untrained abilities", "Public benchmarks"]
    assert data["standings"][1]["role"] == "distilled"
    assert data["standings"][0]["wording_gap"]["value"] > 0
    assert [task["column"] for task in data["tasks"]] == ["reworded", "out", "public", "public", "in", ""]
