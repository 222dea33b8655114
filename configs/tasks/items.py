"""What the task files in this folder refer to: shoal's own items as lm-eval documents, and how answers are matched."""

from __future__ import annotations

import re
from typing import Any

from datasets import Dataset

from shoal.abilities import Item, items, words
from shoal.abilities.matching import LETTERS, amounts, first_line, lettered_prompt, starts, value

NUM_ITEMS = {"retrieval": 500, "reasoning": 501}
"""Every kind of reasoning equally often. Knowledge: all facts there are."""
NUM_EXAMPLES = 30
"""Items of the training split that few-shot prompts draw from."""
ANSWERS = {"order": frozenset(words.NAMES), "state": frozenset(words.PLACES)}
"""Reasoning kind -> words one of which is the final answer; arithmetic ends in a number."""


def retrieval(**settings: Any) -> dict[str, Dataset]:
    return _splits("retrieval", **settings)


def knowledge(**settings: Any) -> dict[str, Dataset]:
    return _splits("knowledge", **settings)


def reasoning(**settings: Any) -> dict[str, Dataset]:
    return _splits("reasoning", **settings)


def lettered_text(doc: dict[str, Any]) -> str:
    """The question with its options under letters."""
    return lettered_prompt(doc)


def letters(doc: dict[str, Any]) -> list[str]:
    return [f" {letter}" for letter in LETTERS[: len(doc["options"])]]


def first_answer(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 if the first line starts with the right answer as a whole word or number, case and punctuation ignored.

    A model goes on after the value ("Paris, which is"), so the whole line cannot be compared.
    """
    return {"match": float(starts(results[0], [doc["final"]]))}


def final_answer(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 if the last number (arithmetic), name (order) or place (state) in the first line is the right one."""
    line = first_line(results[0])
    if doc["kind"] == "arithmetic":
        return {"match": float(any(value(last) == value(doc["final"]) for last in amounts(line)[-1:]))}
    found = [word for word in re.findall(r"\w+", line) if word in ANSWERS[doc["kind"]]]
    return {"match": float(bool(found) and found[-1] == doc["final"])}


def worked_answer(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """Nats of the whole worked answer; shoal.eval divides them by its tokens."""
    return {"nats": -results[0][0]}


def _splits(
    task: str,
    *,
    version: str,
    ability: str,
    protocol: str,
    chance: float,
    metric: str,
    family: str = "",
    level: float = 0,
    config_source: str = "",
    num_items: int | None = None,
    seed: int = 0,
    **params: Any,
) -> dict[str, Dataset]:
    """Evaluation items, and training ones for few-shot prompts; lm-eval passes metadata and dataset_kwargs alike."""
    wanted = num_items or NUM_ITEMS.get(task) or _num_facts(**params)
    evaluated = items(task, split="eval", num_items=wanted, seed=seed, **params)
    examples = items(task, split="train", num_items=NUM_EXAMPLES, seed=seed, **params)
    return {"eval": _dataset(evaluated), "train": _dataset(examples)}


def _num_facts(relation: str | None = None) -> int:
    from shoal.abilities.knowledge import RELATIONS, facts_in

    return sum(len(facts_in("eval", name)) for name in ([relation] if relation else RELATIONS))


def _dataset(made: list[Item]) -> Dataset:
    return Dataset.from_list(
        [
            {
                "id": item.id,
                "context": item.context,
                "options": list(item.options),
                "answer": item.answer,
                "gold": item.gold,
                "question": item.question,
                **item.params,
            }
            for item in made
        ]
    )
