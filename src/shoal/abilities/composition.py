"""Problems that take k steps one after the other: swaps to follow, a table to walk through, brackets to work off.

The number of steps is a dial and nothing else about a problem changes with it: as many people, rows and options. No
wrong option can be told from the right one without doing the steps, because all of them are made by one rule: every
object of the story, entries of the table drawn evenly, or neighbouring numbers among which the right one has every rank
equally often.
"""

import random
from collections.abc import Callable, Sequence

from shoal.abilities import words
from shoal.abilities.item import (
    Item,
    Value,
    build_item,
    check_range,
    distinct_items,
    generator,
    split_of,
    words_in,
)

MAX_STEPS = 12
NUM_OPTIONS = 4
NUM_PEOPLE = 4
"""So many people hold one object each, and all objects are options."""
NUM_ROWS = 16
LARGEST_OPERAND = 20
LARGEST_VALUE = 40

Make = Callable[[random.Random, str, int, int], Item]
"""From a random generator, a split, a number of steps and an item's number."""


def state_tracking_items(*, split: str, num_items: int, seed: int, num_steps: Value = 3) -> list[Item]:
    """Four people hold an object each and swap ``num_steps`` times in pairs; who has what in the end?

    Whose object it was at first is every one of the four equally often, the asked person included.
    """
    return _items("state_tracking", make_swaps, split, num_items, seed, num_steps)


def multi_hop_items(*, split: str, num_items: int, seed: int, num_steps: Value = 3) -> list[Item]:
    """A shuffled table in which every word stands once left and once right; where do ``num_steps`` look-ups lead?"""
    return _items("multi_hop", make_walk, split, num_items, seed, num_steps)


def nested_arithmetic_items(*, split: str, num_items: int, seed: int, num_steps: Value = 3) -> list[Item]:
    """Sums and differences in ``num_steps`` brackets inside each other; no value on the way is below 0 or above 40."""
    return _items("nested_arithmetic", make_nested, split, num_items, seed, num_steps)


def make_swaps(rng: random.Random, split: str, num_steps: int, number: int) -> Item:
    """One problem of swaps; ``number`` decides whose object at the start is the answer."""
    people = rng.sample(words_in(split, "name", words.NAMES), NUM_PEOPLE)
    objects = rng.sample(words_in(split, "object", words.OBJECTS), NUM_PEOPLE)
    asked, answer = rng.randrange(NUM_PEOPLE), number % NUM_PEOPLE
    swaps, states = _swaps_that_lead(rng, num_steps, asked, answer)
    held = [f"{person} has the {thing}" for person, thing in zip(people, objects, strict=True)]
    story = [f"{', '.join(held[:-1])} and {held[-1]}."]
    story += [f"Then {people[giver]} and {people[other]} swap what they have." for giver, other in swaps]
    lines = [
        f"Now {people[giver]} has the {objects[state[giver]]} and {people[other]} has the {objects[state[other]]}."
        for (giver, other), state in zip(swaps, states, strict=True)
    ]
    wrong = [thing for index, thing in enumerate(objects) if index != answer]
    return _item(
        rng,
        "state_tracking",
        f"{' '.join(story)} What does {people[asked]} have now?",
        final=objects[answer],
        wrong=wrong,
        worked=" ".join(lines),
        num_steps=num_steps,
    )


def _swaps_that_lead(
    rng: random.Random, num_steps: int, asked: int, answer: int
) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """Swaps after which ``asked`` has what ``answer`` had, none undone by the next, and who has what after each."""
    while True:
        swaps: list[tuple[int, int]] = []
        states: list[list[int]] = []
        state = list(range(NUM_PEOPLE))
        while len(swaps) < num_steps:
            one, other = rng.sample(range(NUM_PEOPLE), 2)
            if swaps and {one, other} == set(swaps[-1]):
                continue
            state = list(state)
            state[one], state[other] = state[other], state[one]
            swaps.append((one, other))
            states.append(state)
        if state[asked] == answer:
            return swaps, states


def make_walk(rng: random.Random, split: str, num_steps: int, number: int) -> Item:
    """One problem of look-ups. The rows are one cycle, so that no word is a dead end or more frequent than another."""
    del number  # rows and options are drawn evenly
    cycle = rng.sample(words_in(split, "key", words.KEYS), NUM_ROWS)
    rows = [f"{word} -> {cycle[(index + 1) % NUM_ROWS]}" for index, word in enumerate(cycle)]
    final = cycle[num_steps]
    times = "once" if num_steps == 1 else f"{num_steps} times"
    table = "\n".join(rng.sample(rows, NUM_ROWS))
    return _item(
        rng,
        "multi_hop",
        f"{table}\nStart at {cycle[0]} and follow the arrow {times}. Where are you?",
        final=final,
        wrong=rng.sample([word for word in cycle[1:] if word != final], NUM_OPTIONS - 1),
        worked=" ".join(f"From {cycle[step]} to {cycle[step + 1]}." for step in range(num_steps)),
        num_steps=num_steps,
    )


def make_nested(rng: random.Random, split: str, num_steps: int, number: int) -> Item:
    """One expression; ``number`` decides how many of its options are smaller than the value."""
    rank = number % NUM_OPTIONS
    while True:
        expression, value, lines = _nested(rng, num_steps)
        if value >= NUM_OPTIONS - 1 and split_of("nested", expression) == split:
            break
    return _item(
        rng,
        "nested_arithmetic",
        f"What is {expression}?",
        final=str(value),
        wrong=[str(value - rank + offset) for offset in range(NUM_OPTIONS) if offset != rank],
        worked=" ".join(lines),
        num_steps=num_steps,
    )


def _nested(rng: random.Random, num_steps: int) -> tuple[str, int, list[str]]:
    """An expression from the innermost bracket outwards, its value, and one equation per operation."""
    value = rng.randint(1, LARGEST_OPERAND)
    expression, lines = str(value), []
    while len(lines) < num_steps:
        operand, form = rng.randint(1, LARGEST_OPERAND), rng.choice(("{} + {}", "{} - {}"))
        inner = f"({expression})" if lines else expression
        sides, values = (inner, str(operand)), (value, operand)
        if rng.random() < 0.5:
            sides, values = sides[::-1], values[::-1]
        result = values[0] + values[1] if "+" in form else values[0] - values[1]
        if 0 <= result <= LARGEST_VALUE:
            lines.append(f"{form.format(*values)} = {result}.")
            expression, value = form.format(*sides), result
    return expression, value, lines


def _items(task: str, make: Make, split: str, num_items: int, seed: int, num_steps: Value) -> list[Item]:
    check_range(f"{task} num_steps", num_steps, 1, MAX_STEPS)
    assert isinstance(num_steps, int)
    rng = generator(task, split, seed, num_steps=num_steps)
    kind = f"{task} of {num_steps} steps (split {split})"
    return distinct_items(lambda number: make(rng, split, num_steps, number), num_items, kind=kind)


def _item(
    rng: random.Random, task: str, question: str, *, final: str, wrong: Sequence[str], worked: str, num_steps: int
) -> Item:
    return build_item(
        task,
        f"Question: {question}\nAnswer:",
        gold=f" {final}",
        wrong=[f" {other}" for other in rng.sample(list(wrong), len(wrong))],
        position=rng.randrange(NUM_OPTIONS),
        question=question,
        params={"num_steps": num_steps, "final": final, "worked": f"{worked} The answer is {final}."},
    )
