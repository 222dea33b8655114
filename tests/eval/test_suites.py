"""Suites: what a name stands for, what it costs, and how a recipe adds to it.

Covers: shoal.recipe.evaluate.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from tiny import tiny_checkpoint

from shoal.errors import UserError
from shoal.eval.evaluate import Work, num_items, work_of
from shoal.eval.tasks.data_sets import read_data_sets
from shoal.eval.tasks.load import known_tasks, tasks_of
from shoal.eval.tasks.names import TASKS_DIR, described_tasks, task_folders
from shoal.launch.verbs import evaluate
from shoal.launch.verbs.run import open_run
from shoal.recipe.evaluate import SUITES_DIR, Cost, Eval, SuiteName, read_suite
from shoal.recipe.recipe import parse_recipe

NAMES = get_args(SuiteName)


def evaluation(**settings: Any) -> Eval:
    return parse_recipe({"model": "m", "run_dir": "r", "eval": settings}).eval


def test_there_is_a_file_for_every_name_and_it_asks_only_tasks_that_exist() -> None:
    assert {file.stem for file in SUITES_DIR.glob("*.yaml")} == set(NAMES)
    known = known_tasks(ours_only=True)
    for name in NAMES:
        suite = read_suite(name)
        assert not set(suite.tasks) - known
        assert len(set(suite.tasks)) == len(suite.tasks)
        assert set(suite.limits) <= set(suite.tasks)


def test_a_suite_is_spelled_out_and_what_the_recipe_says_wins() -> None:
    suite = read_suite("quick")
    plain = evaluation(suite="quick")
    assert plain.tasks == suite.tasks
    assert (plain.limit, plain.limits) == (suite.limit, suite.limits)
    assert (plain.perplexity_tokens, plain.sequence_length) == (suite.perplexity_tokens, suite.sequence_length)
    first = suite.tasks[0]
    changed = evaluation(suite="quick", tasks=["kv_8pairs_generation", first], limit=3, limits={first: 2})
    assert changed.tasks == (*suite.tasks, "kv_8pairs_generation")
    assert (changed.limit, changed.limits) == (3, {**dict.fromkeys(suite.limits, 3), first: 2})
    assert evaluation(suite="quick", limit=None).limit is None


def test_an_unknown_suite_and_wrong_settings_beside_one_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"eval.suite: must be 'quick', 'transfer', 'standard' or 'full' \(got 'fast'\)"
    ):
        evaluation(suite="fast")
    with pytest.raises(UserError, match=r"eval.tasks: must be .*list.* \(got 'a'\)"):
        evaluation(suite="quick", tasks="a")
    with pytest.raises(UserError, match=r"eval.limits.*\(got 3\)"):
        evaluation(suite="quick", limits=3)
    with pytest.raises(UserError, match=r"eval.suit: unknown key; did you mean 'suite'"):
        evaluation(suit="quick")


def assert_costs(found: Work, stated: Cost) -> None:
    assert (found.items, found.requests) == (stated.items, stated.requests)
    assert abs(found.tokens / stated.tokens - 1) < 0.02, str(found)


@pytest.mark.slow
def test_quick_needs_no_network_and_costs_what_it_says() -> None:
    settings = evaluation(suite="quick")
    tasks = tasks_of(settings)
    assert tuple(tasks) == settings.tasks
    found = work_of(tasks, num_items(tasks, settings), perplexity_tokens=settings.perplexity_tokens)
    assert_costs(found, read_suite("quick").cost)
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
        tasks_of(evaluation(suite=name))
    told = str(refused.value)
    assert told.startswith("eval.tasks: the Hub does not have ")
    assert "wikidata and nq_passage;" in told if name == "transfer" else "nq_passage" in told.split(";")[0]
    assert not [file for file in files_of(name) if file not in told]
    with pytest.raises(UserError) as refused:
        tasks_of(evaluation(suite=name, data_dir=str(tmp_path)))
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
    recipe["eval"] = {**settings, "tasks": ["knowledge_continuatoin"]}
    with pytest.raises(UserError, match="did you mean 'knowledge_continuation'"):
        evaluate.evaluate(open_run(parse_recipe(recipe)))
