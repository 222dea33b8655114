"""Completions of well-known facts, with other objects of the same relation as wrong options; facts.yaml has them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

from shoal.abilities.item import (
    Form,
    Item,
    Value,
    Wanted,
    assigned_forms,
    build_item,
    check_choice,
    check_range,
    digest,
    forms_of,
    split_of,
)
from shoal.abilities.words import table

NUM_OPTIONS = 4
NUM_EXAMPLES = 2


@dataclass(frozen=True)
class Relation:
    """How one kind of fact is asked; "{}" stands for the subject."""

    prompt: str
    """Ends right before the object."""

    question: str
    """The same as a question, for lettered prompts."""

    pairs: tuple[tuple[str, str], ...]
    """(subject, object), each subject once."""

    answer: str = "{}"
    """How the object is written: words about words stand in quotation marks."""

    paraphrase: str = ""
    """The prompt in words that no training text has; empty where no other form is asked."""

    kinds: tuple[str, str] = ("", "")
    """What subject and object are, as the names of two fields."""


def _relation(prompt: str, question: str, pairs: str, kinds: tuple[str, str] = ("", ""), **words: str) -> Relation:
    """From the entry of facts.yaml, whose pairs are "subject: object; subject: object"."""
    subject, target = kinds
    entries = (pair.split(": ", 1) for pair in pairs.split("; "))
    return Relation(prompt, question, tuple((one, other) for one, other in entries), kinds=(subject, target), **words)


RELATIONS = {name: _relation(**entry) for name, entry in table("facts")["stated"].items()}
"""Of these training text states facts."""
UNTRAINED = {name: _relation(**entry) for name, entry in table("facts")["unstated"].items()}
"""Of these no text states any. A subject or object may stand in both, but the two together are asked once."""


@dataclass(frozen=True)
class FactForm(Form):
    """How a fact is asked for; its relation has the words."""

    ask: str
    """Ends right before the object. {prompt}, {question} and {paraphrase} are the relation's, {kind} and {wanted} its
    kinds of subject and object, {examples} two other facts of it."""

    answer: str = ""
    """How the object is written, after a space; empty = as the relation does."""

    end: str = ""
    """After the object."""

    between: str = "\n"
    """Between two facts of one text."""

    example: str = ""
    """One of the examples."""

    def asked(self, relation: Relation, subject: str, examples: list[tuple[str, str]]) -> str:
        """The text before the object; ``examples`` are other facts of the relation."""
        words = {name: getattr(relation, name).format(subject) for name in ("prompt", "question", "paraphrase")}
        kind, wanted = relation.kinds
        shown = [self.example.format(subject=other, target=target, wanted=wanted) for other, target in examples]
        text = self.ask.format(subject=subject, kind=kind, wanted=wanted, examples="".join(shown), **words)
        return text[:1].upper() + text[1:]

    def answered(self, relation: Relation, target: str) -> str:
        """The object as an answer."""
        return f" {self.answer.format(target=target) or relation.answer.format(target)}"


FORMS = forms_of(FactForm, "knowledge")


def facts_in(split: str, relation: str) -> list[tuple[str, str]]:
    """The (subject, object) pairs of one relation that belong to the split: all to `eval` where no text states them."""
    if relation in UNTRAINED:
        return list(UNTRAINED[relation].pairs) if split == "eval" else []
    return [pair for pair in RELATIONS[relation].pairs if split_of("fact", relation, pair[0]) == split]


def knowledge_items(wanted: Wanted, *, relation: Value = None, form: Value = None) -> list[Item]:
    """Fact items of one relation, or of all in a mixed order; the seed decides which and in what order.

    The wrong options of a fact depend on the fact alone, and come from its own split: an object that was seen in
    training is never offered beside one that was not.

    Raises:
        ValueError: for an unknown relation or form, or when there are fewer facts than items asked for.
    """
    forms = assigned_forms(FORMS, form, "knowledge", wanted.num_items)
    facts = _draw("knowledge", RELATIONS, wanted, relation)
    return [make_fact(wanted.split, *fact, form=in_form) for fact, in_form in zip(facts, forms, strict=True)]


def knowledge_out_items(wanted: Wanted, *, relation: Value = None) -> list[Item]:
    """The same of the relations that no text states, which are all scored."""
    facts = _draw("knowledge_out", UNTRAINED, wanted, relation)
    return [make_fact(wanted.split, *fact) for fact in facts]


@cache
def stated_facts(split: str) -> tuple[str, ...]:
    """Every fact of the split as a sentence: prompt and right answer. Kept: texts are held against them one by one."""
    pairs = [(name, *pair) for name in (*RELATIONS, *UNTRAINED) for pair in facts_in(split, name)]
    facts = [make_fact(split, *pair) for pair in pairs]
    return tuple(fact.context + fact.options[fact.answer] for fact in facts)


def examples_of(relation: str, subject: str | None, target: str | None = None) -> list[tuple[str, str]]:
    """Two facts of the training split that show no answer: neither that of ``subject`` nor any with ``target``."""
    others = [pair for pair in facts_in("train", relation) if pair[0] != subject and pair[1] != target]
    return sorted(others, key=lambda pair: digest("example", relation, pair[0]))[:NUM_EXAMPLES]


def make_fact(split: str, relation: str, subject: str, target: str, *, form: FactForm = FORMS[0]) -> Item:
    """One completion with its three wrong objects."""
    trained = relation in RELATIONS
    asked = RELATIONS[relation] if trained else UNTRAINED[relation]
    others = sorted({other for _, other in facts_in(split, relation)} - {target})
    others.sort(key=lambda other: digest("wrong", relation, subject, other))
    item = build_item(
        "knowledge" if trained else "knowledge_out",
        form.asked(asked, subject, examples_of(relation, subject, target)),
        gold=form.answered(asked, target),
        wrong=[form.answered(asked, other) for other in others[: NUM_OPTIONS - 1]],
        position=int(digest("position", relation, subject)[:8], 16),
        question=asked.question.format(subject),
        params={"relation": relation, "subject": subject, "final": target},
    )
    return item if form == FORMS[0] else replace(item, id=make_fact(split, relation, subject, target).id)


def _draw(task: str, relations: Mapping[str, Relation], wanted: Wanted, relation: Value) -> list[tuple[str, str, str]]:
    """(relation, subject, object) of so many facts."""
    if relation is not None:
        check_choice(f"{task} relation", relation, relations)
    names = relations if relation is None else (str(relation),)
    facts = [(name, *pair) for name in names for pair in facts_in(wanted.split, name)]
    check_range(f"{task} num_items (split {wanted.split})", wanted.num_items, 1, len(facts))
    return wanted.generator(task, relation=relation).sample(facts, wanted.num_items)
