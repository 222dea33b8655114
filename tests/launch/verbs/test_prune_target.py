"""A run whose recipe says what the student must reach.

Covers: shoal.launch.verbs.prune.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shoal.artifacts.plan import Plan
from shoal.errors import UserError
from shoal.launch.verbs import prune as pruning
from shoal.launch.verbs.run import Run, open_run
from shoal.models.checkpoint_files import read_shards
from shoal.recipe.recipe import parse_recipe

LAYER = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 48 + 2 * 32
WHOLE = 6 * LAYER + 2 * 272 * 32 + 32
"""Parameters of the tiny llama."""
MEASURE = {"num_tokens": 64, "sequence_length": 32, "batch_size": 2}


def settings(teacher: Path, folder: Path, target: dict[str, Any], **prune: Any) -> dict[str, Any]:
    return {
        "model": str(teacher),
        "run_dir": str(folder / "run"),
        "measure": MEASURE,
        "prune": {"target": target, **prune},
    }


def run_of(teacher: Path, folder: Path, target: dict[str, Any], **prune: Any) -> Run:
    return open_run(parse_recipe(settings(teacher, folder, target, **prune)))


@pytest.mark.slow
def test_a_student_has_the_size_that_was_asked_for_and_is_made_once(teacher: Path, tmp_path: Path) -> None:
    target = {"params": WHOLE - 1.5 * LAYER, "memory_gb": (4 * WHOLE + 50_000) / 2**30, "sequence_length": 100}
    run = run_of(teacher, tmp_path, target)
    pruning.prune(run)
    plan, student = Plan.load(run.dir / "plan.json"), run.dir / "student"
    num_bytes = sum(tensor.end - tensor.start for shard in read_shards(student) for tensor in shard.tensors.values())
    assert (len(plan.drop), num_bytes) == (2, 4 * (WHOLE - 2 * LAYER))
    assert f"params {WHOLE - 2 * LAYER:,} (asked: " in plan.reason
    # keys and values: two heads of 8 in float32, four layers
    memory = (num_bytes + 4 * 100 * 2 * 2 * 8 * 4) / 2**30
    assert f"memory_gb {memory:.4g} GiB for 1 x 100 tokens" in plan.reason
    assert plan.provenance.inputs["prune.target"]["params"] == target["params"]
    written = (student / "config.json").stat().st_mtime_ns
    pruning.prune(run_of(teacher, tmp_path, target))
    assert (student / "config.json").stat().st_mtime_ns == written


@pytest.mark.slow
def test_what_cannot_be_reached_is_refused_before_anything_is_measured(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=rf"prune.target: is not reached .* the nearest is params {WHOLE - 4 * LAYER:,} "
    ):
        pruning.prune(run_of(teacher, tmp_path, {"params": 100}))
    with pytest.raises(UserError, match=r"prune.target.sequence_length: 5000 is more than the 1024 positions"):
        pruning.prune(run_of(teacher, tmp_path, {"speedup": 1.1, "sequence_length": 5000}))
    assert not (tmp_path / "run").exists()
