"""Multi-step problems with a worked answer, and wrong variants of that answer that look the same.

A variant keeps the wording and the length. It goes wrong at one step and carries the error through, or works rightly up
to a wrong last step, so nothing but following the steps tells it from the right answer.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

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

MAX_STEPS = 8


@dataclass(frozen=True)
class StoryForm(Form):
    """The carrier of a story and its wording, kind by kind."""

    text: str
    """Around the story and the question; ends right before the worked answer."""

    sentence: str = "{sentence}"
    """One sentence of the story."""

    joint: str = " "
    """Between sentences of the story."""

    spelled: bool = False
    """Numbers as words."""

    has: str = "{name} has {number} {things}."
    gains: tuple[str, str, str] = (
        "{name} buys {number} more.",
        "{name} finds {number} more.",
        "{name} gets {number} more.",
    )
    losses: tuple[str, str, str] = ("{name} gives away {number}.", "{name} loses {number}.", "{name} sells {number}.")
    how_many: str = "How many {things} does {name} have now?"
    plus: str = "{total} + {number} = {result}."
    minus: str = "{total} - {number} = {result}."
    amount: str = "{has} {lines} The answer is {number}."

    compared: str = "{high} is {comparative} than {low}."
    who: str = "Who is the {superlative}?"
    ranking: str = "{lines} So the order is {names}. The {superlative} is {name}."

    placed: str = "The {thing} is in the {place} and the {other} is in the {elsewhere}."
    moved: str = "Then the {thing} is moved to the {place}."
    where: str = "Where is the {thing}?"
    now: str = "Now the {thing} is in the {place} and the {other} is in the {elsewhere}."
    found: str = "{lines} So the {thing} is in the {place}."

    def number(self, value: int) -> str:
        """A number as this form writes it."""
        return spelled(value) if self.spelled else str(value)

    def asked(self, story: Sequence[str], question: str) -> str:
        """Story and question, without the carrier."""
        sentences = [self.sentence.format(sentence=sentence) for sentence in story]
        return f"{self.joint.join(sentences)}{self.joint}{question}"


FORMS = forms_of(StoryForm, "reasoning")
ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def spelled(value: int) -> str:
    """A whole number below 100 in words."""
    if value < 20:
        return ONES[value]
    return TENS[value // 10] + (f"-{ONES[value % 10]}" if value % 10 else "")


@dataclass(frozen=True)
class Problem:
    """A story with its question, the right worked answer, and wrong ones."""

    question: str
    worked: str
    variants: Sequence[str]
    final: str


Telling = Callable[[StoryForm], Problem]
"""A problem's content, to be put into any form."""


def reasoning_items(wanted: Wanted, *, num_steps: Value = 2, kind: Value = None, form: Value = None) -> list[Item]:
    """Problems of one kind, or of all kinds in turn; `num_steps` is the length of the worked answer.

    Raises:
        ValueError: for an unknown kind or form, or a number of steps outside its range.
    """
    num_steps = check_range("reasoning num_steps", num_steps, 1, MAX_STEPS)
    if kind is not None:
        check_choice("reasoning kind", kind, KINDS)
    forms = assigned_forms(FORMS, form, "reasoning", wanted.num_items)
    rng = wanted.generator("reasoning", num_steps=num_steps, kind=kind)
    kinds = tuple(KINDS) if kind is None else (str(kind),)
    items: dict[str, Item] = {}
    while len(items) < wanted.num_items:
        item = make_problem(rng, wanted.split, kinds[len(items) % len(kinds)], num_steps, form=forms[len(items)])
        items.setdefault(item.id, item)
    return list(items.values())


def make_problem(rng: random.Random, split: str, kind: str, num_steps: int, *, form: StoryForm = FORMS[0]) -> Item:
    """One problem as an item with three variants."""
    tell = KINDS[kind](rng, split, num_steps)
    plain = tell(FORMS[0])
    wrong = [plain.variants.index(variant) for variant in rng.sample(sorted({*plain.variants} - {plain.worked}), 3)]
    position = rng.randrange(4)

    def item(form: StoryForm) -> Item:
        problem = tell(form)
        return build_item(
            "reasoning",
            form.text.format(problem=problem.question),
            gold=f" {problem.worked}",
            wrong=[f" {problem.variants[index]}" for index in wrong],
            position=position,
            question=problem.question,
            params={"kind": kind, "num_steps": num_steps, "final": problem.final},
        )

    return item(form) if form == FORMS[0] else replace(item(form), id=item(FORMS[0]).id)


