"""Evaluations of a tiny model, and whether two are the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_model, tiny_tokenizer

from shoal.artifacts.evaluation import TaskScore
from shoal.eval.evaluate import Questions, scored
from shoal.eval.harness.engine import CausalLM, connect_ranks
from shoal.eval.tasks.load import tasks_of
from shoal.recipe.evaluate import Eval

TASKS = ("knowledge_continuation", "knowledge_loglikelihood", "retrieval_generation", "reasoning_worked")


SETTINGS = Eval(tasks=TASKS, limit=6, batch_size=5, perplexity_tokens=1500)


def load_tasks(names: Iterable[str], **settings: Any) -> dict[str, Any]:
    """The tasks of these names; folders may be paths."""
    told: dict[str, Any] = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    return tasks_of(Eval(tuple(names), **told))


def evaluate(model: Any, tokenizer: Any, settings: Eval, *, seed: int) -> tuple[TaskScore, ...]:
    """The scores of a model in memory, on every rank."""
    connect_ranks(model.device)
    return scored(CausalLM(model, tokenizer, settings.at_once()), Questions(settings, seed))


def run(kind: str = "llama", seed: int = 0, **changes: Any) -> tuple[TaskScore, ...]:
    settings = dataclasses.replace(SETTINGS, **changes)
    model = tiny_model(kind, max_position_embeddings=4096)
    return evaluate(model, tiny_tokenizer(), settings, seed=seed)


def assert_same(found: tuple[TaskScore, ...], expected: tuple[TaskScore, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert [dataclasses.replace(i, score=0.0, rates={}) for i in one.items] == [
            dataclasses.replace(i, score=0.0, rates={}) for i in other.items
        ]
        numbers = [[{"score": i.score, **i.rates} for i in own.items] for own in (one, other)]
        torch.testing.assert_close(*numbers, atol=1e-5, rtol=0)
