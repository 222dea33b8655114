"""Key-value lookup: one JSON object in the prompt, one key asked for, values of the same object as options."""

import json
import random
import uuid
from functools import cache

from shoal.abilities import words
from shoal.abilities.item import Item, Value, build_item, check_choice, check_range, generator, split_of, words_in

KINDS = ("word", "uuid")
MAX_PAIRS = {"word": 100, "uuid": 500}


def retrieval_items(
    *,
    split: str,
    num_items: int,
    seed: int,
    kind: Value = "word",
    num_pairs: Value = 8,
    gold_position: Value = None,
    num_options: Value = 4,
) -> list[Item]:
    """Lookup items; `gold_position` None walks evenly over all positions, `num_options` "all" offers every value.

    Raises:
        ValueError: for a kind, count or position outside its range.
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
    rng = generator(
        "retrieval", split, seed, kind=kind, num_pairs=num_pairs, gold_position=gold_position, num_options=num_options
    )
    made = []
    for index in range(num_items):
        position = index % num_pairs if gold_position is None else int(gold_position)
        made.append(make_lookup(rng, split, str(kind), num_pairs, position=position, num_wrong=num_wrong))
    return made


def make_lookup(rng: random.Random, split: str, kind: str, num_pairs: int, *, position: int, num_wrong: int) -> Item:
    """One lookup of the key at `position`."""
    pairs = draw_pairs(rng, split, kind, num_pairs)
    key, value = pairs[position]
    wrong = [other for index, (_, other) in enumerate(pairs) if index != position]
    wrong = rng.sample(wrong, num_wrong)
    return build_item(
        "retrieval",
        f"{show_pairs(pairs)}\n\nAnswer:\n{ask(key)}",
        gold=f' "{value}"',
        wrong=[f' "{other}"' for other in wrong],
        position=rng.randrange(num_wrong + 1),
        question=f'{show_pairs(pairs)}\nWhat is the value of "{key}"?',
        params={"kind": kind, "num_pairs": num_pairs, "gold_position": position, "key": key, "final": value},
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


def show_pairs(pairs: list[tuple[str, str]]) -> str:
    """The JSON object, as a data block of the prompt."""
    return f"JSON data:\n{json.dumps(dict(pairs))}"


def ask(key: str) -> str:
    """The lookup, cut off right before the value."""
    return f'"{key}":'
