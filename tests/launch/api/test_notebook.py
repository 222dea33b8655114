"""docs/first_steps.ipynb: all its cells, as a reader runs them; on the demo model where it is installed."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM

import shoal
from shoal.artifacts.artifact import Tabular
from shoal.model_names import DEMO_MODELS
from shoal.models.resolve import DEMO_REMEDY

NOTEBOOK = Path(__file__).parents[3] / "docs/first_steps.ipynb"
SMALLER = {"NUM_DROP": 2, "MEASURED_TOKENS": 256, "TRAINED_TOKENS": 1024, "LENGTH": 128, "ITEMS": 11}
"""Budgets of a test; 11 is as few items as a sweep of 30 layers takes."""
SHORT = {"SWEPT": ["knowledge_continuation"], "TASKS": ["knowledge_continuation", "knowledge_reworded_continuation"]}
"""Tasks of the fewest tokens, for a real model."""


def cells(kind: str = "code") -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def executed(settings: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """The notebook's names and what its cells have shown, with ``settings`` behind its parameters."""
    names: dict[str, Any] = {}
    shown: list[Any] = []
    for number, cell in enumerate(cells()):
        tree = ast.parse("".join(cell["source"]))
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
def test_all_its_cells_run(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_demo: bool) -> None:
    if is_demo and importlib.util.find_spec(DEMO_MODELS["smollm2-135m"][0]) is None:
        pytest.skip(f"the demo model is not installed; run: {DEMO_REMEDY}")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names, shown = executed({**SMALLER, **(SHORT if is_demo else {"MODEL": str(teacher)})})
    tables = [one for one in shown if isinstance(one, Tabular)]
    assert all(table._repr_html_().count("<tr") > len(names["TASKS"]) for table in tables)
    assert [type(one).__name__ for one in tables] == ["Importance", "Plan", "Scores", "Comparison", "Comparison"]
    assert sum(isinstance(one, Figure) for one in shown) == 3
    assert names["importance"].atlas.columns
    healed = AutoModelForCausalLM.from_pretrained(tmp_path / "healed")
    assert healed.config.num_hidden_layers == names["importance"].num_layers - 2
    losses = [row["loss"] for row in names["training"].history if "loss" in row]
    assert len(losses) == 2
    assert losses[-1] < losses[0] or not is_demo


def test_it_is_kept_without_outputs_and_calls_what_there_is() -> None:
    """Numbers of one machine would grow old unseen, and every run would change the file."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["metadata"]["language_info"]["name"]) == (4, "python")
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells())
    called = {
        node.attr
        for cell in cells()
        for node in ast.walk(ast.parse("".join(cell["source"])))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "shoal"
    }
    assert called == {name for name in shoal.__all__ if name.islower()} - {"push_to_hub", "run"}


def test_its_links_lead_somewhere() -> None:
    text = "".join(line for cell in cells("markdown") for line in cell["source"])
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert targets
    assert all((NOTEBOOK.parent / target).is_file() for target in targets)
