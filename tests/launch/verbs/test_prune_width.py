"""Runs whose recipe narrows the layers that stay: cut, told of, and healed with nothing shared below the cut.

Covers: shoal.launch.verbs.prune.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import environment, run_ranks
from training_runs import STEPS, small_training
from yaml import safe_dump

import shoal
from shoal.artifacts.plan import Plan
from shoal.artifacts.training import Training
from shoal.errors import UserError
from shoal.launch.verbs import distill
from shoal.launch.verbs import prune as pruning
from shoal.launch.verbs.dry_run import dry_run
from shoal.launch.verbs.pipeline import preflight
from shoal.launch.verbs.run import Run, open_run
from shoal.models.load import load_model
from shoal.recipe.recipe import parse_recipe
from shoal.train.student.spec import Ranks
from shoal.train.student.trainable import recorded_layers

pytestmark = pytest.mark.slow
WIDTH = {"kind": "width", "intermediate_size": 0.7, "num_key_value_heads": 1}
MEASURE = {"data": "python_docs", "num_tokens": 1024, "sequence_length": 64}


def settings(teacher: Path, folder: Path, **sections: Any) -> dict[str, Any]:
    own = {"measure": MEASURE, "prune": {"drop": [2], "changes": [WIDTH]}, **sections}
    return {"model": str(teacher), "run_dir": str(folder / "run"), "dtype": "float32", **own}


def run_of(teacher: Path, folder: Path, **sections: Any) -> Run:
    return open_run(parse_recipe(settings(teacher, folder, **sections)))


def test_an_impossible_width_is_refused_before_any_text_is_read(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("text is read")

    monkeypatch.setattr(pruning, "load_texts", read)
    run = run_of(teacher, tmp_path, prune={"drop": [2], "changes": [{"kind": "width", "intermediate_size": 4096}]})
    with pytest.raises(UserError, match="intermediate_size"):
        pruning.prune(run)


def test_a_narrowed_student_is_made_once_and_remembered_in_its_plan(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(teacher, tmp_path)
    told = dry_run("prune", run)[0].told
    assert "32 MLP channels and 1 key-value group of every layer" in told
    assert not (run.dir / "plan.json").exists()
    pruning.prune(run)
    plan = Plan.load(run.dir / "plan.json")
    width = plan.width
    assert width is not None
    assert (width.intermediate_size, width.num_key_value_heads) == (32, 1)
    assert len(width.channels) == len(width.groups) == 5
    assert (plan.first_change, plan.changed) == (0, (0, 1, 3, 4, 5))
    assert plan.provenance.inputs["prune.changes"] == [WIDTH]
    assert plan.text["sources"]["python_docs"]
    assert plan.reason.endswith("the largest outputs of every layer stay")
    config = json.loads((run.dir / "student/config.json").read_text())
    sizes = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers")
    assert [config[name] for name in sizes] == [32, 2, 1, 8, 5]
    with monkeypatch.context() as patch:
        patch.setattr("shoal.compress.apply.apply_plan", lambda *_, **__: pytest.fail("made again"))
        pruning.prune(run_of(teacher, tmp_path, measure={**MEASURE, "batch_size": 2}))
    with pytest.raises(UserError, match=r"prune.changes is not set in this recipe"):
        pruning.read_plan(run_of(teacher, tmp_path, prune={"drop": [2]}))
    with pytest.raises(UserError, match=r"changes layers that stay .*; load the student from its folder"):
        shoal.cut_model(load_model(teacher), plan)
    told = json.loads((run.dir / "plan.json").read_text())
    groups = told["internal"]["width"]["groups"]
    groups[0] = "1" if groups[0] == "2" else "2"
    (run.dir / "plan.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match="one of them was changed after pruning"):
        pruning.read_plan(run)


@pytest.mark.prove
def test_a_narrowed_student_heals_with_no_layer_shared(teacher: Path, tmp_path: Path) -> None:
    """Losses on states too, from the first layer on."""
    losses = [{"kind": "forward_kl"}, {"kind": "hidden_states", "weight": 0.1}]
    training = small_training(trainable="from_first_cut", losses=losses)
    sections = {"distill": training, "track": {"wandb": "off"}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(safe_dump(settings(teacher, tmp_path, **sections)))
    run = run_of(teacher, tmp_path, **sections)
    preflight(run)
    pruning.prune(run)
    spec = distill.training_spec(run, pruning.read_plan(run), Ranks.here())
    assert (spec.frozen_layers, spec.shared_layers, spec.trained.layers) == (0, 0, tuple(range(5)))
    with pytest.raises(UserError, match=r"teacher.prefix: .*first change is at layer 0"):
        recorded_layers(spec.trained, spec.plan, spec.settings)
    ended = run_ranks(["distill", "--config", str(recipe)], ranks=1, env=environment(), cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    losses_by_step = [row["loss"] for row in Training.load(run.dir / Training.FILE).history if "loss" in row]
    assert len(losses_by_step) == STEPS
    assert losses_by_step[-1] < losses_by_step[0]
    healed = load_model(run.dir / "distilled")
    assert healed.config.intermediate_size == 32


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"measure": {**MEASURE, "data": "nowhere.jsonl"}}, "nowhere.jsonl"),
        ({"measure": {**MEASURE, "sequence_length": 9999}}, "measure.sequence_length: 9999"),
        ({"prune": {"changes": [{**WIDTH, "intermediate_size": 40}]}}, "a multiple of 16 up to 48"),
        (
            {"prune": {"changes": [{**WIDTH, "num_key_value_heads": 3}]}},
            "num_key_value_heads: 3 is more than the 2 of the model",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(
    teacher: Path, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        preflight(run_of(teacher, tmp_path, **sections))
    assert not (tmp_path / "run").exists()
