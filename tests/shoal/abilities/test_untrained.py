"""Problems of k steps: solved anew from their text alone, and nothing but the steps tells the right option."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import pytest

from shoal.abilities import Item, items
from shoal.abilities.untrained import MAX_STEPS

STEPS = (1, 2, 3, 5, 8, MAX_STEPS)
CHANCE, SLACK = 0.25, 0.075
"""Four standard errors of 600 guesses."""


def made(task: str, num_steps: int, num_items: int = 200) -> list[Item]:
    return items(task, split="eval", num_items=num_items, seed=0, num_steps=num_steps)


def held_at_first(question: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+) has the (\w+)", question.split(". ")[0]))


def swapped(question: str) -> list[tuple[str, str]]:
    return re.findall(r"Then (\w+) and (\w+) swap", question)


def solve_swaps(question: str) -> str:
    """From the asked person backwards to who had the object at first: another way than the generator's."""
    holder = question.split("What does ")[1].split()[0]
    for one, other in reversed(swapped(question)):
        holder = other if holder == one else one if holder == other else holder
    return held_at_first(question)[holder]


def solve_walk(question: str) -> str:
    table = dict(re.findall(r"^(\w+) -> (\w+)$", question, flags=re.MULTILINE))
    place = question.split("Start at ")[1].split()[0]
    times = re.findall(r"arrow (?:(\d+) times|once)\.", question)[0]
    for _ in range(int(times or 1)):
        place = table[place]
    return place


def solve_expression(question: str) -> str:
    expression = question.removeprefix("What is ").removesuffix("?")

    def value(node: ast.AST) -> int:
        if isinstance(node, ast.Constant):
            assert isinstance(node.value, int)
            return node.value
        assert isinstance(node, ast.BinOp)
        left, right = value(node.left), value(node.right)
        result = left + right if isinstance(node.op, ast.Add) else left - right
        assert 0 <= result <= 40
        return result

    return str(value(ast.parse(expression, mode="eval").body))


SOLVERS: dict[str, Callable[[str], str]] = {
    "state_tracking": solve_swaps,
    "multi_hop": solve_walk,
    "nested_arithmetic": solve_expression,
}


@pytest.mark.parametrize("task", SOLVERS)
@pytest.mark.parametrize("num_steps", STEPS)
def test_an_independent_solver_finds_the_answer_and_no_other_option_is_right(task: str, num_steps: int) -> None:
    for item in made(task, num_steps):
        solution = SOLVERS[task](item.question)
        assert [option.strip() == solution for option in item.options] == [i == item.answer for i in range(4)]
        assert item.params["final"] == solution
        assert item.context == f"Question: {item.question}\nAnswer:"


@pytest.mark.parametrize("num_steps", STEPS)
def test_the_dial_turns_the_steps_and_nothing_else(num_steps: int) -> None:
    for item in made("state_tracking", num_steps, 20):
        swaps = swapped(item.question)
        assert len(swaps) == num_steps
        assert all(set(one) != set(next_one) for one, next_one in pairwise(swaps))
        assert set(held_at_first(item.question).values()) == {option.strip() for option in item.options}
    for item in made("multi_hop", num_steps, 20):
        rows = re.findall(r"^(\w+) -> (\w+)$", item.question, flags=re.MULTILINE)
        assert len(rows) == len({left for left, _ in rows}) == len({right for _, right in rows}) == 16
    for item in made("nested_arithmetic", num_steps, 20):
        assert len(re.findall(r"[+-]", item.question)) == num_steps
        deepest = max(item.question[:end].count("(") - item.question[:end].count(")") for end in range(80))
        assert deepest == num_steps - 1


@pytest.mark.parametrize("task", SOLVERS)
def test_the_worked_answer_does_every_step_and_ends_in_the_answer(task: str) -> None:
    for item in made(task, 5, 40):
        *steps, last = re.findall(r"[^.]+\.", str(item.params["worked"]))
        assert len(steps) == 5
        assert last.strip() == f"The answer is {item.params['final']}."
    for item in made("nested_arithmetic", 5, 40):
        for left, sign, right, result in re.findall(r"(\d+) ([+-]) (\d+) = (\d+)\.", str(item.params["worked"])):
            assert int(left) + int(sign + right) == int(result)
    for item in made("state_tracking", 3, 40):
        held = held_at_first(item.question)
        for (one, other), line in zip(swapped(item.question), str(item.params["worked"]).split(". "), strict=False):
            held[one], held[other] = held[other], held[one]
            assert dict(re.findall(r"(\w+) has the (\w+)", line)) == {one: held[one], other: held[other]}


def named(item: Item, wanted: str | None) -> int | None:
    """The option that is this word."""
    options = [option.strip() for option in item.options]
    return options.index(wanted) if wanted in options else None


