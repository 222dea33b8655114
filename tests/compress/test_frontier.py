"""The frontier that a dry run shows: cuts by size, what they keep, and the drawing.

Covers: shoal.figures.frontier.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sweep_results import importance
from unequal_layers import PARAMETERS, SCORES, sizes

from shoal.compress.frontier import MOST_ROWS, Frontier, FrontierPoint, frontier, frontier_lines
from shoal.compress.knapsack import tradeoffs
from shoal.figures.frontier import frontier_figure
from shoal.figures.style import save_figure
from shoal.recipe.prune import Prune

SCORED = replace(importance(), layers={"block_influence": SCORES})


def test_cuts_are_those_that_no_other_one_beats_and_their_sizes_are_by_subtraction() -> None:
    found = frontier(Prune(), SCORED, sizes())
    free = (1, 2, 3, 4)
    plans = tradeoffs([SCORES[layer] for layer in free], [2 * PARAMETERS[layer] for layer in free])
    assert [point.drop for point in found.points] == [tuple(free[place] for place in plan) for plan in plans]
    for point in found.points:
        assert point.num_bytes == 2 * (200 + sum(PARAMETERS) - sum(PARAMETERS[layer] for layer in point.drop))
        assert point.score == pytest.approx(sum(SCORES[layer] for layer in point.drop))
    assert found.points[0].speedup == 1
    assert found.points[-1].speedup == pytest.approx(1258 / 700)


def test_what_is_kept_is_the_share_of_the_score_above_chance_after_all_single_losses() -> None:
    """Of 80 items 64 are right, chance is a quarter of the items; layer 2 costs 30 and layer 4 one of them."""
    points = {point.drop: point for point in frontier(Prune(), SCORED, sizes()).points}
    assert points[()].kept == {"retrieval": 1.0, "knowledge": 1.0}
    continuation = (64 - 30 - 20) / (64 - 20)
    generation = (64 - 30) / 64
    assert points[2,].kept["retrieval"] == pytest.approx((continuation + generation) / 2)
    assert points[2,].kept["knowledge"] == 1
    assert points[1, 2, 3, 4].kept["retrieval"] == pytest.approx(((64 - 31 - 20) / 44 + (64 - 56) / 64) / 2)


def test_runs_and_orders_have_a_frontier_too() -> None:
    runs = frontier(Prune(contiguous=True), SCORED, sizes())
    assert runs.metric == "angular"
    assert [len(point.drop) for point in runs.points[:2]] == [0, 1]
    assert [point.score for point in runs.points] == sorted(point.score for point in runs.points)
    order = frontier(Prune(metric="sleb"), SCORED, sizes())
    assert [point.drop for point in order.points] == [(), (3,), (1, 3), (1, 3, 4)]


def test_the_table_marks_the_plan_and_thins_out_long_frontiers() -> None:
    lines = frontier_lines(frontier(Prune(), SCORED, sizes()), (2,))
    assert "added up over removals of single layers" in lines[0]
    assert lines[1].split("  ")[0] == "dropped"
    (marked,) = [line for line in lines if "<- this plan" in line]
    assert marked.split()[:5] == ["1", "1.91", "kB", "1.15", "x"]
    points = tuple(FrontierPoint(tuple(range(n)), 1000 - n, 1.0, n, {}) for n in range(100))
    long = frontier_lines(Frontier("sum", points, 10), tuple(range(7)))
    assert len(long) == 2 + MOST_ROWS + 1
    assert "added up" not in long[0]


def test_the_figure_draws_every_ability_and_the_plan(tmp_path: Path) -> None:
    kept = {"retrieval": [1.0, 0.8, 0.3], "knowledge": [1.0, 0.9, 0.7]}
    figure = frontier_figure([300, 200, 100], [1.0, 1.3, 1.9], kept, kept=True, chosen=(200, 1.3))
    svg = save_figure(figure, tmp_path / "frontier.svg").decode()
    for text in ("Retrieval", "Knowledge", "this plan", "weights on disk, kB", "80 %", "decoding speed"):
        assert text in svg
    left, right = figure.axes
    assert np.asarray(left.lines[0].get_xdata()).tolist() == [0.3, 0.2, 0.1]
    assert np.asarray(right.lines[1].get_ydata()).tolist() == kept["knowledge"]
    scored = frontier_figure([300, 200], [1.0, 1.3], {"sum of angular": [0.0, 0.2]}, kept=False)
    assert "lower is better" in save_figure(scored, tmp_path / "scores.svg").decode()
