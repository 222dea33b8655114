"""Wrong values are refused in the same words by a recipe and by the functions of Python, before anything is done.

wrong_values.yaml has them: by key what both say after its place, and what only Python can be given.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pandas import DataFrame, Series
from tiny import tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

import shoal
from shoal.artifacts.artifact import Provenance
from shoal.artifacts.importance import Importance
from shoal.launch.api import running
from shoal.launch.early import refuse_early
from shoal.launch.verbs.dry_run import dry_run
from shoal.launch.verbs.pipeline import preflight
from shoal.launch.verbs.run import Run, open_run
from shoal.recipe.recipe import parse_recipe

TEXTS = [f"Document {number} says {number * number}, and then some more." for number in range(24)]
ONLY_A_RECIPE: Any = ("nobody", {"kind": "recorded", "top_k": 0})
"""Teachers of a recipe; Python's is a model."""
SMALL: Any = {"num_tokens": 64, "sequence_length": 32}


def on_meta() -> PreTrainedModel:
    """A model without weights."""
    model: Any = tiny_model("llama")
    return model.to("meta")


def large_tokenizer() -> Any:
    """One that makes ids of text which the models here have no embeddings for."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"word{number}" for number in range(20)])
    tokenizer.add_special_tokens({"eos_token": "word19"})
    return tokenizer


def scored(score: Any, *, count: int = 6) -> Importance:
    """Layers that have been given such scores."""
    return Importance(Provenance({}), 6, 1, {"block_influence": (score,) * count}, {})


NAMES = {
    "np": np,
    "torch": torch,
    "DataFrame": DataFrame,
    "Series": Series,
    "on_meta": on_meta,
    "large_tokenizer": large_tokenizer,
    "scored": scored,
}


class _Loader(yaml.SafeLoader):
    """`!python` is an expression."""


def _evaluated(loader: Any, node: Any) -> Any:
    return eval(loader.construct_scalar(node), NAMES)


_Loader.add_constructor("!python", _evaluated)
TABLE = yaml.load(Path(__file__).with_name("wrong_values.yaml").read_text(), Loader=_Loader)
BOTH = [(place, *row) for place, rows in TABLE["both"].items() for row in rows]
TAKEN = [(place, value) for place, values in TABLE["taken"].items() for value in values]
PYTHON = [(call, *row) for call, rows in TABLE["python"].items() for row in rows]


@pytest.fixture(scope="module")
def importance() -> Importance:
    return shoal.measure_importance(tiny_model("llama"), tiny_tokenizer(), TEXTS, **SMALL)


@pytest.fixture
def python(
    teacher: Path, importance: Importance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str, Any], object]]:
    """What calls the function that takes a key; afterwards nothing is written, and the models are as they were."""
    model, student, tokenizer = tiny_model("llama"), tiny_model("llama", num_hidden_layers=4), tiny_tokenizer()
    before = [{name: weight.clone() for name, weight in one.state_dict().items()} for one in (model, student)]
    monkeypatch.chdir(tmp_path)

    def refuse_only(run: Run, _: Any) -> None:
        preflight(run)
        raise AssertionError("it would be run")

    monkeypatch.setattr(running, "run_all", refuse_only)

    def call(place: str, value: Any) -> object:
        section, _, key = place.partition(".")
        measured: Any = {"model": model, "tokenizer": tokenizer, "data": TEXTS, **SMALL}
        healed: Any = {"teacher": model, "data": TEXTS, "tokenizer": tokenizer, "sequence_length": 32, "drop": (1, 2)}
        scored: Any = {"model": model, "tokenizer": tokenizer, "tasks": "brackets_depth3_continuation", "limit": 1}
        chosen: Any = {"importance": importance}
        own: Any = {key: value}
        match section:
            case "measure":
                return shoal.measure_importance(**(measured | own))
            case "prune" if key == "drop":
                return shoal.cut_model(model, value)
            case "prune" if key == "changes":
                return shoal.cut_model(model, [2], changes=value, tokenizer=tokenizer, data=TEXTS)
            case "prune":
                return shoal.choose_layers(**(chosen | own))
            case "distill" if key not in ("deepspeed", "watch", "profile") and value not in ONLY_A_RECIPE:
                return shoal.distill(student, **({"trainer": {"max_steps": 1}} | healed | own))
            case "eval" if key != "speed":
                return shoal.evaluate(**(scored | own))
            case "seed":
                return shoal.measure_importance(**measured, seed=value)
            case "run":
                return shoal.run(value)
            case "compare":
                return shoal.compare(value)
        return shoal.run({"model": str(teacher), "run_dir": str(tmp_path / "run"), **recipe_of(place, value)})

    yield call
    assert list(tmp_path.iterdir()) == []
    for one, weights in zip((model, student), before, strict=True):
        assert all(torch.equal(weight, weights[name]) for name, weight in one.state_dict().items())


def recipe_of(place: str, value: Any) -> dict[str, Any]:
    section, _, key = place.partition(".")
    beside = {"drop": [2]} if place == "prune.changes" else {}
    return {section: {key: value, **beside} if key else value}


def read(teacher: Path, folder: Path, place: str, value: Any, *, is_late: bool) -> None:
    """What the command does with a recipe before anything is computed; the model is looked at where ``is_late``."""
    recipe = parse_recipe({"model": str(teacher), "run_dir": str(folder / "run"), **recipe_of(place, value)})
    assert is_late, "the reader has taken it"
    verb = section if (section := place.partition(".")[0]) in ("measure", "prune", "distill", "eval") else "run"
    refuse_early(verb, recipe)
    dry_run(verb, open_run(recipe))


@pytest.mark.every_case
@pytest.mark.parametrize("row", BOTH, ids=lambda row: f"{row[0]}={row[1]!r}"[:60])
def test_both_doors_refuse_in_the_same_words(
    teacher: Path, tmp_path: Path, python: Callable[[str, Any], object], row: tuple[Any, ...]
) -> None:
    place, value, words, *late = row
    said = []
    for door in (lambda: read(teacher, tmp_path, place, value, is_late=bool(late)), lambda: python(place, value)):
        with pytest.raises(shoal.UserError) as refused:
            door()
        message = str(refused.value)
        said.append(message.partition(place.rpartition(".")[2])[2] or message)  # of another key than that of the table
    assert said[0] == said[1]
    assert words in said[0]
    assert len(said[0].splitlines()) == 1


@pytest.mark.every_case
@pytest.mark.parametrize("row", PYTHON, ids=[f"{row[0]}-{number}" for number, row in enumerate(PYTHON)])
def test_what_only_python_can_be_given_is_refused(python: Callable[[str, Any], object], row: tuple[Any, ...]) -> None:
    place, value, words = row
    with pytest.raises(shoal.UserError) as refused:
        python(place, value)
    assert words in str(refused.value)


@pytest.mark.parametrize(("place", "value"), TAKEN)
def test_what_only_looks_odd_is_taken(python: Callable[[str, Any], object], place: str, value: Any) -> None:
    result: Any = python(place, value)
    if isinstance(result, Importance):
        json.dumps(result.body())


def test_numbers_of_numpy_and_paths_are_those_of_python(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, asked = tmp_path / "text.jsonl", []
    text.write_text("\n".join(json.dumps({"text": one}) for one in TEXTS))
    monkeypatch.setattr(running, "run_all", lambda run, _: asked.append(run.recipe))
    distill = {"trainer": {"learning_rate": 3e-4, "max_steps": 2, "bf16": False}, "data": [{"path": str(text)}]}
    plain = {"model": str(teacher), "run_dir": str(tmp_path / "run"), "prune": {"drop": [1, 2]}, "distill": distill}
    other: Any = {"learning_rate": np.float64(3e-4), "max_steps": np.int64(2), "bf16": np.bool_(False)}
    odd = {"model": teacher, "run_dir": tmp_path / "run", "prune": {"drop": (np.int64(1), np.array(2))}}
    for recipe in (plain, odd | {"distill": {"trainer": other, "data": [{"path": text}]}}):
        with contextlib.suppress(shoal.UserError):  # nothing is there afterwards
            shoal.run(recipe)
    assert asked[0] == asked[1]
    measured = shoal.measure_importance(tiny_model("llama"), tiny_tokenizer(), text, **SMALL)
    assert len(measured.layers["block_influence"]) == 6
    args = shoal.DistillationConfig(str(tmp_path), **other)
    json.dumps([args.max_steps, args.learning_rate])


def test_several_numbers_are_no_number() -> None:
    for value in (np.array([1.0, 2.0]), torch.tensor([1.0, 2.0]), np.float64):
        with pytest.raises(shoal.UserError, match=r"trainer\.learning_rate: must be a number \(got"):
            shoal.DistillationConfig("out", learning_rate=value)  # pyright: ignore[reportArgumentType]


def test_what_is_compared_must_be_scores() -> None:
    for given in (None, 0.5):
        with pytest.raises(shoal.UserError, match=rf"compare: is {type(given).__name__}; give Scores, or Scores.load"):
            shoal.compare(*[given] * 2)  # pyright: ignore[reportArgumentType]


def test_the_table_is_long_enough_and_covers_every_function() -> None:
    assert len(BOTH) >= 200
    assert len(PYTHON) >= 30


def test_gradients_are_not_asked_of_inference_mode() -> None:
    with torch.inference_mode(), pytest.raises(shoal.UserError, match="inference_mode takes no gradients"):
        shoal.measure_importance(tiny_model("llama"), tiny_tokenizer(), TEXTS, metrics="taylor", **SMALL)
