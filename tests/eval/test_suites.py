"""Suites: what a name stands for, what it costs, and how a recipe adds to it.

Covers: shoal.recipe.evaluate.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_checkpoint

from shoal.errors import UserError
from shoal.eval.evaluate import num_items, work_of
from shoal.eval.tasks.data_sets import read_data_sets
from shoal.eval.tasks.load import tasks_of
from shoal.eval.tasks.names import (
    HUB_TASKS_DIR,
    TASKS_DIR,
    _collection,
    described_tasks,
    refuse_unknown,
    task_folders,
    tasks_in_files,
)
from shoal.launch.verbs import evaluate
from shoal.launch.verbs.run import open_run
from shoal.recipe.evaluate import DEFAULT, SUITES, SUITES_DIR, Eval, limit_of, read_suite
from shoal.recipe.recipe import parse_recipe
from shoal.recipe.section import as_dict


def evaluation(**settings: Any) -> Eval:
    return parse_recipe({"model": "m", "run_dir": "r", "eval": settings}).eval


def test_there_is_a_file_for_every_name_and_it_asks_only_tasks_that_exist() -> None:
    assert {file.stem for file in SUITES_DIR.glob("*.yaml")} == set(SUITES)
    described, tags = described_tasks(task_folders(None))
    known = {*described, *tags, *tasks_in_files(HUB_TASKS_DIR)}
    for name in SUITES:
        suite = read_suite(name)
        assert not set(suite.tasks) - known
        assert len(set(suite.tasks)) == len(suite.tasks)
        assert not isinstance(suite.limit, dict) or suite.limit.keys() <= {DEFAULT, *suite.tasks}
    # what lm-eval calls so could no longer be named
    assert not _collection().keys() & set(SUITES)


def test_a_suite_is_spelled_out_and_what_the_recipe_says_wins() -> None:
    suite = read_suite("quick")
    plain = evaluation(tasks="quick")
    assert (plain.tasks, plain.limit, plain.perplexity_tokens) == (suite.tasks, suite.limit, suite.perplexity_tokens)
    assert parse_recipe({"model": "m", "eval": as_dict(plain)}).eval == plain
    own, first = {"reasoning_generation": 16, "needle_20sentences_generation": 20}, suite.tasks[0]
    assert isinstance(suite.limit, dict)
    assert suite.limit == {"default": 40, **own}
    further = evaluation(tasks=["kv_8pairs_generation", "quick", first], limit={first: 2}, perplexity_tokens=7)
    assert further.tasks == ("kv_8pairs_generation", *suite.tasks)
    assert (further.limit, further.perplexity_tokens) == ({**suite.limit, first: 2}, 7)
    assert evaluation(tasks="quick", limit=18).limit == {"default": 18, **own, "needle_20sentences_generation": 18}
    assert evaluation(tasks="quick", limit=None).limit == {"default": None, **own}
    both = evaluation(tasks=["full", "transfer", "quick"])
    assert both.limit == {"default": None, **own, "needle_20sentences_generation": 50, "wikitext2_rolling": 4}
    assert both.perplexity_tokens == read_suite("full").perplexity_tokens


def test_old_names_of_tasks_are_read_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    asked = evaluation(tasks=["refusal_harmful_twin_generation", "shoal_twins", "my_twin"], limit={"json_twin": 3})
    assert asked.tasks == ("refusal_harmful_reworded_generation", "shoal_reworded", "my_twin")
    assert asked.limit == {"default": 200, "json_reworded": 3}
    assert "refusal_harmful_twin_generation is called refusal_harmful_reworded_generation now" in caplog.text


def test_a_limit_by_tasks_keeps_the_default_that_it_does_not_name() -> None:
    assert evaluation(limit={"a": 3}).limit == {"default": 200, "a": 3}
    assert evaluation(limit={}).limit == evaluation(limit={"default": 200}).limit == 200
    assert [limit_of({"default": 5, "a": None}, task) for task in ("a", "b")] == [None, 5]
    assert [limit_of(limit, "a") for limit in (3, None)] == [3, None]


def test_an_unknown_suite_and_wrong_settings_beside_one_are_refused() -> None:
    with pytest.raises(UserError, match=r"eval.tasks: 'transfr' is not a task .* did you mean 'transfer'\?"):
        refuse_unknown(evaluation(tasks=["quick", "transfr"]).tasks)
    with pytest.raises(UserError, match=r"eval.limit: must be a whole number \(got 'a'\)"):
        evaluation(tasks="quick", limit="a")
    with pytest.raises(UserError, match=r"eval.suite: removed before 0.1; write eval.tasks"):
        evaluation(suite="quick")


@pytest.mark.slow
def test_quick_needs_no_network_and_costs_what_it_says() -> None:
    settings = evaluation(tasks="quick")
    tasks = tasks_of(settings)
    assert tuple(tasks) == settings.tasks
    found = work_of(tasks, num_items(tasks, settings), perplexity_tokens=settings.perplexity_tokens)
    stated = read_suite("quick").cost
    assert (found.items, found.requests) == (stated.items, stated.requests)
    assert abs(found.tokens / stated.tokens - 1) < 0.02, str(found)
    protocols = {task.config.metadata["protocol"] for task in tasks.values()}
    assert protocols == {"loglikelihood", "continuation", "generation", "worked"}


def files_of(suite: str) -> list[str]:
    """By the descriptions of its tasks, worked out here anew."""
    described, tags = described_tasks(task_folders(None))
    members = [member for name in read_suite(suite).tasks for member in tags.get(name, (name,))]
    mmlu = [read_data_sets(TASKS_DIR)["mmlu"]] if any(member.startswith("mmlu_all") for member in members) else []
    parts = [described[member][0] for member in members if member in described]
    files = [f"{part.place}/{part.items}" for part in parts if part.bundled is None]
    return sorted({*files, *(f"{data.place}/{data.items}" for data in mmlu)})


@pytest.mark.parametrize("name", ["transfer", "standard", "full"])
def test_a_suite_without_data_names_every_file_before_anything_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("something was read"))
    with pytest.raises(UserError) as refused:
        tasks_of(evaluation(tasks=name))
    told = str(refused.value)
    assert told.startswith("eval.tasks: the Hub does not have ")
    assert "wikidata and nq_passage;" in told if name == "transfer" else "nq_passage" in told.split(";")[0]
    assert not [file for file in files_of(name) if file not in told]
    with pytest.raises(UserError) as refused:
        tasks_of(evaluation(tasks=name, data_dir=str(tmp_path)))
    told = str(refused.value)
    assert told.startswith(f"eval.data_dir: '{tmp_path}' lacks files; set eval.data_dir to a folder with ")
    assert not [file for file in files_of(name) if file not in told]


@pytest.mark.slow
def test_what_evaluating_costs_is_said_before_a_model_is_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Loading(Exception):
        pass

    def load_model(*_: Any, **__: Any) -> None:
        raise Loading

    monkeypatch.setattr("shoal.models.load.load_model", load_model)
    settings = {"tasks": ["knowledge_continuation", "retrieval_generation"], "limit": 5, "perplexity_tokens": 500}
    recipe = {"model": str(tiny_checkpoint(tmp_path, "llama")), "run_dir": str(tmp_path / "run"), "eval": settings}
    with caplog.at_level("INFO"), pytest.raises(Loading):
        evaluate.evaluate(open_run(parse_recipe(recipe)))
    told = [line for line in caplog.messages if "tokens to read" in line]
    assert len(told) == 1
    assert re.fullmatch(
        r"eval: teacher, each: 10 items, 25 requests, about \d{3} tokens to read, at most 80 to write", told[0]
    )
    drawn: list[float] = []

    def drawing(settings: Eval, *, seed: int) -> dict[str, Any]:
        drawn.append(random.random())
        return tasks_of(settings, seed=seed)

    monkeypatch.setattr("shoal.eval.tasks.load.tasks_of", drawing)
    for before in range(2):
        random.seed(before)
        with pytest.raises(Loading):
            evaluate.evaluate(open_run(parse_recipe(recipe)))
    assert drawn[0] == drawn[1], "what a task draws as it is loaded is the same whenever it is"
