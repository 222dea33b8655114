"""Every part on a run of a tiny model: what it writes, once, and what it says.

Covers: shoal.lab.sweeps.
"""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import tiny_checkpoint

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.importance import Importance, Removal
from shoal.components import Component
from shoal.errors import UserError
from shoal.lab import command, sweeps
from shoal.lab import heads as heads_part
from shoal.launch.verbs.measure import measure
from shoal.launch.verbs.prune import prune
from shoal.launch.verbs.run import open_run
from shoal.recipe.recipe import load_recipe

SWEEP = {"tasks": ["knowledge_continuation", "reasoning_worked"], "limit": 10}


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    teacher = tiny_checkpoint(tmp_path / "teacher", "llama", max_position_embeddings=4096)
    measure = {"num_tokens": 512, "sequence_length": 64, "batch_size": 2, "sweep": SWEEP}
    raw = {"model": str(teacher), "run_dir": str(tmp_path / "run"), "measure": measure, "prune": {"drop": [2]}}
    (tmp_path / "my.yaml").write_text(json.dumps(raw))
    return str(tmp_path / "my.yaml")


def lab(words: list[str]) -> str:
    return command.lab(Namespace(words=words))


def test_heads_say_which_layers_to_protect_and_are_scored_once(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copying = ((0.0,) * 4, (0.0,) * 4, (0.2, 0.0, 0.0, 0.0), (0.0, 0.9, 0.5, 0.0), (0.0,) * 4, (0.05, 0.0, 0.0, 0.0))
    monkeypatch.setattr(heads_part, "score_heads", lambda *_, **__: (7, copying))
    said = lab(["heads", recipe, "tasks=[retrieval]", "num_each=1"])
    assert "prune.protect: [2, 3]" in said
    monkeypatch.setattr(heads_part, "score_heads", lambda *_, **__: pytest.fail("scored again"))
    assert lab(["heads", recipe, "tasks=[retrieval]", "num_each=1"]) == said
    assert {file.name for file in (tmp_path / "run/lab").iterdir()} == {"heads.json", "heads.svg"}


@pytest.mark.prove
def test_diagnostics_are_written_and_told(recipe: str, tmp_path: Path) -> None:
    assert "effective depth by kl" in lab(["diagnostics", recipe])
    assert {file.name for file in (tmp_path / "run/lab").iterdir()} == {"diagnostics.json"}


@pytest.mark.prove
def test_a_model_that_answers_nothing_right_has_nothing_to_patch(recipe: str) -> None:
    with pytest.raises(UserError, match="answers none of"):
        lab(["patching", recipe, "counterparts=6"])


@pytest.mark.prove
def test_depth_use_sweeps_the_cut_model_and_one_beside(recipe: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no pruned model yet"):
        lab(["depth_use", recipe])
    prune(open_run(load_recipe(recipe)))
    beside = tiny_checkpoint(tmp_path / "beside", "llama", max_position_embeddings=4096, seed=1)
    assert "teacher to pruned: " in lab(["depth_use", recipe, f"beside={beside}"])
    use = json.loads((tmp_path / "run/lab/depth_use.json").read_text())
    assert use["kept"] == {"teacher": [0, 1, 2, 3, 4, 5], "pruned": [0, 1, 3, 4, 5], "beside": [0, 1, 2, 3, 4, 5]}
    short = tiny_checkpoint(tmp_path / "short", "llama", max_position_embeddings=4096, num_hidden_layers=2)
    with pytest.raises(UserError, match="has 2 layers and not 6"):
        lab(["depth_use", recipe, f"beside={short}"])


@pytest.mark.prove
def test_sweeps_and_reading_are_written_and_told(recipe: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run the stage that makes it first"):
        lab(["sweeps", recipe, "operators=[cumulative]"])
    measure(open_run(load_recipe(recipe)))
    donor = tiny_checkpoint(tmp_path / "donor", "llama", max_position_embeddings=4096, seed=1)
    said = lab(["sweeps", recipe, "operators=[kv_group, cumulative, donor]", "max_removed=2", f"donor={donor}"])
    assert "cumulative, knowledge/continuation: " in said
    names = {"sweeps.json", "sweep_kv_group.svg", "sweep_cumulative.svg", "sweep_donor.svg"}
    assert {file.name for file in (tmp_path / "run/lab").iterdir()} == names
    tables = json.loads((tmp_path / "run/lab/sweeps.json").read_text())["tables"]
    assert [len(tables[name]["units"]) for name in ("kv_group", "cumulative", "donor")] == [12, 2, 6]
    assert "reading is needed" in lab(["reading", recipe])
    for words, message in (
        (["operators=[donor]"], "needs a donor, and a donor"),
        (["operators=[cumulative]", "order=taylr"], "is not in importance.json"),
    ):
        with pytest.raises(UserError, match=message):
            lab(["sweeps", recipe, *words])


def test_cumulative_removals_end_where_a_greedy_order_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of layers that the order never took it says nothing, and by their numbers layer 0 would be the next to go."""
    order = tuple(Removal(Component((layer,)), 0.0) for layer in (3, 1))
    scores = {"block_influence": (0.5, 0.1, 0.3, 0.2, 0.4, 0.6)}
    importance = Importance(Provenance({}), 6, 1, scores, {}, orders={"sleb": order})
    monkeypatch.setattr(sweeps, "importance_of", lambda _: SimpleNamespace(require=lambda: importance))
    run: Any = SimpleNamespace(dir=tmp_path, num_layers=6)
    assert sweeps._order(run, sweeps.Settings(("cumulative",), order="sleb")) == (3, 1)
    assert sweeps._order(run, sweeps.Settings(("cumulative",))) == (1, 3, 2, 4, 0)
