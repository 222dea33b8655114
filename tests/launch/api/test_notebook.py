"""The notebooks of docs/: all their cells, as a reader runs them; on the demo model if it is installed."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM

import shoal
from shoal.artifacts.artifact import Tabular
from shoal.model_names import DEMO_MODELS
from shoal.models.resolve import DEMO_REMEDY

DOCS = Path(__file__).parents[3] / "docs"
NAMES = ("first_steps", "own_model")
SMALLER = {
    "first_steps": {"MEASURED_TOKENS": 256, "TRAINED_TOKENS": 1024, "LENGTH": 128, "ABLATED_ITEMS": 11, "ITEMS": 11},
    "own_model": {"TOKENS": 2048, "ITEMS": 10},
}
"""Budgets of a test; 11 is as few items as an ablation of 30 layers takes."""
TABLES = {"first_steps": ["Importance", *["Comparison"] * 3], "own_model": ["Comparison"]}
FIGURES = {"first_steps": 3, "own_model": 1}


def cells(name: str, kind: str = "code") -> list[dict[str, Any]]:
    notebook = json.loads((DOCS / f"{name}.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def trees(name: str) -> list[ast.Module]:
    return [ast.parse("".join(cell["source"])) for cell in cells(name)]


def executed(name: str, settings: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """The notebook's names and the values of its cells, with ``settings`` in place of its parameters."""
    names: dict[str, Any] = {}
    shown: list[Any] = []
    for number, (cell, tree) in enumerate(zip(cells(name), trees(name), strict=True)):
        shows = isinstance(tree.body[-1], ast.Expr) and not "".join(cell["source"]).rstrip().endswith(";")
        last = ast.Expression(tree.body.pop().value) if shows else None  # pyright: ignore[reportAttributeAccessIssue]
        exec(compile(tree, f"cell {number}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert settings.keys() <= names.keys()
            names |= settings
        if last is not None:
            shown.append(eval(compile(last, f"cell {number}", "eval"), names))
    return names, shown


@pytest.mark.prove
@pytest.mark.parametrize("is_demo", [False, True], ids=["tiny", "demo"])
@pytest.mark.parametrize("name", NAMES)
def test_all_its_cells_run(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_demo: bool
) -> None:
    if is_demo and importlib.util.find_spec(DEMO_MODELS["smollm2-135m"][0]) is None:
        pytest.skip(f"the demo model is not installed; run: {DEMO_REMEDY}")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("HF_TOKEN", "none")
    for method in ("create_repo", "repo_info", "upload_folder"):  # which a notebook replaces
        monkeypatch.setattr(HfApi, method, getattr(HfApi, method))
    plt.close("all")
    names, shown = executed(name, {**SMALLER[name], "NUM_DROP": 2, **({} if is_demo else {"MODEL": str(teacher)})})
    tables = [one for one in shown if isinstance(one, Tabular)]
    assert [type(one).__name__ for one in tables] == TABLES[name]
    assert all("<tr" in table._repr_html_() for table in tables)
    assert len(plt.get_fignums()) == FIGURES[name]
    folder = {"first_steps": "distilled", "own_model": "hub"}[name]
    distilled = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
    assert distilled.config.num_hidden_layers == (28 if is_demo else 4)
    training = names["training"] if name == "first_steps" else names["run"].training
    assert len([row for row in training.history if "loss" in row]) > 1


@pytest.mark.parametrize("name", NAMES)
def test_it_is_kept_with_the_outputs_of_one_run_from_its_first_cell_to_its_last(name: str) -> None:
    kept = [None if "log" in cell["metadata"].get("tags", ()) else number for number, cell in enumerate(cells(name), 1)]
    assert [cell["execution_count"] for cell in cells(name)] == kept
    outputs = [output for cell in cells(name) for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"execute_result", "display_data", "stream"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == FIGURES[name]
    assert sum("text/html" in output.get("data", {}) for output in outputs) == len(TABLES[name])
    assert not [output for output in outputs if output.get("name") == "stderr"]


def test_they_use_public_names_only_and_together_every_function_that_makes_something() -> None:
    nodes = [node for name in NAMES for tree in trees(name) for node in ast.walk(tree)]
    froms = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    assert not [module for module in froms if module.startswith("shoal")]
    attributes = [node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    called = {node.attr for node in attributes if node.value.id == "shoal"}  # pyright: ignore[reportAttributeAccessIssue]
    assert called == {name for name in shoal.__all__ if name.islower()} - {"push_to_hub"}  # a run's own


@pytest.mark.parametrize("name", NAMES)
def test_its_links_lead_somewhere(name: str) -> None:
    text = "".join(line for cell in cells(name, "markdown") for line in cell["source"])
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert targets
    assert all((DOCS / target).is_file() for target in targets)
