"""What is refused within seconds: metrics that nothing measures, before hours are spent on others."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from results import evaluation

from shoal.errors import UserError
from shoal.recipe.recipe import parse_recipe
from shoal.stages import prune as pruning
from shoal.stages.evaluate import _warn_of_fewer_items
from shoal.stages.preflight import preflight
from shoal.stages.run import open_run


@pytest.mark.parametrize(
    ("prune", "measure", "message"),
    [
        (
            {"metric": "blok_influence"},
            {},
            r"metric: blok_influence is no metric; did you mean block_influence\?",
        ),
        (
            {"metric": "nothing_alike"},
            {},
            r"nothing_alike is no metric; `shoal list metrics` has all\. To choose",
        ),
        ({"metric": "sleb"}, {}, r"sleb is not measured; add it to measure\.metrics \(block_influence, angular\)"),
        (
            {},
            {"metrics": ["sleb"]},
            r"metric: block_influence is not measured; add it to .*metrics \(sleb\)",
        ),
        ({"contiguous": True}, {"metrics": ["sleb"]}, r"angular is not measured"),
        (
            {"metric": "sleb", "num_drop": 2},
            {"metrics": ["sleb"]},
            r"measure\.num_drop: orders end after 1 of 6 layers, and prune\.metric: sleb is to choose 2; set",
        ),
        (
            {"metric": "blockpruner", "num_drop": 3},
            {"metrics": ["blockpruner"], "num_drop": 2},
            r"measure\.num_drop: orders end after 2 of 6 layers, and prune\.metric: blockpruner is to choose 3",
        ),
        ({"spare": ["retrieval"]}, {}, r"prune\.spare: needs swept tasks, and nothing is swept; name some in"),
        ({"protect": [0, "cornerstone"]}, {}, r"prune\.protect: cornerstone: needs swept tasks, and nothing is swept"),
        (
            {"weights": {"angular": 1, "taylr": 1}},
            {},
            r"weights\.taylr: taylr is no metric; did you mean taylor\?",
        ),
    ],
)
def test_a_metric_that_nothing_measures_is_refused_before_anything_is_measured(
    teacher: Path,
    prune: dict[str, Any],
    measure: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw = {"model": str(teacher), "run_dir": str(tmp_path / "run"), "measure": measure}
    run = open_run(parse_recipe({**raw, "prune": {"num_drop": 1, **prune}}))
    monkeypatch.setattr(pruning, "measure", lambda _: pytest.fail("measured"))
    for stage in (preflight, pruning.prune, pruning.prune_dry_run):
        with pytest.raises(UserError, match=message):
            stage(run)


def test_a_look_at_few_items_says_how_the_many_come_back(
    teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "run/eval/teacher.json"
    scored = evaluation("teacher")
    scored.provenance.inputs["eval.limit"] = 100
    scored.write(file)
    raw = {"model": str(teacher), "run_dir": str(tmp_path / "run")}
    with caplog.at_level(logging.WARNING, logger="shoal"):
        _warn_of_fewer_items(open_run(parse_recipe({**raw, "eval": {"limit": 100}})), {"teacher": file})
        assert "take the place" not in caplog.text
        _warn_of_fewer_items(open_run(parse_recipe({**raw, "eval": {"limit": 4}})), {"teacher": file})
    assert "scores of 4 items a task take the place of those of 100; eval.limit=100 brings them back" in caplog.text
