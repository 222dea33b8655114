"""Multi-step problems with a worked answer, and wrong twins of that answer that look the same.

A twin keeps the wording and the length. It goes wrong at one step and carries the error through, or works rightly up to
a wrong last step, so nothing but following the steps tells it from the right answer.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from shoal.abilities import words
from shoal.abilities.item import Item, Value, build_item, check_choice, check_range, generator, split_of, words_in

GAINS = ("{name} buys {number} more.", "{name} finds {number} more.", "{name} gets {number} more.")
LOSSES = ("{name} gives away {number}.", "{name} loses {number}.", "{name} sells {number}.")
MAX_STEPS = 8


@dataclass(frozen=True)
class Problem:
    """A story with its question, the right worked answer, and at least three wrong ones."""

    question: str
    worked: str
    twins: Sequence[str]
    final: str


def reasoning_items(*, split: str, num_items: int, seed: int, num_steps: Value = 2, kind: Value = None) -> list[Item]:
    """Problems of one kind, or of all kinds in turn; `num_steps` is the length of the worked answer.

    Raises:
        ValueError: for an unknown kind or a number of steps outside its range.
    """
    check_range("reasoning num_steps", num_steps, 1, MAX_STEPS)
    assert isinstance(num_steps, int)
    if kind is not None:
        check_choice("reasoning kind", kind, KINDS)
    rng = generator("reasoning", split, seed, num_steps=num_steps, kind=kind)
    kinds = tuple(KINDS) if kind is None else (str(kind),)
    made: dict[str, Item] = {}
    while len(made) < num_items:
        item = make_problem(rng, split, kinds[len(made) % len(kinds)], num_steps)
        made.setdefault(item.id, item)
    return list(made.values())


def make_problem(rng: random.Random, split: str, kind: str, num_steps: int) -> Item:
    """One problem as an item with three twins."""
    problem = KINDS[kind](rng, split, num_steps)
    wrong = sorted(set(problem.twins) - {problem.worked})
    return build_item(
        "reasoning",
        f"Question: {problem.question}\nAnswer:",
        gold=f" {problem.worked}",
        wrong=[f" {twin}" for twin in rng.sample(wrong, 3)],
        position=rng.randrange(4),
        question=problem.question,
        params={"kind": kind, "num_steps": num_steps, "final": problem.final},
    )


def arithmetic(rng: random.Random, split: str, num_steps: int) -> Problem:
    """Gaining and losing things; the worked answer writes one equation per step."""
    name = rng.choice(words_in(split, "name", words.NAMES))
    things = rng.choice(words_in(split, "thing", words.THINGS))
    start, changes = draw_numbers(rng, split, num_steps)
    story = [f"{name} has {start} {things}."]
    story += [rng.choice(GAINS if change > 0 else LOSSES).format(name=name, number=abs(change)) for change in changes]

    def work(changes: Sequence[int], slips: Sequence[int]) -> str:
        total, lines = start, []
        for change, slip in zip(changes, slips, strict=True):
            result = total + change + slip
            lines.append(f"{total} {'+' if change > 0 else '-'} {abs(change)} = {result}.")
            total = result
        return f"{name} has {start} {things}. {' '.join(lines)} The answer is {total}."

    def slipping(step: int, slip: int) -> list[int]:
        return [slip if index == step else 0 for index in range(num_steps)]

    flipped = [[-change if i == step else change for i, change in enumerate(changes)] for step in range(num_steps)]
    twins = [work(wrong, [0] * num_steps) for wrong in flipped if lowest_total(start, wrong) >= 0]
    early = rng.randrange(max(1, num_steps - 1))
    twins += [work(changes, slipping(early, slip)) for slip in rng.sample((-2, -1, 1, 2), 2)]
    twins += [work(changes, slipping(num_steps - 1, slip)) for slip in rng.sample((-4, -3, 3, 4), 2)]
    return Problem(
        f"{' '.join(story)} How many {things} does {name} have now?",
        work(changes, [0] * num_steps),
        twins,
        str(start + sum(changes)),
    )


def draw_numbers(rng: random.Random, split: str, num_steps: int) -> tuple[int, list[int]]:
    """A small start and signed changes that belong to the split together; totals from 5 up keep slips positive."""
    while True:
        start = rng.randint(6, 20)
        changes = [rng.choice((-1, 1)) * rng.randint(1, 5) for _ in range(num_steps)]
        if lowest_total(start, changes) >= 5 and split_of("numbers", start, *changes) == split:
            return start, changes


def lowest_total(start: int, changes: Sequence[int]) -> int:
    """The smallest amount on the way."""
    return min(start + sum(changes[: index + 1]) for index in range(len(changes)))


def order(rng: random.Random, split: str, num_steps: int) -> Problem:
    """Shuffled pairwise comparisons; the worked answer chains them into one ranking."""
    ranking = rng.sample(words_in(split, "name", words.NAMES), num_steps + 1)
    comparative, top, bottom = rng.choice(words.COMPARISONS)
    ask_top = rng.random() < 0.5
    facts = [f"{high} is {comparative} than {low}." for high, low in pairwise(ranking)]

    def work(ranking: Sequence[str], final: str) -> str:
        chain = " ".join(f"{high} is {comparative} than {low}." for high, low in pairwise(ranking))
        return f"{chain} So the order is {', '.join(ranking)}. The {top if ask_top else bottom} is {final}."

    def end_of(ranking: Sequence[str]) -> str:
        return ranking[0 if ask_top else -1]

    final = end_of(ranking)
    swaps = []
    for step in range(num_steps):
        swapped = list(ranking)
        swapped[step], swapped[step + 1] = swapped[step + 1], swapped[step]
        swaps.append(work(swapped, end_of(swapped)))
    swaps.append(work(ranking[::-1], end_of(ranking[::-1])))
    swaps.append(work(ranking[::-1], final))
    wrong_end = [work(ranking, name) for name in ranking if name != final]
    question = f"{' '.join(rng.sample(facts, len(facts)))} Who is the {top if ask_top else bottom}?"
    return Problem(question, work(ranking, final), [*rng.sample(list(dict.fromkeys(swaps)), 2), *wrong_end], final)


def state(rng: random.Random, split: str, num_steps: int) -> Problem:
    """Two objects that are moved about; the worked answer writes where both are after every step."""
    objects = rng.sample(words_in(split, "object", words.OBJECTS), 2)
    places = rng.sample(words_in(split, "place", words.PLACES), num_steps + 2)
    movers = [rng.randrange(2) for _ in range(num_steps)]
    moves = list(zip(movers, places[2:], strict=True))
    asked = rng.randrange(2)

    def work(moves: Sequence[tuple[int, str]], *, answered: int = asked) -> str:
        where, lines = places[:2], []
        for mover, place in moves:
            where = [place if index == mover else old for index, old in enumerate(where)]
            lines.append(f"Now the {objects[0]} is in the {where[0]} and the {objects[1]} is in the {where[1]}.")
        return f"{' '.join(lines)} So the {objects[asked]} is in the {where[answered]}."

    story = [f"The {objects[0]} is in the {places[0]} and the {objects[1]} is in the {places[1]}."]
    story += [f"Then the {objects[mover]} is moved to the {place}." for mover, place in moves]
    twins = [work(moves, answered=1 - asked)]
    for step, (mover, place) in enumerate(moves):
        twins.append(work([*moves[:step], (1 - mover, place), *moves[step + 1 :]]))
        elsewhere = rng.choice([other for other in places if other != place])
        twins.append(work([*moves[:step], (mover, elsewhere), *moves[step + 1 :]]))
    last_place = next((place for mover, place in reversed(moves) if mover == asked), places[asked])
    return Problem(f"{' '.join(story)} Where is the {objects[asked]}?", work(moves), twins, last_place)


KINDS: dict[str, Callable[[random.Random, str, int], Problem]] = {
    "arithmetic": arithmetic,
    "order": order,
    "state": state,
}
