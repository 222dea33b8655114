"""Ranks whose nodes see late what others have written: all stages, a stop, another number of ranks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lagging_disk import lag_behind
from training_runs import KEEPING, all_of, finished, run, terminate, write_recipe

pytestmark = [pytest.mark.prove, pytest.mark.slow]
MEASURED = "prune={num_drop: 2, metric: block_influence}"
# fewer windows than ranks: a rank that has none waits for nobody
BEST = {"eval_steps": 2, "perplexity_tokens": 128, "metric_for_best_model": "perplexity"}
SETTINGS: list[dict[str, Any]] = [
    {"deepspeed": "zero2"},
    {"deepspeed": "zero3", "teacher": {"kind": "recorded", "top_k": 50}, "watch": BEST},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["zero2", "recorded"])
def test_ranks_of_nodes_that_see_files_late_do_what_those_of_one_machine_do(
    teacher: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    apart, whole = (write_recipe(tmp_path / name, teacher, **settings, **KEEPING) for name in ("apart", "whole"))
    late = partial(lag_behind, tmp_path / "apart")
    stopped = run(apart, MEASURED, ranks=2, before=partial(all_of, late, partial(terminate, 5)))
    assert stopped.result is not None
    assert stopped.result.returncode == 143, stopped.log[-3000:]
    went_on = finished(run(apart, MEASURED, ranks=2, before=late))
    assert "resuming from" in went_on.log
    assert "checkpoint-5" in went_on.log
    reference = finished(run(whole, MEASURED, ranks=2))
    assert went_on.curve() == reference.curve()
    weights = reference.weights()
    assert all(torch.equal(weight, weights[name]) for name, weight in went_on.weights().items())
    finished(run(apart, MEASURED, verb="eval", ranks=2, before=late))
