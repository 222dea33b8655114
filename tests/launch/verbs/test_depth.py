"""The depth stage: every model that is there swept over the same columns, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import NUM_LAYERS, tiny_checkpoint

from shoal.artifacts.depth import DepthUse, Diagnostics
from shoal.artifacts.importance import Importance
from shoal.errors import UserError
from shoal.launch.verbs import run as running
from shoal.launch.verbs.depth import _models, depth
from shoal.launch.verbs.prune import prune
from shoal.launch.verbs.run import Run, open_run
from shoal.recipe.recipe import parse_recipe

SWEEP = {"tasks": ["knowledge_continuation"], "limit": 10, "perplexity_tokens": 800, "sequence_length": 64}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("teacher"), "llama", max_position_embeddings=4096)


def opened(teacher: Path, folder: Path, measure: dict[str, Any] | None = None) -> Run:
    few = {"num_tokens": 64, "sequence_length": 32, "batch_size": 2, "sweep": SWEEP, **(measure or {})}
    raw = {"model": str(teacher), "run_dir": str(folder / "run"), "measure": few, "prune": {"drop": [2]}}
    return open_run(parse_recipe(raw))


@pytest.mark.slow
def test_the_cut_model_and_one_beside_are_swept_as_the_teacher_was(
    teacher: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    beside = tiny_checkpoint(tmp_path_factory.mktemp("beside"), "llama", max_position_embeddings=4096, seed=1)
    sweep = {**SWEEP, "operators": ["layer", "donor"], "donor": str(beside)}
    run = opened(teacher, tmp_path, {"beside": str(beside), "sweep": sweep})
    prune(run)
    depth(run)
    use = DepthUse.read(run.dir / DepthUse.FILE)
    whole, cut = tuple(range(NUM_LAYERS)), tuple(layer for layer in range(NUM_LAYERS) if layer != 2)
    assert use.kept == {"teacher": whole, "pruned": cut, "beside": whole}
    assert set(use.effective_depth) == {"teacher", "pruned", "beside"}
    text = next(task for task in use.tasks if task.task == "perplexity")
    assert [(moved.before, moved.after) for moved in text.moved] == [
        ("teacher", "pruned"),
        ("teacher", "beside"),
        ("pruned", "beside"),
    ]
    assert text.moved[0].layers == cut
    assert text.moved[1].centroid is not None
    assert text.moved[1].centroid.value != 0, "another model"
    folders = {role: run.root / "depth" / role for role in ("pruned", "beside")}
    measured = {role: Importance.read(folder / Importance.FILE) for role, folder in folders.items()}
    assert measured["pruned"].num_layers == NUM_LAYERS - 1
    assert all((folder / Diagnostics.FILE).is_file() for folder in folders.values())
    assert (run.root / "figures/depth_use.svg").is_file()
    times = {role: (folder / Importance.FILE).stat().st_mtime_ns for role, folder in folders.items()}
    depth(run)
    assert times == {role: (folder / Importance.FILE).stat().st_mtime_ns for role, folder in folders.items()}
    other = opened(teacher, tmp_path, {"beside": str(teacher)})
    depth(other)
    again = DepthUse.read(run.dir / DepthUse.FILE)
    moved = next(task for task in again.tasks if task.task == "perplexity").moved[1]
    assert moved.after == "beside"
    assert all(change.value == 0 for change in moved.left), "the teacher itself"


def test_what_cannot_be_compared_is_refused_before_anything_is_measured(
    teacher: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.raises(UserError, match=r"holds no cut model yet, and measure\.beside names none"):
        depth(opened(teacher, tmp_path))
    with pytest.raises(UserError, match=r"name some in measure\.sweep\.tasks"):
        depth(opened(teacher, tmp_path, {"sweep": None}))
    short = tiny_checkpoint(tmp_path_factory.mktemp("short"), "llama", num_hidden_layers=2)
    with pytest.raises(UserError, match=rf"measure\.beside: .* has 2 layers and the teacher {NUM_LAYERS}"):
        depth(opened(teacher, tmp_path, {"beside": str(short)}))
    other = tiny_checkpoint(tmp_path_factory.mktemp("other"), "llama", max_position_embeddings=4096)
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": config["eos_token"]}))
    with pytest.raises(UserError, match="in the tokenizer of beside, but"):
        depth(opened(teacher, tmp_path, {"beside": str(other)}))
    assert not (tmp_path / "run").exists()


def test_only_the_teacher_is_measured_on_images(teacher: Path, tmp_path: Path) -> None:
    images = {"path": str(tmp_path / "rows.jsonl")}
    models = _models(opened(teacher, tmp_path, {"beside": str(teacher), "images": images}))
    assert models["teacher"].recipe.measure.images is not None
    assert models["beside"].recipe.measure.images is None


def test_the_model_beside_is_looked_up_once(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks wait for each other where it is; what rank 0 alone asks for later must not wait."""
    run = replace(opened(teacher, tmp_path, {"beside": str(teacher)}), measured="beside")
    asked: list[str] = []
    monkeypatch.setattr(running, "resolved", lambda model, _: asked.append(model) or Path(model))
    assert [run.base, run.base] == [teacher, teacher]
    assert asked == [str(teacher)]
