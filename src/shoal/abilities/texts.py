"""Distillation text made of training-split items in the trained wordings: evaluation asks for other content."""

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from shoal.abilities import knowledge, reasoning, retrieval
from shoal.abilities.item import Form, generator

FORMS: dict[str, tuple[Form, ...]] = {
    "retrieval": retrieval.FORMS,
    "knowledge": knowledge.FORMS,
    "reasoning": reasoning.FORMS,
}
"""All forms of the abilities that text trains."""
F = TypeVar("F", bound=Form)


def training_texts(abilities: Sequence[str] = tuple(FORMS), *, num_texts: int, seed: int) -> list[str]:
    """Documents of the training split, one of these abilities in one form each, drawn evenly.

    A document holds several items, so that most of its tokens teach something: a lookup block asks for several of its
    keys, facts and problems follow each other. Its form is any of the trained ones; no document has a reworded one.
    """
    rng = generator("texts", "train", seed)
    return [WRITERS[ability](rng) for ability in rng.choices(abilities, k=num_texts)]


def write_lookups(rng: random.Random) -> str:
    """Pairs and several lookups in them."""
    form = _trained(rng, retrieval.FORMS)
    pairs = retrieval.draw_pairs(rng, "train", rng.choice(("word", "word", "word", "uuid")), rng.randint(4, 12))
    asked = rng.sample(pairs, min(len(pairs), rng.randint(2, 6)))
    return form.data(pairs) + form.lead + "\n".join(form.answered(key, value) for key, value in asked)


def write_facts(rng: random.Random) -> str:
    """A list of facts of mixed relations."""
    form = _trained(rng, knowledge.FORMS)
    facts = [(name, *pair) for name in knowledge.RELATIONS for pair in knowledge.facts_in("train", name)]
    chosen = [knowledge.make_fact("train", *fact, form=form) for fact in rng.sample(facts, rng.randint(4, 12))]
    return form.between.join(f"{item.context}{item.gold}{form.end}" for item in chosen)


def write_problems(rng: random.Random) -> str:
    """Several problems with their worked answers."""
    form = _trained(rng, reasoning.FORMS)
    kinds = [rng.choice(list(reasoning.KINDS)) for _ in range(rng.randint(1, 4))]
    chosen = [reasoning.make_problem(rng, "train", kind, rng.randint(1, 3), form=form) for kind in kinds]
    return "\n\n".join(f"{item.context}{item.gold}" for item in chosen)


def _trained(rng: random.Random, forms: tuple[F, ...]) -> F:
    return rng.choice([form for form in forms if not form.reworded])


WRITERS: dict[str, Callable[[random.Random], str]] = {
    "retrieval": write_lookups,
    "knowledge": write_facts,
    "reasoning": write_problems,
}