def guesses_of_swaps(item: Item) -> dict[str, int | None]:
    held, swaps = held_at_first(item.question), swapped(item.question)
    people = Counter(person for pair in swaps for person in pair)
    asked = item.question.split("What does ")[1].split()[0]
    found = {f"listed {rank}": named(item, thing) for rank, thing in enumerate(held.values())}
    found |= {
        "had it at first": named(item, held[asked]),
        "first swap": named(item, held[swaps[0][0]]),
        "last swap": named(item, held[swaps[-1][1]]),
        "swaps most": named(item, held[max(held, key=lambda person: people[person])]),
        "swaps least": named(item, held[min(held, key=lambda person: people[person])]),
    }
    return found


def guesses_of_walk(item: Item) -> dict[str, int | None]:
    table = re.findall(r"^(\w+) -> (\w+)$", item.question, flags=re.MULTILINE)
    lefts, rights = [left for left, _ in table], [right for _, right in table]
    options = [option.strip() for option in item.options]
    start = item.question.split("Start at ")[1].split()[0]
    following = dict(table)
    inside = [word for word in options if following[word] in options and word in (following[o] for o in options)]
    near = {word: abs(rights.index(word) - lefts.index(start)) for word in options}
    return {
        "highest row": named(item, min(options, key=rights.index)),
        "lowest row": named(item, max(options, key=rights.index)),
        "highest left": named(item, min(options, key=lefts.index)),
        "nearest to the start's row": named(item, min(options, key=near.__getitem__)),
        "farthest from the start's row": named(item, max(options, key=near.__getitem__)),
        "stands between two options": named(item, (inside or options)[0]),
        "leads to another option": named(item, next((o for o in options if dict(table)[o] in options), options[0])),
        "another option leads here": named(
            item, next((dict(table)[o] for o in options if dict(table)[o] in options), options[0])
        ),
    }


def guesses_of_expression(item: Item) -> dict[str, int | None]:
    options = [int(option) for option in item.options]
    operands = [int(number) for number in re.findall(r"\d+", item.question)]
    ranked = sorted(options)
    found = {f"rank {rank}": named(item, str(number)) for rank, number in enumerate(ranked)}
    inside = [number for number in options if number in operands]
    outside = [number for number in options if number not in operands]
    return found | {
        "stands in it": named(item, str((inside or options)[0])),
        "does not stand in it": named(item, str((outside or options)[0])),
        "nearest to the last operand": named(item, str(min(options, key=lambda n: abs(n - operands[-1])))),
        "nearest to the mean": named(item, str(min(options, key=lambda n: abs(n * len(operands) - sum(operands))))),
    }


GUESSES = {"state_tracking": guesses_of_swaps, "multi_hop": guesses_of_walk, "nested_arithmetic": guesses_of_expression}


@pytest.mark.parametrize("task", GUESSES)
@pytest.mark.parametrize("num_steps", [2, 4, 8])
def test_choosing_by_the_surface_is_at_chance(task: str, num_steps: int) -> None:
    problems = made(task, num_steps, 600)
    places = Counter(item.answer for item in problems)
    assert all(abs(places[place] / len(problems) - CHANCE) < SLACK for place in range(4))
    right: Counter[str] = Counter()
    for item in problems:
        right.update(name for name, guess in GUESSES[task](item).items() if guess == item.answer)
        right["longest"] += max(range(4), key=lambda i: len(item.options[i])) == item.answer
    rates = {name: right[name] / len(problems) for name in (*GUESSES[task](problems[0]), "longest")}
    assert all(abs(rate - CHANCE) < SLACK for rate in rates.values()), rates


@pytest.mark.parametrize(("num_needles", "num_asked"), [(1, 1), (4, 1), (8, 1), (6, 2), (6, 3)])
def test_needles_are_found_where_they_should_be(num_needles: int, num_asked: int) -> None:
    settings = {"num_sentences": 60, "num_needles": num_needles, "num_asked": num_asked}
    for number, item in enumerate(items("needle", split="eval", num_items=50, seed=0, **settings)):
        text, question = item.question.split("\n\n")
        sentences = re.findall(r"[^.]+\.", text)
        codes = dict(re.findall(r"The code of the (\w+) is (\d+)\.", text))
        asked = re.findall(r"the (\w+)", question.split("of ", 1)[1].split(", in this")[0])
        assert len(sentences) == 60
        assert (len(codes), len(asked)) == (num_needles, num_asked)
        assert ", ".join(codes[key] for key in asked) == item.params["final"] == item.gold.strip()
        place = next(index for index, sentence in enumerate(sentences) if f"of the {asked[0]} is" in sentence)
        assert place == round((number % 5) / 4 * 59)
        assert all(text.count(code) == 1 for option in item.options for code in option.strip().split(", "))
