"""Completions of well-known facts, with other objects of the same relation as wrong options."""

from shoal.abilities.facts import RELATIONS
from shoal.abilities.item import Item, Value, build_item, check_choice, check_range, digest, generator, split_of

NUM_OPTIONS = 4


def facts_in(split: str, relation: str) -> list[tuple[str, str]]:
    """The (subject, object) pairs of one relation that belong to the split."""
    return [pair for pair in RELATIONS[relation].pairs if split_of("fact", relation, pair[0]) == split]


def knowledge_items(*, split: str, num_items: int, seed: int, relation: Value = None) -> list[Item]:
    """Fact items of one relation, or of all in a mixed order; the seed decides which and in what order.

    The wrong options of a fact depend on the fact alone, and come from its own split: an object that was seen in
    training is never offered beside one that was not.

    Raises:
        ValueError: for an unknown relation, or when there are fewer facts than items asked for.
    """
    if relation is not None:
        check_choice("knowledge relation", relation, RELATIONS)
    names = RELATIONS if relation is None else (str(relation),)
    facts = [(name, *pair) for name in names for pair in facts_in(split, name)]
    check_range(f"knowledge num_items (split {split})", num_items, 1, len(facts))
    rng = generator("knowledge", split, seed, relation=relation)
    return [make_fact(split, *fact) for fact in rng.sample(facts, num_items)]


def stated_facts(split: str) -> list[str]:
    """Every fact of the split as a sentence: prompt and right answer."""
    pairs = [(name, *pair) for name in RELATIONS for pair in facts_in(split, name)]
    facts = [make_fact(split, *pair) for pair in pairs]
    return [fact.context + fact.options[fact.answer] for fact in facts]


def make_fact(split: str, relation: str, subject: str, target: str) -> Item:
    """One completion with its three wrong objects."""
    form = RELATIONS[relation]
    others = sorted({other for _, other in facts_in(split, relation)} - {target})
    others.sort(key=lambda other: digest("wrong", relation, subject, other))
    prompt = form.prompt.format(subject)
    return build_item(
        "knowledge",
        prompt,
        gold=f" {form.answer.format(target)}",
        wrong=[f" {form.answer.format(other)}" for other in others[: NUM_OPTIONS - 1]],
        position=int(digest("position", relation, subject)[:8], 16),
        question=form.question.format(subject),
        params={"relation": relation, "subject": subject, "final": target},
    )
