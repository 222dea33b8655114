"""The example in the docstring of every public name runs on a tiny model, and results show as a table in a notebook."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM

import shoal

TEXTS = [f"{n} times {n} is {n * n}; {n} and {n} are {n + n}." for n in range(300)]


class Checker(doctest.OutputChecker):
    """An example that shows no value may have any."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


@pytest.fixture(scope="module")
def made(teacher: Path) -> dict[str, Any]:
    """What the examples take as given."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(teacher), tiny_tokenizer()
    importance = shoal.measure_importance(model, tokenizer, TEXTS, num_tokens=500, sequence_length=100)
    plan = shoal.choose_layers(importance, num_drop=2)
    student = shoal.cut_model(model, plan)
    training = shoal.distill(student, model, TEXTS, tokenizer=tokenizer, num_tokens=800, sequence_length=100)
    scores = {
        role: shoal.evaluate(own, tokenizer, ["knowledge_continuation"], limit=10, role=role)
        for role, own in {"teacher": model, "pruned": shoal.cut_model(model, plan), "distilled": student}.items()
    }
    run = shoal.Run(Path("runs/mine"), importance, plan, training, scores)
    dataset = Dataset.from_dict({"text": TEXTS})
    named = {"model": model, "tokenizer": tokenizer, "student": student, "plan": plan, "dataset": dataset, "run": run}
    return {"shoal": shoal, "texts": TEXTS, "importance": importance, "training": training, **named, **scores}


@pytest.mark.prove
@pytest.mark.parametrize("name", shoal.__all__)
def test_the_example_of_a_public_name_runs(
    name: str, made: dict[str, Any], teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # a launched training asks this machine what it multiplies fast in: so does this process
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shoal.launch.api.running.push", lambda folder, card, repo, **_: repo)
    made["run"].save("runs/mine")
    few = {"num_tokens": 800, "sequence_length": 100}
    recipe = {"model": str(teacher), "measure": few, "distill": few, "prune": {"num_drop": 2}}
    recipe["eval"] = {"tasks": ["knowledge_continuation"], "limit": 10, "perplexity_tokens": 0, "speed": False}
    Path("mine.yaml").write_text(yaml.safe_dump(recipe))
    (example,) = doctest.DocTestFinder(recurse=False).find(getattr(shoal, name), name, globs=made)
    shown: list[str] = []
    runner = doctest.DocTestRunner(Checker(), optionflags=doctest.ELLIPSIS)
    assert runner.run(example, out=shown.append).attempted > 0
    assert not runner.failures, "".join(shown)


def test_every_result_shows_as_a_table_in_a_notebook(made: dict[str, Any]) -> None:
    results = [made[name] for name in ("importance", "plan", "training", "teacher", "run")]
    for result in (*results, shoal.compare(made["teacher"], made["pruned"])):
        assert "<table" in result._repr_html_()
