"""Look-ups: pairs of a key and a value in the prompt, one key asked for, values of the same pairs as options; and
needles in a haystack: sentences with a code each, somewhere in a long run of sentences about other things."""

import random
import uuid
from dataclasses import dataclass, replace
from functools import cache

from shoal.abilities import words
from shoal.abilities.item import (
    Form,
    Item,
    Value,
    Wanted,
    assigned_forms,
    build_item,
    check_choice,
    check_range,
    forms_of,
    split_of,
    words_in,
)

FILLERS: list[str] = words.table("words")["fillers"]
DECOY = "{name} counted to {number} in the {place}."
"""Where there are fewer needles than options, the wrong codes stand in sentences like this one."""
NEEDLE = "The code of the {key} is {number}."
NUM_OPTIONS = 4
MAX_SENTENCES = 4000
MAX_NEEDLES = 32
DEPTHS = (0, 25, 50, 75, 100)
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
    wanted: Wanted, *, kind: Value = "word", num_pairs: Value = 8, gold_position: Value = None, form: Value = None
) -> list[Item]:
    """Lookup items; `gold_position` None walks evenly over all positions.

    Raises:
        ValueError: for a kind, count, position or form outside its range.
    """
    check_choice("retrieval kind", kind, KINDS)
    num_pairs = check_range("retrieval num_pairs", num_pairs, NUM_OPTIONS, MAX_PAIRS[str(kind)])
    if gold_position is not None:
        check_range("retrieval gold_position", gold_position, 0, num_pairs - 1)
    forms = assigned_forms(FORMS, form, "retrieval", wanted.num_items)
    rng = wanted.generator(
        "retrieval", kind=kind, num_pairs=num_pairs, gold_position=gold_position, num_options=NUM_OPTIONS
    )
    items = []
    for index, in_form in enumerate(forms):
        position = index % num_pairs if gold_position is None else int(gold_position)
        pairs = draw_pairs(rng, wanted.split, str(kind), num_pairs)
        wrong = rng.sample([value for other, (_, value) in enumerate(pairs) if other != position], NUM_OPTIONS - 1)
        items.append(_lookup(in_form, pairs, position, wrong, rng.randrange(NUM_OPTIONS), kind=str(kind)))
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


def needle_items(
    wanted: Wanted, *, num_sentences: Value = 40, num_needles: Value = 1, num_asked: Value = 1, depth: Value = None
) -> list[Item]:
    """Ask for the codes of ``num_asked`` of ``num_needles`` needles; the first stands ``depth`` percent into the text.

    ``depth`` None walks evenly over 0, 25, 50, 75 and 100. Every option is made of codes that the text names once each.

    Raises:
        ValueError: for a count or depth outside its range.
    """
    num_needles = check_range("needle num_needles", num_needles, 1, MAX_NEEDLES)
    num_sentences = check_range("needle num_sentences", num_sentences, 2 * max(num_needles, NUM_OPTIONS), MAX_SENTENCES)
    num_asked = check_range("needle num_asked", num_asked, 1, num_needles)
    if depth is not None:
        check_range("needle depth", depth, 0, 100)
    rng = wanted.generator(
        "needle", num_sentences=num_sentences, num_needles=num_needles, num_asked=num_asked, depth=depth
    )
    depths = [DEPTHS[index % len(DEPTHS)] if depth is None else int(depth) for index in range(wanted.num_items)]
    return [_needle(rng, wanted.split, num_sentences, num_needles, num_asked, at) for at in depths]


def _needle(rng: random.Random, split: str, num_sentences: int, num_needles: int, num_asked: int, depth: int) -> Item:
    num_codes = max(num_needles, NUM_OPTIONS)
    keys = rng.sample(words_in(split, "key", words.KEYS), num_needles)
    codes = rng.sample(numbers_in(split), num_codes)
    first = round(depth / 100 * (num_sentences - 1))
    elsewhere = rng.sample([place for place in range(num_sentences) if place != first], num_codes - 1)
    sentences = [rng.choice(FILLERS).format(**_words(rng, split)) for _ in range(num_sentences)]
    for index, (place, code) in enumerate(zip([first, *elsewhere], codes, strict=True)):
        if index < num_needles:
            sentences[place] = NEEDLE.format(key=keys[index], number=code)
        else:
            sentences[place] = DECOY.format(**_words(rng, split), number=code)
    gold = codes[:num_asked]
    wrong: list[list[str]] = []
    while len(wrong) < NUM_OPTIONS - 1:
        drawn = rng.sample(codes, num_asked)
        if drawn not in (gold, *wrong):
            wrong.append(drawn)
    asked = [f"the {key}" for key in keys[:num_asked]]
    listed = f"{', '.join(asked[:-1])} and {asked[-1]}" if num_asked > 1 else asked[0]
    question = f"What is the code of {listed}?" if num_asked == 1 else f"What are the codes of {listed}, in this order?"
    stem = f"The code of {listed} is" if num_asked == 1 else f"The codes of {listed} are"
    text = " ".join(sentences)
    final = ", ".join(gold)
    sizes = {"num_sentences": num_sentences, "num_needles": num_needles, "num_asked": num_asked}
    return build_item(
        "needle",
        f"{text}\n\nQuestion: {question}\nAnswer: {stem}",
        gold=f" {final}",
        wrong=[f" {', '.join(other)}" for other in wrong],
        position=rng.randrange(NUM_OPTIONS),
        question=f"{text}\n\n{question}",
        params={**sizes, "depth": depth, "final": final},
    )


def _words(rng: random.Random, split: str) -> dict[str, str]:
    return {kind: rng.choice(table) for kind, table in _tables(split).items()}


@cache
def _tables(split: str) -> dict[str, list[str]]:
    """The words of the split; kept, since a long text asks for them thousands of times."""
    return {
        "name": words_in(split, "name", words.NAMES),
        "thing": words_in(split, "object", words.OBJECTS),
        "place": words_in(split, "place", words.PLACES),
    }
