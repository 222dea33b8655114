"""The recipes that a new user is shown, as they are written: each is read, and its dry run tells what would be done.
The model of the Hub is a tiny one of its family, its data are a few rows, and tasks of the Hub are one that is bundled.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_checkpoint

from shoal.artifacts.plan import Plan
from shoal.compress.sweeps import placeholder, sweep
from shoal.data import sources
from shoal.eval import evaluate
from shoal.eval.evaluate import Work
from shoal.eval.tasks import load, names
from shoal.launch.cli import run_verb
from shoal.launch.verbs import dry_run, pace
from shoal.launch.verbs import run as runs
from shoal.models import download
from shoal.models.load import load_config
from shoal.recipe.asked import ALLOW
from shoal.recipe.section import DataSource

RECIPES = Path(__file__).with_name("recipes")
MODELS = {"smallest": ("qwen3", 28, 4), "laptop": ("llama", 30, 3), "8b": ("qwen3", 36, 8)}
"""Recipe -> family and layers of its model, and layers that go."""
BOUND_AS_LOADED = (placeholder, sweep)
"""Modules that keep the functions they import: loaded while a stand-in is there, they would keep that."""
FACTS = {
    "smallest": ["drops:", "ZeRO 0"],
    "laptop": ["drops:   13, 14, 26", "control: after the student"],
    "8b": ["a stand-in: 8 of 36 layers", "ZeRO 3", "524,288 tokens; 382 steps", "control: after the student"],
}
TURNS = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A stand-in."}]
TEMPLATE = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}</s>{% endfor %}"


def small(folder: Path, name: str) -> Path:
    """A tiny model with the layers of the recipe's, which has a chat template."""
    family, layers, _ = MODELS[name]
    further: dict[str, Any] = {"layer_types": ["full_attention"] * layers} if family == "qwen3" else {}
    model = tiny_checkpoint(folder, family, num_hidden_layers=layers, max_position_embeddings=8192, **further)
    (model / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return model


def hub_rows(source: DataSource) -> list[dict[str, Any]]:
    return [{"messages": TURNS} if "smoltalk" in source.path else {"text": "A document of the Hub."}] * 4


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_dry_run_of_a_recipe_as_written_passes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small(tmp_path, name)
    monkeypatch.setattr(runs, "resolve_model", lambda *_, **__: model)
    monkeypatch.setattr(runs, "find_config", lambda *_, **__: load_config(model))
    config = load_config(model).to_dict()
    monkeypatch.setattr(download, "config_of", lambda *_, **__: (config, None))
    monkeypatch.setattr(sources, "_hub_rows", hub_rows)
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
    if name == "8b":  # its tasks are on the Hub
        monkeypatch.setattr(names, "refuse_offline", lambda *_: None)
        monkeypatch.setattr(load, "tasks_of", lambda *_, **__: {})
        for name_of in ("checked_items", "num_items"):
            monkeypatch.setattr(evaluate, name_of, lambda *_, **__: {})
        monkeypatch.setattr(pace, "eval_work", lambda *_: Work(7, 7, 700, 0))
        monkeypatch.setattr(dry_run, "eval_work", pace.eval_work)
    allowed = [f"{ALLOW}=send"] if name == "8b" else []  # it goes to W&B and the Hub
    code = run_verb("run", str(RECIPES / f"{name}.yaml"), [f"run_dir={tmp_path / 'run'}", *allowed], dry_run=True)
    told = capsys.readouterr()
    assert code == 0, told.err
    assert all(fact in told.out for fact in FACTS[name]), told.out
    assert not (tmp_path / "run").exists()


@pytest.mark.prove
@pytest.mark.parametrize("name", ["smallest", "laptop"])
def test_a_recipe_as_written_runs_to_its_report_on_a_tiny_model(name: str, tmp_path: Path) -> None:
    here = [f"model={small(tmp_path, name)}", f"run_dir={tmp_path / 'run'}", "measure.num_tokens=256"]
    here += ["distill.num_tokens=1024", "distill.sequence_length=64", "eval.limit=2", "eval.perplexity_tokens=100"]
    words = [sys.executable, "-m", "shoal.launch.cli", "run", str(RECIPES / f"{name}.yaml"), *here]
    done = subprocess.run([*words, "track.wandb=off", "eval.speed=false"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(Plan.load(tmp_path / "run").drop) == MODELS[name][2]
    roles = {file.stem for file in (tmp_path / "run/eval").glob("*.json")}
    assert roles == {"teacher", "pruned", "distilled", *(["control"] if name == "laptop" else [])}
    assert (tmp_path / "run/report.html").is_file()
