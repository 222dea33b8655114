"""Trainings whose sources share the tokens by damage, and by a pilot, through the distill verb.

Covers: shoal.train.pilot.
"""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import NUM_LAYERS, tiny_model
from training_runs import (
    BATCH,
    DROP,
    LENGTH,
    STEPS,
    Trial,
    checkpointed_weights,
    finished,
    recipe,
    run,
    spoil_gradient,
    terminate,
    unfinished,
)

from shoal.artifacts.shares import Pilot, Shares
from shoal.artifacts.training import Training
from shoal.data.packing import PackedRows, read_rows
from shoal.launch.verbs.distill import distill_dry_run
from shoal.launch.verbs.run import open_run
from shoal.launch.workflows.dry_run import run_dry_run
from shoal.recipe.recipe import load_recipe
from shoal.train.damage import SAMPLE_ROWS, nats_by_source
from shoal.train.pilot import slope

pytestmark = pytest.mark.slow

PILOT = 4
"""Optimizer steps; the recipe asks for the tokens of three, and they are even."""
LETTERS = ("abc", "defghijk", "lmn")
"""What the words of each source are made of."""
WEIGHTS = (3.0, 1.0, 1.0)
TERMS = ("loss", "forward_kl", "cross_entropy")
CONTROL = "eval.control=true"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Files of short documents, of which every source can have its share."""
    folder, draw = tmp_path_factory.mktemp("texts"), random.Random(0)
    files = [folder / f"{letters}.jsonl" for letters in LETTERS]
    for letters, file in zip(LETTERS, files, strict=True):
        lines = [json.dumps({"text": "".join(draw.choices(letters + " ", k=30))}) for _ in range(400)]
        file.write_text("\n".join(lines))
    return [str(file) for file in files]


@pytest.fixture(scope="module")
def piloted(texts: list[str]) -> dict[str, Any]:
    terms = (["forward_kl"], ["cross_entropy"], None)
    data = [
        {"path": path, "weight": weight, "losses": names}
        for path, weight, names in zip(texts, WEIGHTS, terms, strict=True)
    ]
    return {
        "data": data,
        "losses": [{"kind": "forward_kl"}, {"kind": "cross_entropy"}],
        "data_policy": "by_damage",
        "data_pilot": 3 * BATCH * LENGTH,
        "trainer": {"learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": STEPS},
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, teacher: Path, cut: Path, piloted: dict[str, Any]) -> Trial:
    """Student and control, one rank, never interrupted."""
    return finished(run(recipe(tmp_path_factory.mktemp("whole"), teacher, cut, **piloted), CONTROL))


def rows_of(trial: Trial, *, num_rows: int) -> list[PackedRows]:
    found = map(read_rows, sorted((trial.dir / "text").glob("rows-*")))
    return [rows for rows in found if len(rows) == num_rows]


def same_bits(one: Trial, other: Trial) -> None:
    ours, theirs = ([{name: row.get(name) for name in TERMS} for row in each.training.history] for each in (one, other))
    assert ours == theirs
    theirs = other.weights()
    assert all(torch.equal(weight, theirs[name]) for name, weight in one.weights().items())


def test_every_step_is_trained_once_and_the_rows_after_the_pilot_have_its_shares(
    whole: Trial, texts: list[str]
) -> None:
    assert len(whole.curve()) == STEPS
    shares, pilot = Shares.read(whole.dir / Shares.FILE), Pilot.read(whole.dir / Pilot.FILE)
    assert [source.source for source in shares.sources] == [*pilot.sources] == texts
    (rows,) = rows_of(whole, num_rows=STEPS * BATCH)
    assert rows.sources_NS is not None
    border = PILOT * BATCH
    for part, wanted in ((rows.sources_NS[:border], shares.shares), (rows.sources_NS[border:], pilot.shares)):
        found = [float((part == number).float().mean()) for number in range(len(texts))]
        # one document more or less of each
        assert found == pytest.approx(wanted, abs=2 * 32 / part.numel())
    assert pilot.shares != pytest.approx(shares.shares, abs=0.1), "what this is about"
    (first,) = rows_of(whole, num_rows=border)
    assert torch.equal(first.input_ids_NS, rows.input_ids_NS[:border])


def test_the_pilots_nats_and_slopes_are_those_of_its_students(whole: Trial, texts: list[str]) -> None:
    pilot = Pilot.read(whole.dir / Pilot.FILE)
    assert [point.step for point in pilot.points] == [0, PILOT // 2, PILOT]
    samples = {next(iter(rows.counts)): rows for rows in rows_of(whole, num_rows=SAMPLE_ROWS)}
    for point in pilot.points[1:]:
        student = tiny_model("llama", num_hidden_layers=NUM_LAYERS - len(DROP))
        student.load_state_dict(checkpointed_weights(whole, point.step))
        found = nats_by_source(student, [samples[name] for name in texts], label="test")
        assert point.nats == pytest.approx(found, abs=1e-5), point.step
    before, half, after = (point.nats for point in pilot.points)
    shares = Shares.read(whole.dir / Shares.FILE)
    assert before == pytest.approx([source.student_nats for source in shares.sources], abs=1e-5)
    (first,) = rows_of(whole, num_rows=PILOT * BATCH)
    assert pilot.tokens == tuple(first.counts[name]["tokens"] for name in texts)
    slopes = [slope(a - b, a - c, tokens) for a, b, c, tokens in zip(before, half, after, pilot.tokens, strict=True)]
    assert any(slopes), "what this is about"
    assert pilot.slopes == pytest.approx([1e6 * value for value in slopes], rel=1e-9)
    worth = [weight * value for weight, value in zip(WEIGHTS, slopes, strict=True)]
    expected = [
        0.1 * weight / sum(WEIGHTS) + 0.9 * part / sum(worth) for weight, part in zip(WEIGHTS, worth, strict=True)
    ]
    assert pilot.shares == pytest.approx(expected, rel=1e-9)


def test_a_training_that_is_killed_before_and_after_the_pilot_ends_with_the_same_bits(
    whole: Trial, teacher: Path, cut: Path, piloted: dict[str, Any], tmp_path: Path
) -> None:
    path = recipe(tmp_path, teacher, cut, **piloted)
    for step in (1, 3, 7):
        killed = run(path, before=partial(terminate, step))
        assert killed.result is not None
        assert killed.result.returncode == 143, killed.log[-3000:]
    trial = finished(run(path))
    assert "checkpoint-7" in trial.log
    same_bits(trial, whole)
    assert Pilot.read(trial.dir / Pilot.FILE).points == Pilot.read(whole.dir / Pilot.FILE).points


def test_a_training_that_knows_its_pilot_goes_through_without_a_stop_to_the_same_bits(
    whole: Trial, tmp_path: Path
) -> None:
    trial = finished(run(unfinished(whole, tmp_path / "again", step=0)))
    assert "the pilot is over" not in trial.log
    assert "the pilot is over" in whole.log
    same_bits(trial, whole)


def test_a_step_that_is_not_sound_is_refused_before_the_pilot_looks(
    teacher: Path, cut: Path, piloted: dict[str, Any], tmp_path: Path
) -> None:
    refused = run(recipe(tmp_path, teacher, cut, **piloted), before=partial(spoil_gradient, PILOT))
    assert refused.result is not None
    assert refused.result.returncode == 2, refused.log[-3000:]
    assert f"step {PILOT}: the norm of the gradient is nan; the step's batch is in" in refused.log


def test_checkpoints_are_refused_whose_pilot_is_gone(whole: Trial, tmp_path: Path) -> None:
    path = unfinished(whole, tmp_path / "gone", step=6)
    (path.parent / "run" / Pilot.FILE).unlink()
    refused = run(path)
    assert refused.result is not None
    assert refused.result.returncode == 2, refused.log[-3000:]
    assert "the checkpoint of step 6 goes on from it" in refused.log


def test_the_control_reads_the_rows_of_the_student(whole: Trial) -> None:
    control = Training.read(whole.dir / "control" / Training.FILE)
    assert control.settings["rows"] == whole.training.settings["rows"]
    assert control.num_steps == STEPS
    kept = [list(Shares.read(whole.dir / Shares.FILE).shares), list(Pilot.read(whole.dir / Pilot.FILE).shares)]
    assert control.provenance.inputs["control.shares"] == kept
    again = finished(run(whole.recipe, CONTROL))
    assert "distill, control: done already" in again.log


def test_two_ranks_find_the_same_shares_and_the_same_curve(
    whole: Trial, teacher: Path, cut: Path, piloted: dict[str, Any], tmp_path: Path
) -> None:
    settings = piloted | {"deepspeed": "deepspeed/zero3.json"}
    trial = finished(run(recipe(tmp_path, teacher, cut, **settings), ranks=2))
    assert Shares.read(trial.dir / Shares.FILE).sources == Shares.read(whole.dir / Shares.FILE).sources
    ours, theirs = (Pilot.read(each.dir / Pilot.FILE) for each in (trial, whole))
    assert ours.shares == pytest.approx(theirs.shares, abs=1e-3)
    assert trial.curve()[:PILOT] == pytest.approx(whole.curve()[:PILOT], abs=1e-5, rel=1e-5)


def test_rows_by_damage_are_recorded_and_trained_on(teacher: Path, cut: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "data": ["python_docs", "ability_texts"],
        "data_policy": "by_damage",
        "teacher": {"recorded": str(tmp_path / "run" / "signals")},
    }
    path = recipe(tmp_path, teacher, cut, **settings, record={"top_k": 200})
    before = distill_dry_run(open_run(load_recipe(str(path), [])))
    assert "python_docs 50.0% (1,024 tokens), ability_texts_retrieval 16.7% (341 tokens)" in before
    assert "training shares them by damage, which it measures first" in before
    assert "damage by source is measured first" in before
    finished(run(path, verb="record"))
    written = (tmp_path / "run" / Shares.FILE).read_bytes()
    narrower = open_run(load_recipe(str(path), ["prune.width={intermediate_size: 0.5, num_tokens: 512}"]))
    assert "training shares them by damage, which it measures first" in run_dry_run(narrower)
    assert "as shares.json has it of this cut" in run_dry_run(open_run(load_recipe(str(path), [])))
    trial = finished(run(path))
    assert (tmp_path / "run" / Shares.FILE).read_bytes() == written
    after = distill_dry_run(open_run(load_recipe(str(path), [])))
    share = Shares.read(trial.dir / Shares.FILE).sources[0].share
    assert f"data: python_docs {share:.1%}" in after
    assert "as shares.json has it of this cut" in after
