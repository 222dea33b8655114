"""`shoal run --dry-run`: every stage with its state, and figures of the stages' own dry runs; nothing is written.

Covers: shoal.launch.verbs.pace.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from results import evaluation

from shoal import machine
from shoal.artifacts.artifact import Provenance
from shoal.launch.arguments import VERBS
from shoal.launch.verbs import dry_run, pace
from shoal.launch.verbs.dry_run import Stage, dry_run_text
from shoal.launch.verbs.evaluate import eval_inputs
from shoal.launch.verbs.measure import measure
from shoal.launch.verbs.prune import prune
from shoal.launch.verbs.run import Run, open_run
from shoal.recipe.recipe import parse_recipe
from shoal.train.preflight import throughput
from shoal.train.preflight.memory import NotEstimated

SMALL: dict[str, Any] = {
    "dtype": "float32",
    "measure": {"num_tokens": 64, "sequence_length": 32, "batch_size": 2},
    "prune": {"num_drop": 2},
    "distill": {"data": "python_docs", "num_tokens": 64, "sequence_length": 32, "precision": "float32"},
    "eval": {"tasks": ["knowledge_continuation"], "limit": 4, "perplexity_tokens": 64},
}
TRAINING = Stage("distill", "to do", "", 90.0, 5000, "as distill tells it")


@pytest.fixture
def make_run(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A small run; its training takes ninety seconds and 5 kB, whatever is cut."""
    monkeypatch.setattr(dry_run, "training_estimate", lambda *_, **__: TRAINING)

    def make(**sections: Any) -> Run:
        own = {name: {**SMALL.get(name, {}), **section} for name, section in sections.items()}
        return open_run(parse_recipe({"model": str(teacher), "run_dir": str(tmp_path / "run"), **SMALL, **own}))

    return make


def told_of(verb: str, run: Run) -> str:
    return dry_run_text(dry_run.dry_run(verb, run), run.dir)


def rows(told: str) -> dict[str, str]:
    """The lines of the stages by name, without what aligns them."""
    lines = told.split("\n\n")[1].splitlines()[1:]
    return {line.split()[0]: " ".join(line.split()[1:]) for line in lines}


def states(told: str) -> list[str]:
    known = ("done", "to do", "made again")
    return [next(state for state in known if row.startswith(state)) for row in rows(told).values()]


def test_before_anything_is_made_all_is_to_do_and_nothing_is_written(make_run: Any, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    told = told_of("run", make_run())
    assert list(rows(told)) == ["measure", "prune", "distill", "eval", "report"]
    assert states(told) == ["to do"] * 5
    assert re.match(r"to do about \S+ s no estimate teacher, pruned, distilled", rows(told)["eval"])
    assert rows(told)["prune"].endswith("a stand-in: 2 of 6 layers, chosen once they are measured")
    assert "drops:   2, 3" in told, "the middle ones"
    assert "about 90 s 5 kB" in rows(told)["distill"]
    assert "teacher, pruned, distilled, each: 4 items, 16 requests" in rows(told)["eval"]
    assert told.endswith("--- distill ---\nas distill tells it")
    assert sorted(tmp_path.rglob("*")) == before


def test_states_follow_what_is_there_and_what_it_was_made_from(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    measure(run)
    prune(run)
    told = told_of("run", run)
    assert states(told) == ["done", "done", "to do", "to do", "to do"]
    assert "--- prune ---" not in told

    stale = told_of("run", make_run(measure={"batch_size": 1, "num_tokens": 96}))
    assert rows(stale)["measure"].startswith("made again")
    assert "measure.num_tokens is 96 in this recipe but 64 there" in rows(stale)["measure"]
    assert rows(stale)["prune"].startswith("made again")
    assert "the student of the new plan" in rows(stale)["distill"]
    other = told_of("run", make_run(prune={"num_drop": None, "drop": [2]}))
    assert states(other)[:2] == ["done", "made again"]
    assert "drops:   2\n" in other

    scored = replace(evaluation("teacher"), seconds=120.0, num_requests=20, num_kept=0)
    inputs = Provenance(eval_inputs(run, run.teacher))
    replace(scored, provenance=inputs).save(run.dir / "eval" / "teacher.json")
    told = told_of("run", run)
    assert "pruned, distilled, each: " in rows(told)["eval"]

    monkeypatch.setattr(dry_run, "what_is_trained", lambda _: ["distill.seed is 1 in this recipe but 2 there"])
    assert rows(told_of("run", run))["distill"].startswith("made again")
    monkeypatch.setattr(dry_run, "what_is_trained", lambda _: [])
    monkeypatch.setattr(dry_run, "roles", lambda run: dict.fromkeys(("teacher", "pruned", "distilled"), run.teacher))
    assert states(told_of("run", run)) == ["done", "done", "done", "to do", "to do"]


def test_the_time_of_a_run_is_that_of_its_operations(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside an independent count: a training of all layers goes once through the teacher and three times through the
    student, and attention over so few tokens is nearly nothing."""
    monkeypatch.setattr(throughput, "flops_per_second", lambda *_: 1e9)
    monkeypatch.setattr(throughput, "CORE_RATE", 1e9 / throughput.num_cores())
    distill = {"trainable": "layers", "batch_size": 2, "watch": {"perplexity_tokens": 64, "eval_steps": 1}}
    run = make_run(prune={"num_drop": None, "drop": [1, 3]}, distill=distill, eval={"speed": [2, 1]})
    work, config = pace.eval_work(run, run.recipe.eval), run.config()
    width, head = config.hidden_size, config.vocab_size * config.hidden_size
    kv = width * config.num_key_value_heads // config.num_attention_heads
    layer = 2 * width * (width + kv) + 3 * width * config.intermediate_size
    token = 2 * (6 * layer + head)
    read = 64 * token + 3 * (work.read + pace.WRITTEN * work.written) * token
    read += 2 * 64 * token  # before and after the one step
    # a turn to warm up, then five, and three of two rows; a step writes as long as one of sixteen
    read += 3 * (6 * 256 + 4 * 2 * 256 + (6 + 4) * 16 * 32 * pace.WRITTEN) * token
    trained = 64 * (token + 3 * 2 * 4 * layer + 2 * 2 * head)
    assert pace.run_seconds(run, run) == pytest.approx([(read + trained) / 0.5e9] * 2, rel=0.1)
    stages = {stage.name: stage for stage in dry_run.dry_run("run", run)}
    assert stages["measure"].seconds == pytest.approx(64 * token / 0.5e9, rel=0.02)


def test_the_disk_of_all_stages_is_told_and_missed(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_disk", lambda _: 6000)
    told = told_of("run", make_run(prune={"num_drop": None, "drop": [1]}))
    (student,) = re.findall(r"^prune +to do +no estimate +(\S+) kB", told, flags=re.MULTILINE)
    needed, _ = re.findall(r"^disk: (\S+) kB needed under .* 6 kB free there: NOT ENOUGH", told, flags=re.MULTILINE)
    assert float(needed) == pytest.approx(float(student) + 5, abs=1)


def test_a_training_that_cannot_be_estimated_is_said(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Stage:
        raise NotEstimated("strange: cannot be run without data")

    monkeypatch.setattr(dry_run, "training_estimate", refuse)
    told = told_of("run", make_run(eval={"control": True}))
    assert "to do no estimate no estimate the student of the new plan; the control too" in rows(told)["distill"]
    assert told.endswith("--- distill ---\nstrange: cannot be run without data")


def test_every_verb_has_one() -> None:
    assert set(dry_run.DRY_RUNS) == {verb for verb, row in VERBS.items() if row.reads_recipe}
