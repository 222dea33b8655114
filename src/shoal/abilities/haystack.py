"""Needles in a haystack: sentences with a code each, somewhere in a long run of sentences about other things."""

import random
from functools import cache

from shoal.abilities import words
from shoal.abilities.item import Item, Value, build_item, check_range, generator, words_in
from shoal.abilities.retrieval import numbers_in

FILLERS = (
    "{name} put the {thing} into the {place}.",
    "{name} could not find the {thing} in the {place}.",
    "There is a {thing} in the {place} that {name} likes.",
    "{name} went to the {place} and came back with a {thing}.",
    "Nobody but {name} knows why the {thing} is in the {place}.",
)
DECOY = "{name} counted to {number} in the {place}."
"""Where there are fewer needles than options, the wrong codes stand in sentences like this one."""
NEEDLE = "The code of the {key} is {number}."
NUM_OPTIONS = 4
MAX_SENTENCES = 4000
MAX_NEEDLES = 32
DEPTHS = (0, 25, 50, 75, 100)


def needle_items(
    *,
    split: str,
    num_items: int,
    seed: int,
    num_sentences: Value = 40,
    num_needles: Value = 1,
    num_asked: Value = 1,
    depth: Value = None,
) -> list[Item]:
    """Ask for the codes of ``num_asked`` of ``num_needles`` needles; the first stands ``depth`` percent into the text.

    ``depth`` None walks evenly over 0, 25, 50, 75 and 100. Every option is made of codes that the text names once each.

    Raises:
        ValueError: for a count or depth outside its range.
    """
    check_range("needle num_needles", num_needles, 1, MAX_NEEDLES)
    assert isinstance(num_needles, int)
    check_range("needle num_sentences", num_sentences, 2 * max(num_needles, NUM_OPTIONS), MAX_SENTENCES)
    assert isinstance(num_sentences, int)
    check_range("needle num_asked", num_asked, 1, num_needles)
    assert isinstance(num_asked, int)
    if depth is not None:
        check_range("needle depth", depth, 0, 100)
    rng = generator(
        "needle",
        split,
        seed,
        num_sentences=num_sentences,
        num_needles=num_needles,
        num_asked=num_asked,
        depth=depth,
    )
    depths = [DEPTHS[index % len(DEPTHS)] if depth is None else int(depth) for index in range(num_items)]
    return [_needle(rng, split, num_sentences, num_needles, num_asked, at) for at in depths]


def _needle(rng: random.Random, split: str, num_sentences: int, num_needles: int, num_asked: int, depth: int) -> Item:
    num_codes = max(num_needles, NUM_OPTIONS)
    keys = rng.sample(words_in(split, "key", words.KEYS), num_needles)
    codes = rng.sample(numbers_in(split), num_codes)
    first = round(depth / 100 * (num_sentences - 1))
    elsewhere = rng.sample([place for place in range(num_sentences) if place != first], num_codes - 1)
    sentences = [_filler(rng, split) for _ in range(num_sentences)]
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
    return build_item(
        "needle",
        f"{text}\n\nQuestion: {question}\nAnswer: {stem}",
        gold=f" {', '.join(gold)}",
        wrong=[f" {', '.join(codes)}" for codes in wrong],
        position=rng.randrange(NUM_OPTIONS),
        question=f"{text}\n\n{question}",
        params={
            "num_sentences": num_sentences,
            "num_needles": num_needles,
            "num_asked": num_asked,
            "depth": depth,
            "final": ", ".join(gold),
        },
    )


def _filler(rng: random.Random, split: str) -> str:
    return rng.choice(FILLERS).format(**_words(rng, split))


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
