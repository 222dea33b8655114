"""Sequences that no training text has: a word some places further on, brackets to close, an order to find.

As in composition.py a dial is all that changes, and no wrong option can be told from the right one by its surface: the
four options are neighbours of one list, or orders of the same brackets, words or numbers. How they are asked was chosen
by the scores of an uncut model of 135M parameters, which follows no instruction: each text is begun to go on by itself.
"""

import random
from collections.abc import Sequence

from shoal.abilities import words
from shoal.abilities.item import (
    Item,
    Value,
    build_item,
    check_choice,
    check_range,
    distinct_items,
    generator,
    split_of,
    words_in,
)

NUM_OPTIONS = 4
NUM_WORDS = 12
"""Words of a list in which one is looked for."""
MAX_OFFSET = 4
BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">"}
"""Opening bracket -> the one that closes it."""
MIN_DEPTH, MAX_DEPTH = 3, 12
"""Two brackets have two orders only, too few for four options."""
NUM_CLOSED = 2
"""Pairs of a run that are closed already."""
ORDERS = {"word": ("Words", "in alphabetical order"), "number": ("Numbers", "from the smallest to the largest")}
"""What is sorted -> how it is called, and the order wanted."""
MIN_ELEMENTS, MAX_ELEMENTS = 5, 20
"""Four elements behind a common first one are two pairs of neighbours."""


def copying_items(*, split: str, num_items: int, seed: int, offset: Value = 1) -> list[Item]:
    """A list that is said again from a given word on, in steps of ``offset``: which word comes next?

    The options are four neighbours of the list, the given word left out, among which the right one has every rank
    equally often.
    """
    check_range("copying offset", offset, 1, MAX_OFFSET)
    assert isinstance(offset, int)
    rng = generator("copying", split, seed, offset=offset)
    kind = f"copying at offset {offset} (split {split})"
    return distinct_items(lambda number: make_copy(rng, split, offset, number), num_items, kind=kind)


def brackets_items(*, split: str, num_items: int, seed: int, depth: Value = 3) -> list[Item]:
    """A run with ``depth`` open brackets and the brackets that close it; the options are orders of the same ones."""
    check_range("brackets depth", depth, MIN_DEPTH, MAX_DEPTH)
    assert isinstance(depth, int)
    rng = generator("brackets", split, seed, depth=depth)
    kind = f"brackets of depth {depth} (split {split})"
    return distinct_items(lambda number: make_run(rng, split, depth, number), num_items, kind=kind)


def sorting_items(
    *, split: str, num_items: int, seed: int, elements: Value = "word", num_elements: Value = 5
) -> list[Item]:
    """Words in alphabetical order, or numbers of two digits ascending.

    The wrong options swap two neighbours, two others, or all four; all options begin alike.
    """
    check_choice("sorting elements", elements, ORDERS)
    check_range("sorting num_elements", num_elements, MIN_ELEMENTS, MAX_ELEMENTS)
    assert isinstance(num_elements, int)
    rng = generator("sorting", split, seed, elements=elements, num_elements=num_elements)
    kind = f"sorting of {num_elements} {elements}s (split {split})"
    return distinct_items(
        lambda number: make_order(rng, split, str(elements), num_elements, number), num_items, kind=kind
    )


def make_copy(rng: random.Random, split: str, offset: int, number: int) -> Item:
    """One list with a question; ``number`` decides how many options stand before the answer in the list."""
    rank, last = number % NUM_OPTIONS, NUM_OPTIONS - 1
    listed = rng.sample(words_in(split, "key", words.KEYS), NUM_WORDS)
    # the same places for every offset, with room for all ranks
    answer = rng.randint(NUM_OPTIONS, NUM_WORDS - NUM_OPTIONS)
    asked = answer - offset
    others = [word for index, word in enumerate(listed) if index != asked]
    options = others[answer - 1 - rank :][: last + 1]
    options.remove(listed[answer])
    return _item(
        "copying",
        f"{', '.join(listed)}\nAgain, in steps of {offset}: {listed[asked]},",
        final=listed[answer],
        wrong=rng.sample(options, last),
        position=rng.randrange(NUM_OPTIONS),
        question=f"{', '.join(listed)}. Which word comes after {listed[asked]}, in steps of {offset}?",
        params={"offset": offset},
    )


def make_run(rng: random.Random, split: str, depth: int, number: int) -> Item:
    """One run of brackets."""
    while True:
        opened = rng.sample(list(BRACKETS), min(depth, len(BRACKETS)))
        opened = rng.sample(opened + rng.choices(list(BRACKETS), k=depth - len(opened)), depth)
        run = list(opened)
        for _ in range(NUM_CLOSED):
            place, bracket = rng.randint(0, len(run)), rng.choice(list(BRACKETS))
            run[place:place] = [bracket, BRACKETS[bracket]]
        if split_of("run", *run) == split:
            break
    right = [BRACKETS[bracket] for bracket in reversed(opened)]
    wrong: list[list[str]] = []
    while len(wrong) < NUM_OPTIONS - 1:
        order = rng.sample(right, depth)
        if order not in (right, *wrong):
            wrong.append(order)
    return _item(
        "brackets",
        " ".join(run),
        final=" ".join(right),
        wrong=[" ".join(order) for order in wrong],
        position=number,
        question=f"Which brackets close {' '.join(run)}?",
        params={"depth": depth},
    )


def make_order(rng: random.Random, split: str, elements: str, num_elements: int, number: int) -> Item:
    """One set to sort."""
    right = _sorted_elements(rng, split, elements, num_elements)
    # two pairs of neighbours, however many elements: what stands far apart is told apart easily
    first, second = sorted(rng.sample(range(1, num_elements - 2), 2))
    swapped = _swapped(right, first)
    orders = [right, swapped, _swapped(right, second + 1), _swapped(swapped, second + 1)]
    shuffled = right
    while shuffled in orders:
        shuffled = rng.sample(right, num_elements)
    name, how = ORDERS[elements]
    return _item(
        "sorting",
        f"{name}: {', '.join(shuffled)}\n{how[0].upper()}{how[1:]}:",
        final=", ".join(right),
        wrong=[", ".join(order) for order in rng.sample(orders[1:], NUM_OPTIONS - 1)],
        position=number,
        question=f"Sort {', '.join(shuffled)} {how}.",
        params={"elements": elements, "num_elements": num_elements},
    )


def _sorted_elements(rng: random.Random, split: str, elements: str, num_elements: int) -> list[str]:
    if elements == "word":
        return sorted(rng.sample(words_in(split, "key", words.KEYS), num_elements))
    while True:
        numbers = [str(number) for number in sorted(rng.sample(range(10, 100), num_elements))]
        if split_of("sorted", *numbers) == split:
            return numbers


def _swapped(elements: list[str], place: int) -> list[str]:
    """The elements with those at ``place`` and behind it in each other's place."""
    return [*elements[:place], elements[place + 1], elements[place], *elements[place + 2 :]]


def _item(
    task: str,
    context: str,
    *,
    final: str,
    wrong: Sequence[str],
    position: int,
    question: str,
    params: dict[str, int | str],
) -> Item:
    return build_item(
        task,
        context,
        gold=f" {final}",
        wrong=[f" {other}" for other in wrong],
        position=position,
        question=question,
        params={**params, "final": final},
    )
