"""Look-ups: pairs of a key and a value in the prompt, one key asked for, values of the same pairs as options."""

import random
import uuid
from dataclasses import dataclass, replace
from functools import cache

from shoal.abilities import words
from shoal.abilities.item import (
    Form,
    Item,
    Value,
    assigned_forms,
    build_item,
    check_choice,
    check_range,
    forms_of,
    generator,
    split_of,
    words_in,
)

KINDS = ("word", "uuid")
MAX_PAIRS = {"word": 100, "uuid": 500}


@dataclass(frozen=True)
class LookupForm(Form):
    """How pairs are written down and how one is asked for."""

    block: str
    """Around all pairs."""

    pair: str

    ask: str
    """Ends right before the value."""

    joint: str = "\n"
    """Between two pairs."""

    lead: str = "\n\n"
    """Between the pairs and the first question."""

    value: str = "{value}"
    """How the value is written in an answer, after a space."""

    end: str = ""
    """After the value."""

    question: str = 'What is the value of "{key}"?'
    """The bare question behind the pairs."""

    def data(self, pairs: list[tuple[str, str]]) -> str:
        """All pairs."""
        return self.block.format(pairs=self.joint.join(self.pair.format(key=key, value=value) for key, value in pairs))

    def answered(self, key: str, value: str) -> str:
        """A question with its answer."""
        return f"{self.ask.format(key=key)} {self.value.format(value=value)}{self.end}"


FORMS = forms_of(LookupForm, "retrieval")


def retrieval_items(
    *,
    split: str,
    num_items: int,
    seed: int,
    kind: Value = "word",
    num_pairs: Value = 8,
    gold_position: Value = None,
    num_options: Value = 4,
    form: Value = None,
) -> list[Item]:
    """Lookup items; `gold_position` None walks evenly over all positions, `num_options` "all" offers every value.

    Raises:
        ValueError: for a kind, count, position or form outside its range.
    """
    check_choice("retrieval kind", kind, KINDS)
    check_range("retrieval num_pairs", num_pairs, 2, MAX_PAIRS[str(kind)])
    assert isinstance(num_pairs, int)
    if gold_position is not None:
        check_range("retrieval gold_position", gold_position, 0, num_pairs - 1)
    num_wrong = num_pairs - 1
    if num_options != "all":
        check_range("retrieval num_options", num_options, 2, num_pairs)
        num_wrong = int(num_options or 0) - 1
    forms = assigned_forms(FORMS, form, "retrieval", num_items)
    rng = generator(
        "retrieval", split, seed, kind=kind, num_pairs=num_pairs, gold_position=gold_position, num_options=num_options
    )
    items = []
    for index, in_form in enumerate(forms):
        position = index % num_pairs if gold_position is None else int(gold_position)
        pairs = draw_pairs(rng, split, str(kind), num_pairs)
        wrong = rng.sample([value for other, (_, value) in enumerate(pairs) if other != position], num_wrong)
        items.append(_lookup(in_form, pairs, position, wrong, rng.randrange(num_wrong + 1), kind=str(kind)))
    return items


def _lookup(
    form: LookupForm, pairs: list[tuple[str, str]], position: int, wrong: list[str], answer: int, *, kind: str
) -> Item:
    """The look-up of the key at ``position``, with its value as option ``answer``."""
    key, value = pairs[position]
    item = build_item(
        "retrieval",
        f"{form.data(pairs)}{form.lead}{form.ask.format(key=key)}",
        gold=f" {form.value.format(value=value)}",
        wrong=[f" {form.value.format(value=other)}" for other in wrong],
        position=answer,
        question=f"{form.data(pairs)}\n{form.question.format(key=key)}",
        params={"kind": kind, "num_pairs": len(pairs), "gold_position": position, "key": key, "final": value},
    )
    return (
        item if form == FORMS[0] else replace(item, id=_lookup(FORMS[0], pairs, position, wrong, answer, kind=kind).id)
    )


def draw_pairs(rng: random.Random, split: str, kind: str, num_pairs: int) -> list[tuple[str, str]]:
    """Pairs whose keys and values are all different and all belong to the split."""
    if kind == "word":
        keys = rng.sample(words_in(split, "key", words.KEYS), num_pairs)
        return list(zip(keys, rng.sample(numbers_in(split), num_pairs), strict=True))
    drawn: list[str] = []
    while len(drawn) < 2 * num_pairs:
        candidate = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        if split_of("uuid", candidate) == split:
            drawn.append(candidate)
    return list(zip(drawn[:num_pairs], drawn[num_pairs:], strict=True))


@cache
def numbers_in(split: str) -> list[str]:
    """The four-digit numbers of the split; kept, since finding them takes longer than everything else about an item."""
    return [str(number) for number in range(1000, 10000) if split_of("number", number) == split]
