"""Retrieval, knowledge, reasoning and k-step items: seeded, with a training and an evaluation split of other content.

One generator feeds both the evaluation tasks and the distillation text, so a cut model is taught exactly the kinds of
prompts on which it is scored, and never an item of the scoring itself. What decides the split is a hash of content
(`shoal.abilities.item.split_of`), not a position in a shuffled list, hence no seed or size can mix the two.
"""

import inspect

from shoal.abilities.instructed import instructed_items
from shoal.abilities.item import SPLITS, Item, Value, Wanted
from shoal.abilities.knowledge import knowledge_items, knowledge_out_items
from shoal.abilities.reasoning import reasoning_items
from shoal.abilities.retrieval import needle_items, retrieval_items
from shoal.abilities.texts import training_texts
from shoal.abilities.untrained import (
    brackets_items,
    copying_items,
    multi_hop_items,
    nested_arithmetic_items,
    sorting_items,
    state_tracking_items,
)

__all__ = ["ALL_SCORED", "GENERATORS", "SPLITS", "Item", "items", "training_texts"]

GENERATORS = {
    "retrieval": retrieval_items,
    "needle": needle_items,
    "knowledge": knowledge_items,
    "reasoning": reasoning_items,
    "state_tracking": state_tracking_items,
    "multi_hop": multi_hop_items,
    "nested_arithmetic": nested_arithmetic_items,
    "copying": copying_items,
    "brackets": brackets_items,
    "sorting": sorting_items,
    "knowledge_out": knowledge_out_items,
    "instructed": instructed_items,
}
ALL_SCORED = frozenset({"knowledge_out", "instructed"})
"""Abilities without items of the training split."""


def items(task: str, *, split: str, num_items: int, seed: int, **params: Value) -> list[Item]:
    """`num_items` different items of one ability; equal arguments give equal items.

    Raises:
        ValueError: for an unknown task, split or parameter, or when the generator cannot make that many.
    """
    if task not in GENERATORS:
        raise ValueError(f"unknown ability task {task!r}; choose one of {', '.join(GENERATORS)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of {task}; choose one of {', '.join(SPLITS)}")
    if split == "train" and task in ALL_SCORED:
        raise ValueError(f"{task} has no items of the split train, because all are scored; ask for the split eval")
    if num_items < 1:
        raise ValueError(f"num_items is {num_items} for {task}; it must be at least 1")
    _, *known = inspect.signature(GENERATORS[task]).parameters
    for name in params:
        if name not in known:
            raise ValueError(f"{task} has no parameter {name!r}; it takes {', '.join(known)}")
    return GENERATORS[task](Wanted(split, num_items, seed), **params)
