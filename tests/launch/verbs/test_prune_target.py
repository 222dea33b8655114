"""A run whose recipe says what the student must reach.

Covers: shoal.launch.verbs.plan, shoal.launch.verbs.prune.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from results import speed

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.plan import PruningPlan
from shoal.artifacts.speed import Speed
from shoal.errors import UserError
from shoal.launch.cli import main, run_verb
from shoal.launch.verbs import prune as pruning
from shoal.launch.verbs.plan import TIMES, plan_inputs, read_goals
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
    target = {"params": WHOLE - 1.5 * LAYER, "memory_gb": {"limit": (4 * WHOLE + 50_000) / 2**30, "length": 100}}
    run = run_of(teacher, tmp_path, target)
    pruning.prune(run)
    plan, student = PruningPlan.read(run.dir / "plan.json"), run.dir / "student"
    num_bytes = sum(tensor.end - tensor.start for shard in read_shards(student) for tensor in shard.tensors.values())
    assert (len(plan.drop), num_bytes) == (2, 4 * (WHOLE - 2 * LAYER))
    assert f"params {WHOLE - 2 * LAYER:,} (at most " in plan.reason
    # keys and values: two heads of 8 in float32, four layers
    memory = (num_bytes + 4 * 100 * 2 * 2 * 8 * 4) / 2**30
    assert f"memory_gb {memory:.4g} GiB for 1 sequence of 100 tokens" in plan.reason
    assert plan.provenance.inputs["prune.target"]["params"] == target["params"]
    written = (student / "config.json").stat().st_mtime_ns
    pruning.prune(run_of(teacher, tmp_path, target))
    assert (student / "config.json").stat().st_mtime_ns == written


@pytest.mark.slow
def test_what_cannot_be_reached_is_refused_before_anything_is_measured(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"params: 100 is not reached .* the nearest is {WHOLE - 4 * LAYER:,}\."):
        pruning.prune(run_of(teacher, tmp_path, {"params": 100}))
    with pytest.raises(UserError, match=r"prune.target.speedup.length: 5000 is more than the 1024 positions"):
        pruning.prune(run_of(teacher, tmp_path, {"speedup": {"factor": 1.1, "length": 5000}}))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_time_is_scaled_from_the_teachers_speed_in_the_run_directory(teacher: Path, tmp_path: Path) -> None:
    target = {"ms_per_token": {"limit": 1e-6, "batch": 3}}
    run = run_of(teacher, tmp_path, target)
    with pytest.raises(UserError, match="needs the teacher's own time to scale; run `shoal eval` first"):
        read_goals(run)
    measured = speed()
    replace(measured, provenance=Provenance({"teacher": "another"})).write(run.dir / Speed.FILE)
    with pytest.raises(UserError, match="was measured with another teacher"):
        read_goals(run)
    own = Provenance({"teacher": run.teacher_fingerprint})
    replace(measured, provenance=own).write(run.dir / Speed.FILE)
    goals = read_goals(run)
    assert goals is not None
    (batch,) = [one for one in measured.roles["teacher"].batches if one.batch_size == 4]  # 3 is nearer to 4 than to 1
    milliseconds = 1000 * 4 / batch.decode_tokens_per_s
    assert f"predicted from the teacher's {milliseconds:.4g} ms in eval/speed.json (batch size 4)" in goals.in_words(())
    half = replace(measured.roles["teacher"], num_layers=2, batches=(replace(batch, decode_tokens_per_s=1e9),))
    replace(measured, provenance=own, half_depth=half).write(run.dir / Speed.FILE)
    again = read_goals(run)
    assert again is not None
    assert "(batch size 4) and 4e-06 ms of 2 layers" in again.in_words(())
    # models of one depth differ by noise alone
    cut = {
        role: replace(half, batches=(replace(batch, decode_tokens_per_s=rate),))
        for role, rate in (("a", 2e9), ("b", 1e9))
    }
    replace(measured, provenance=own, roles={"teacher": measured.roles["teacher"], **cut}).write(run.dir / Speed.FILE)
    of_both = read_goals(run)
    assert of_both is not None
    assert "(batch size 4) and 3e-06 ms of 2 layers" in of_both.in_words(())
    narrow = replace(measured.roles["pruned"], num_layers=1, num_parameters=900_000, batches=cut["b"].batches)
    roles = {"teacher": measured.roles["teacher"], "pruned": narrow}
    replace(measured, provenance=own, roles=roles, half_depth=half).write(run.dir / Speed.FILE)
    of_half = read_goals(run)
    assert of_half is not None
    assert "(batch size 4) and 4e-06 ms of 2 layers" in of_half.in_words(()), "a narrowed model is no shallower teacher"


@pytest.mark.slow
def test_a_plan_in_milliseconds_follows_from_the_times_it_was_made_by(teacher: Path, tmp_path: Path) -> None:
    """Other times of the teacher make it stale; those beside its own student come after it."""
    target = {"ms_per_token": {"limit": 40.0, "length": 144}}
    run, measured = run_of(teacher, tmp_path, target), speed()
    own = Provenance({"teacher": run.teacher_fingerprint})

    def measure(milliseconds: float, *others: str) -> None:
        batch = replace(measured.roles["teacher"].batches[0], decode_tokens_per_s=1000 / milliseconds)
        roles = {role: replace(measured.roles["teacher"], batches=(batch,)) for role in ("teacher", *others)}
        replace(measured, provenance=own, roles=roles, half_depth=None).write(run.dir / Speed.FILE)

    def planned() -> PruningPlan:
        pruning.prune(run)
        return pruning.read_plan(run)

    measure(50.0)
    first = planned()
    assert first.provenance.inputs[TIMES]["milliseconds"] == pytest.approx(50.0)
    measure(70.0, "pruned", "distilled")
    assert planned() == first
    (run.dir / Speed.FILE).unlink()
    assert planned() == first
    measure(70.0)
    with pytest.raises(UserError, match=r"plan.json: belongs to another run: prune.target.ms_per_token"):
        pruning.read_plan(run)
    second = planned()
    assert len(second.drop) > len(first.drop)
    measure(70.1)
    written = (run.dir / "student/config.json").stat().st_mtime_ns
    assert planned().drop == second.drop
    assert (run.dir / "student/config.json").stat().st_mtime_ns == written, "other times that choose the same layers"


@pytest.mark.slow
def test_a_plan_of_before_times_were_recorded_stands(teacher: Path, tmp_path: Path) -> None:
    run = run_of(teacher, tmp_path, {"ms_per_token": {"limit": 40.0, "length": 144}})
    only = {"teacher": speed().roles["teacher"]}
    replace(speed(), provenance=Provenance({"teacher": run.teacher_fingerprint}), roles=only).write(
        run.dir / Speed.FILE
    )
    pruning.prune(run)
    file = run.dir / PruningPlan.FILE
    body = json.loads(file.read_text())
    del body["provenance"]["inputs"][TIMES]
    file.write_text(json.dumps(body))
    assert pruning.what_is_cut(run) == []
    assert TIMES not in pruning.read_plan(run).provenance.inputs
    other = run_of(teacher, tmp_path, {"ms_per_token": {"limit": 41.0, "length": 144}})
    pruning.prune(other)
    assert TIMES in pruning.read_plan(other).provenance.inputs
    told = run_of(teacher, tmp_path, {"ms_per_token": {"limit": 40.0, "length": 144, "teacher": 50.0}})
    assert TIMES not in plan_inputs(told)


@pytest.mark.slow
def test_the_dry_run_shows_the_frontier_and_draws_it(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(teacher, tmp_path, {"speedup": 1.2})
    pruning.prune(run)
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(settings(teacher, tmp_path, {"speedup": 1.2})))
    before = {str(path): path.stat().st_mtime_ns for path in run.dir.rglob("*")}
    assert run_verb("prune", str(file), [], dry_run=True, figure=tmp_path / "frontier.svg") == 0
    told = capsys.readouterr().out
    assert before == {str(path): path.stat().st_mtime_ns for path in run.dir.rglob("*")}
    drop = PruningPlan.read(run.dir / "plan.json").drop
    (marked,) = [line for line in told.splitlines() if line.endswith("<- this plan")]
    assert marked.split()[0] == str(len(drop))
    assert "sum of block_influence" in told
    assert "this plan" in (tmp_path / "frontier.svg").read_text()
    named = ["prune.target=null", "prune.drop=[1]"]
    assert run_verb("prune", str(file), named, dry_run=True, figure=tmp_path / "other.svg") == 2
    assert "draws what a metric would drop" in capsys.readouterr().err
    assert not (tmp_path / "other.svg").exists()


def test_a_figure_without_a_dry_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["prune", "recipe.yaml", "--figure", "frontier.svg"])
    assert ended.value.code == 2
    assert "--figure draws what --dry-run tells; give both" in capsys.readouterr().err
