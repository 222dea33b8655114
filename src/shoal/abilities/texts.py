"""Distillation text made of training-split items: the prompts of the evaluation with answers, and other content."""

import random
from collections.abc import Callable, Mapping

from shoal.abilities.facts import RELATIONS
from shoal.abilities.item import generator
from shoal.abilities.knowledge import facts_in, make_fact
from shoal.abilities.reasoning import KINDS, make_problem
from shoal.abilities.retrieval import ask, draw_pairs, show_pairs

DEFAULT_MIX = {"retrieval": 1.0, "knowledge": 1.0, "reasoning": 1.0}


def training_texts(*, num_texts: int, seed: int, mix: Mapping[str, float] = DEFAULT_MIX) -> list[str]:
    """Documents of the training split, one ability each, drawn with the weights of `mix`.

    A document holds several items, so that most of its tokens teach something: a lookup block asks for several keys of
    one object, facts stand in a list, problems follow each other.

    Raises:
        ValueError: for an unknown ability, a negative weight, or weights that are all zero.
    """
    if num_texts < 1:
        raise ValueError(f"num_texts is {num_texts}; it must be at least 1")
    if unknown := sorted(set(mix) - set(WRITERS)):
        raise ValueError(f"unknown ability {unknown[0]!r} in mix; choose from {', '.join(WRITERS)}")
    if any(weight < 0 for weight in mix.values()) or not any(mix.values()):
        raise ValueError(f"mix is {dict(mix)}; weights must not be negative, and one must be above zero")
    rng = generator("texts", "train", seed)
    abilities = rng.choices(list(mix), weights=list(mix.values()), k=num_texts)
    return [WRITERS[ability](rng) for ability in abilities]


def write_lookups(rng: random.Random) -> str:
    """One JSON object and several lookups in it."""
    pairs = draw_pairs(rng, "train", rng.choice(("word", "word", "word", "uuid")), rng.randint(4, 12))
    asked = rng.sample(pairs, min(len(pairs), rng.randint(2, 6)))
    return f"{show_pairs(pairs)}\n\nAnswer:\n" + "\n".join(f'{ask(key)} "{value}"' for key, value in asked)


def write_facts(rng: random.Random) -> str:
    """A list of facts of mixed relations."""
    facts = [(name, *pair) for name in RELATIONS for pair in facts_in("train", name)]
    chosen = [make_fact("train", *fact) for fact in rng.sample(facts, rng.randint(4, 12))]
    return "\n".join(f"{item.context}{item.gold}." for item in chosen)


def write_problems(rng: random.Random) -> str:
    """Several problems with their worked answers."""
    chosen = [make_problem(rng, "train", rng.choice(list(KINDS)), rng.randint(1, 3)) for _ in range(rng.randint(1, 4))]
    return "\n\n".join(f"{item.context}{item.gold}" for item in chosen)


WRITERS: dict[str, Callable[[random.Random], str]] = {
    "retrieval": write_lookups,
    "knowledge": write_facts,
    "reasoning": write_problems,
}
