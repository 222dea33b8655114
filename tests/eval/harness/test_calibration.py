"""How sure a model is of its options: the error by its definition, what is read of a task, where it is told."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from compared_runs import write_run as compared_run
from evaluations import run
from results import choice, evaluation, write_run

from shoal.artifacts.evaluation import TaskScore
from shoal.eval.compare.compare import compare_runs
from shoal.eval.compare.page import comparison_text
from shoal.eval.harness.rates import BINS, calibration, option_rates, rate, rate_difference, with_rates
from shoal.eval.report.report import write_report

RIGHT_ANSWERS = ("knowledge_continuation", "knowledge_loglikelihood")


def drawn(n: int, surer: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Confidence and overconfidence of n choices; ``surer`` = by how much it is more than the share right."""
    luck = random.Random(n)
    sure = [luck.choice([0.0, 1.0, luck.random()]) for _ in range(n)]
    return np.array(sure), np.array([own - (luck.random() < own - surer) for own in sure])


@pytest.mark.parametrize("n", [1, 7, 300])
def test_the_calibration_error_is_the_mean_distance_in_ten_bins(n: int) -> None:
    sure_N, over_N = drawn(n)
    bins: dict[int, list[tuple[float, float]]] = {}
    for sure, over in zip(sure_N.tolist(), over_N.tolist(), strict=True):
        bins.setdefault(min(math.floor(sure * 10), 9), []).append((sure, sure - over))
    expected = 0.0
    for own in bins.values():
        mean_sure, share_right = (math.fsum(column) / len(own) for column in zip(*own, strict=True))
        expected += len(own) / n * abs(mean_sure - share_right)
    found = calibration(sure_N, over_N)
    assert BINS == 10
    assert found["calibration_error"] == pytest.approx(expected, abs=1e-12)


def test_luck_is_what_a_calibrated_model_has_and_an_overconfident_one_has_more() -> None:
    errors = []
    for seed in range(300):
        sure_N = np.random.default_rng(seed).uniform(0.3, 1, size=60)
        right_N = np.random.default_rng(seed + 1000).random(60) < sure_N
        errors.append(calibration(sure_N, sure_N - right_N))
    mean = {name: np.mean([own[name] for own in errors]) for name in errors[0]}
    assert mean["calibration_luck"] == pytest.approx(mean["calibration_error"], rel=0.06)
    worse = calibration(*drawn(400, surer=0.5))
    assert worse["calibration_error"] > 3 * worse["calibration_luck"]


def test_confidence_is_the_likeliest_options_share() -> None:
    found = option_rates([math.log(0.1), math.log(0.3), math.log(0.1)], {1})
    assert found == pytest.approx({"confidence": 0.6, "overconfidence": -0.4})
    assert option_rates([-2000.0, -1000.0], {0}) == {"confidence": 1.0, "overconfidence": 1.0}


def test_every_task_with_options_has_it_and_no_other(tmp_path: Path) -> None:
    for score in run():
        has_options = score.task in RIGHT_ANSWERS
        assert ("calibration_error" in score.rates) == has_options, score.task
        if has_options:  # by likelihood, and so is the score of these
            right = [own.rates["confidence"] - own.rates["overconfidence"] for own in score.items]
            assert right == pytest.approx([own.score for own in score.items])
            assert all(0.25 <= own.rates["confidence"] <= 1 for own in score.items)


def with_confidence(score: TaskScore, confidence: float) -> TaskScore:
    rates = [{"confidence": confidence, "overconfidence": confidence - own.score} for own in score.items]
    items = tuple(replace(own, rates=found) for own, found in zip(score.items, rates, strict=True))
    return with_rates(replace(score, items=items))


def chosen(role: str) -> TaskScore:
    made = choice(role, "retrieval_continuation", "retrieval", "continuation")
    return with_confidence(made, {"teacher": 0.9, "pruned": 0.95, "distilled": 0.8}[role])


def test_the_change_of_overconfidence_is_paired_by_item() -> None:
    before, after = chosen("teacher"), chosen("pruned")
    change, own = rate_difference(before, after, "overconfidence"), rate(after, "overconfidence")
    assert change.difference == pytest.approx(0.05 + before.score - after.score)
    assert change.test == "paired-t"
    assert own.value == pytest.approx(0.95 - after.score)
    assert rate(with_confidence(after, 0.3), "overconfidence").ci_high < 0.3
    assert rate(with_confidence(after, 0.0), "overconfidence").ci_low < 0


def test_report_and_comparison_tell_it(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for role in ("teacher", "pruned", "distilled"):
        evaluation(role, (chosen(role),)).save(folder / "eval" / f"{role}.json")
    told = (write_report(folder).parent / "report.md").read_text()
    error = f"{100 * chosen('pruned').rates['calibration_error']:.1f} % (luck alone: "
    assert "Confidence minus share correct" in told
    assert error in told
    runs = [compared_run(tmp_path / name, change=lambda own: with_confidence(own, 0.9)) for name in ("a", "b")]
    assert "Calibration error" in comparison_text(compare_runs(runs))