def arithmetic(rng: random.Random, split: str, num_steps: int) -> Telling:
    """Gaining and losing things; the worked answer writes one equation per step."""
    name = rng.choice(words_in(split, "name", words.NAMES))
    things = rng.choice(words_in(split, "thing", words.THINGS))
    start, changes = draw_numbers(rng, split, num_steps)
    ways = [rng.choice(range(len(FORMS[0].gains))) for _ in changes]
    flipped = [[-change if i == step else change for i, change in enumerate(changes)] for step in range(num_steps)]
    right = [0] * num_steps

    def slipping(step: int, slip: int) -> list[int]:
        return [slip if index == step else 0 for index in range(num_steps)]

    wrong = [(other, right) for other in flipped if lowest_total(start, other) >= 0]
    early = rng.randrange(max(1, num_steps - 1))
    wrong += [(changes, slipping(early, slip)) for slip in rng.sample((-2, -1, 1, 2), 2)]
    wrong += [(changes, slipping(num_steps - 1, slip)) for slip in rng.sample((-4, -3, 3, 4), 2)]

    def tell(form: StoryForm) -> Problem:
        has = form.has.format(name=name, number=form.number(start), things=things)

        def work(changes: Sequence[int], slips: Sequence[int]) -> str:
            total, lines = start, []
            for change, slip in zip(changes, slips, strict=True):
                result = total + change + slip
                told = {
                    key: form.number(n) for key, n in (("total", total), ("number", abs(change)), ("result", result))
                }
                lines.append((form.plus if change > 0 else form.minus).format(**told))
                total = result
            return form.amount.format(has=has, lines=" ".join(lines), number=form.number(total))

        story = [has]
        for change, way in zip(changes, ways, strict=True):
            story.append(
                (form.gains if change > 0 else form.losses)[way].format(name=name, number=form.number(abs(change)))
            )
        question = form.how_many.format(things=things, name=name)
        final = form.number(start + sum(changes))
        return Problem(form.asked(story, question), work(changes, right), [work(*one) for one in wrong], final)

    return tell


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


def order(rng: random.Random, split: str, num_steps: int) -> Telling:
    """Shuffled pairwise comparisons; the worked answer chains them into one ranking."""
    ranking = rng.sample(words_in(split, "name", words.NAMES), num_steps + 1)
    comparative, top, bottom = rng.choice(words.COMPARISONS)
    ask_top = rng.random() < 0.5
    superlative, end = (top, 0) if ask_top else (bottom, -1)
    final = ranking[end]
    swaps = []
    for step in range(num_steps):
        swapped = list(ranking)
        swapped[step], swapped[step + 1] = swapped[step + 1], swapped[step]
        swaps.append((tuple(swapped), swapped[end]))
    backwards = tuple(ranking[::-1])
    swaps += [(backwards, backwards[end]), (backwards, final)]
    shown = rng.sample(range(num_steps), num_steps)
    wrong = rng.sample(list(dict.fromkeys(swaps)), 2) + [(tuple(ranking), name) for name in ranking if name != final]

    def tell(form: StoryForm) -> Problem:
        def facts(ranking: Sequence[str]) -> list[str]:
            return [
                form.compared.format(high=high, comparative=comparative, low=low) for high, low in pairwise(ranking)
            ]

        def work(ranking: Sequence[str], name: str) -> str:
            told = {"lines": " ".join(facts(ranking)), "names": ", ".join(ranking)}
            return form.ranking.format(**told, superlative=superlative, name=name)

        story = [facts(ranking)[index] for index in shown]
        question = form.asked(story, form.who.format(superlative=superlative))
        return Problem(question, work(ranking, final), [work(*one) for one in wrong], final)

    return tell


def state(rng: random.Random, split: str, num_steps: int) -> Telling:
    """Two objects that are moved about; the worked answer writes where both are after every step."""
    objects = rng.sample(words_in(split, "object", words.OBJECTS), 2)
    places = rng.sample(words_in(split, "place", words.PLACES), num_steps + 2)
    movers = [rng.randrange(2) for _ in range(num_steps)]
    moves = list(zip(movers, places[2:], strict=True))
    asked = rng.randrange(2)
    wrong = [(moves, 1 - asked)]
    for step, (mover, place) in enumerate(moves):
        wrong.append(([*moves[:step], (1 - mover, place), *moves[step + 1 :]], asked))
        elsewhere = rng.choice([other for other in places if other != place])
        wrong.append(([*moves[:step], (mover, elsewhere), *moves[step + 1 :]], asked))
    last_place = next((place for mover, place in reversed(moves) if mover == asked), places[asked])

    def tell(form: StoryForm) -> Problem:
        def both(template: str, where: Sequence[str]) -> str:
            return template.format(thing=objects[0], place=where[0], other=objects[1], elsewhere=where[1])

        def work(moves: Sequence[tuple[int, str]], answered: int) -> str:
            where, lines = places[:2], []
            for mover, place in moves:
                where = [place if index == mover else old for index, old in enumerate(where)]
                lines.append(both(form.now, where))
            return form.found.format(lines=" ".join(lines), thing=objects[asked], place=where[answered])

        story = [both(form.placed, places), *(form.moved.format(thing=objects[m], place=place) for m, place in moves)]
        question = form.asked(story, form.where.format(thing=objects[asked]))
        return Problem(question, work(moves, asked), [work(*one) for one in wrong], last_place)

    return tell


KINDS: dict[str, Callable[[random.Random, str, int], Telling]] = {
    "arithmetic": arithmetic,
    "order": order,
    "state": state,
}
