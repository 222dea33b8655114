"""Distillation text made of training-split items in the trained forms: other content than the evaluation asks for."""

import random
from collections.abc import Callable, Mapping
from typing import TypeVar

from shoal.abilities import knowledge, reasoning, retrieval
from shoal.abilities.item import Form, generator

FORMS: dict[str, tuple[Form, ...]] = {
    "retrieval": retrieval.FORMS,
    "knowledge": knowledge.FORMS,
    "reasoning": reasoning.FORMS,
}
"""All forms of the abilities that text trains."""
DEFAULT_MIX = {"retrieval": 1.0, "knowledge": 1.0, "reasoning": 1.0}
F = TypeVar("F", bound=Form)


def training_texts(
    *, num_texts: int, seed: int, mix: Mapping[str, float] = DEFAULT_MIX, one_form: bool = False
) -> list[str]:
    """Documents of the training split, one ability in one form each, drawn with the weights of `mix`.

    A document holds several items, so that most of its tokens teach something: a lookup block asks for several of its
    keys, facts and problems follow each other. Its form is any of the trained ones, or with `one_form` always the first
    one, which is how the evaluation asks; no document has a twin form.

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
    return [WRITERS[ability](rng, 1 if one_form else None) for ability in abilities]


def write_lookups(rng: random.Random, num_forms: int | None) -> str:
    """Pairs and several lookups in them."""
    form = _trained(rng, retrieval.FORMS, num_forms)
    pairs = retrieval.draw_pairs(rng, "train", rng.choice(("word", "word", "word", "uuid")), rng.randint(4, 12))
    asked = rng.sample(pairs, min(len(pairs), rng.randint(2, 6)))
    return form.data(pairs) + form.lead + "\n".join(form.answered(key, value) for key, value in asked)


def write_facts(rng: random.Random, num_forms: int | None) -> str:
    """A list of facts of mixed relations."""
    form = _trained(rng, knowledge.FORMS, num_forms)
    facts = [(name, *pair) for name in knowledge.RELATIONS for pair in knowledge.facts_in("train", name)]
    chosen = [knowledge.make_fact("train", *fact, form=form) for fact in rng.sample(facts, rng.randint(4, 12))]
    return form.between.join(f"{item.context}{item.gold}{form.end}" for item in chosen)


def write_problems(rng: random.Random, num_forms: int | None) -> str:
    """Several problems with their worked answers."""
    form = _trained(rng, reasoning.FORMS, num_forms)
    kinds = [rng.choice(list(reasoning.KINDS)) for _ in range(rng.randint(1, 4))]
    chosen = [reasoning.make_problem(rng, "train", kind, rng.randint(1, 3), form=form) for kind in kinds]
    return "\n\n".join(f"{item.context}{item.gold}" for item in chosen)


def _trained(rng: random.Random, forms: tuple[F, ...], num_forms: int | None) -> F:
    return rng.choice([form for form in forms if not form.twin][:num_forms])


WRITERS: dict[str, Callable[[random.Random, int | None], str]] = {
    "retrieval": write_lookups,
    "knowledge": write_facts,
    "reasoning": write_problems,
}
