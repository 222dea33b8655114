"""Abilities that no training text has: problems that take k steps one after the other (swaps to follow, a table to walk
through, brackets to work off), and sequences (a word some places further on, brackets to close, an order to find).

A dial is all that changes about an item, and no wrong option can be told from the right one by its surface: all of them
are made by one rule, such as every object of the story, entries of the table drawn evenly, orders of the same words, or
neighbours among which the right one has every rank equally often. How sequences are asked was chosen by the scores of
an uncut model of 135M parameters, which follows no instruction: each text is begun to go on by itself.
"""

import random
from collections.abc import Callable, Sequence

from shoal.abilities import words
from shoal.abilities.item import Item, Value, Wanted, build_item, check_choice, check_range, split_of, words_in

MAX_STEPS = 12
NUM_OPTIONS = 4
NUM_PEOPLE = 4
"""So many people hold one object each, and all objects are options."""
NUM_ROWS = 16
LARGEST_OPERAND = 20
LARGEST_VALUE = 40
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


def state_tracking_items(wanted: Wanted, *, num_steps: Value = 3) -> list[Item]:
    """Four people hold an object each and swap ``num_steps`` times in pairs; who has what in the end?

    Whose object it was at first is every one of the four equally often, the asked person included.
    """
    return _stepped("state_tracking", make_swaps, wanted, num_steps)


def multi_hop_items(wanted: Wanted, *, num_steps: Value = 3) -> list[Item]:
    """A shuffled table in which every word stands once left and once right; where do ``num_steps`` look-ups lead?"""
    return _stepped("multi_hop", make_walk, wanted, num_steps)


def nested_arithmetic_items(wanted: Wanted, *, num_steps: Value = 3) -> list[Item]:
    """Sums and differences in ``num_steps`` brackets inside each other; no value on the way is below 0 or above 40."""
    return _stepped("nested_arithmetic", make_nested, wanted, num_steps)


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
    return _asked(
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
    return _asked(
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
    return _asked(
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


def _stepped(
    task: str, make: Callable[[random.Random, str, int, int], Item], wanted: Wanted, num_steps: Value
) -> list[Item]:
    """Items of ``make``, which is given a random generator, a split, a number of steps and an item's number."""
    steps = check_range(f"{task} num_steps", num_steps, 1, MAX_STEPS)
    return wanted.distinct(task, lambda rng, number: make(rng, wanted.split, steps, number), num_steps=steps)


def _asked(
    rng: random.Random, task: str, question: str, *, final: str, wrong: Sequence[str], worked: str, num_steps: int
) -> Item:
    return build_item(
        task,
        f"Question: {question}\nAnswer:",
        gold=f" {final}",
        wrong=[f" {other}" for other in rng.sample(list(wrong), len(wrong))],
        position=rng.randrange(NUM_OPTIONS),
        question=question,
        params={"num_steps": num_steps, "worked": f"{worked} The answer is {final}.", "final": final},
    )


def copying_items(wanted: Wanted, *, offset: Value = 1) -> list[Item]:
    """A list that is said again from a given word on, in steps of ``offset``: which word comes next?

    The options are four neighbours of the list, the given word left out, among which the right one has every rank
    equally often.
    """
    steps = check_range("copying offset", offset, 1, MAX_OFFSET)
    return wanted.distinct("copying", lambda rng, number: make_copy(rng, wanted.split, steps, number), offset=steps)


def brackets_items(wanted: Wanted, *, depth: Value = 3) -> list[Item]:
    """A run with ``depth`` open brackets and the brackets that close it; the options are orders of the same ones."""
    deep = check_range("brackets depth", depth, MIN_DEPTH, MAX_DEPTH)
    return wanted.distinct("brackets", lambda rng, number: make_run(rng, wanted.split, deep, number), depth=deep)


def sorting_items(wanted: Wanted, *, elements: Value = "word", num_elements: Value = 5) -> list[Item]:
    """Words in alphabetical order, or numbers of two digits ascending.

    The wrong options swap two neighbours, two others, or all four; all options begin alike.
    """
    check_choice("sorting elements", elements, ORDERS)
    count = check_range("sorting num_elements", num_elements, MIN_ELEMENTS, MAX_ELEMENTS)
    return wanted.distinct(
        "sorting",
        lambda rng, number: make_order(rng, wanted.split, str(elements), count, number),
        elements=elements,
        num_elements=count,
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
    return build_item(
        "copying",
        f"{', '.join(listed)}\nAgain, in steps of {offset}: {listed[asked]},",
        gold=f" {listed[answer]}",
        wrong=[f" {other}" for other in rng.sample(options, last)],
        position=rng.randrange(NUM_OPTIONS),
        question=f"{', '.join(listed)}. Which word comes after {listed[asked]}, in steps of {offset}?",
        params={"offset": offset, "final": listed[answer]},
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
    final = " ".join(right)
    wrong: list[list[str]] = []
    while len(wrong) < NUM_OPTIONS - 1:
        order = rng.sample(right, depth)
        if order not in (right, *wrong):
            wrong.append(order)
    return build_item(
        "brackets",
        " ".join(run),
        gold=f" {final}",
        wrong=[f" {' '.join(order)}" for order in wrong],
        position=number,
        question=f"Which brackets close {' '.join(run)}?",
        params={"depth": depth, "final": final},
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
    final = ", ".join(right)
    name, how = ORDERS[elements]
    return build_item(
        "sorting",
        f"{name}: {', '.join(shuffled)}\n{how[0].upper()}{how[1:]}:",
        gold=f" {final}",
        wrong=[f" {', '.join(order)}" for order in rng.sample(orders[1:], NUM_OPTIONS - 1)],
        position=number,
        question=f"Sort {', '.join(shuffled)} {how}.",
        params={"elements": elements, "num_elements": num_elements, "final": final},
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
