"""Copying, brackets and sorting: solved anew from their text alone, and the surface tells no option apart."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import pytest

from shoal.abilities import Item, items
from shoal.abilities.item import Value

PAIRS = {"(": ")", "[": "]", "{": "}", "<": ">"}
CHANCE, SLACK = 0.25, 0.075
"""Four standard errors of 600 guesses."""
SETTINGS: tuple[tuple[str, dict[str, Value]], ...] = (
    ("copying", {"offset": 1}),
    ("copying", {"offset": 2}),
    ("copying", {"offset": 4}),
    ("brackets", {"depth": 3}),
    ("brackets", {"depth": 4}),
    ("brackets", {"depth": 8}),
    ("sorting", {"elements": "word", "num_elements": 5}),
    ("sorting", {"elements": "word", "num_elements": 9}),
    ("sorting", {"elements": "number", "num_elements": 5}),
    ("sorting", {"elements": "number", "num_elements": 9}),
)


def made(task: str, settings: dict[str, Value], num_items: int = 200, split: str = "eval") -> list[Item]:
    return items(task, split=split, num_items=num_items, seed=0, **settings)


def listed(item: Item) -> list[str]:
    """The words of the list."""
    return item.context.split("\n")[0].split(", ")


def given_word(item: Item) -> str:
    """The word from which the list goes on."""
    assert item.context.endswith(",")
    return item.context.rstrip(",").split()[-1]


def solve_copying(item: Item) -> str:
    words = listed(item)
    return words[words.index(given_word(item)) :: int(re.findall(r"in steps of (\d):", item.context)[0])][1]


def solve_brackets(item: Item) -> str:
    """Balanced pairs are struck out until none is left; another way than the generator's."""
    run = item.context.replace(" ", "")
    while (shorter := re.sub(r"\(\)|\[\]|\{\}|<>", "", run)) != run:
        run = shorter
    return " ".join(PAIRS[bracket] for bracket in run[::-1])


def elements_of(item: Item) -> list[str]:
    return item.context.split("\n")[0].split(": ")[1].split(", ")


def solve_sorting(item: Item) -> str:
    """By counting how many elements are smaller."""
    elements = elements_of(item)
    return ", ".join(sorted(elements, key=lambda one: sum(other < one for other in elements)))


SOLVERS: dict[str, Callable[[Item], str]] = {
    "copying": solve_copying,
    "brackets": solve_brackets,
    "sorting": solve_sorting,
}


@pytest.mark.parametrize(("task", "settings"), SETTINGS)
def test_an_independent_solver_finds_the_answer_and_no_other_option_is_right(
    task: str, settings: dict[str, Value]
) -> None:
    for item in made(task, settings):
        solution = SOLVERS[task](item)
        assert [option.strip() == solution for option in item.options] == [i == item.answer for i in range(4)]
        assert item.params["final"] == solution
        assert all(part in item.question for part in re.findall(r"[^\s:]+", item.context.split("\n")[0])[1:])


@pytest.mark.parametrize(("task", "settings"), SETTINGS)
def test_options_have_the_same_parts_and_length(task: str, settings: dict[str, Value]) -> None:
    for item in made(task, settings, 50):
        options = [option.split() for option in item.options]
        assert len({len(option) for option in options}) == 1
        if task != "copying":
            assert len({tuple(sorted(option.strip(",") for option in parts)) for parts in options}) == 1
        if task == "sorting":
            assert len({parts[0] for parts in options}) == 1, "the first element tells nothing"


def guesses_of_copying(item: Item) -> dict[str, int]:
    words, options = listed(item), [option.strip() for option in item.options]
    given = words.index(given_word(item))
    ranked = sorted(range(4), key=lambda i: words.index(options[i]))
    found = {f"rank {rank}": option for rank, option in enumerate(ranked)}
    if item.params["offset"] != 1:  # for the neighbour these are the task
        found["nearest to the given"] = min(range(4), key=lambda i: abs(words.index(options[i]) - given))
    return found


def guesses_of_brackets(item: Item) -> dict[str, int]:
    run = item.context.split()
    options = [option.split() for option in item.options]
    often = Counter(PAIRS[bracket] for bracket in run if bracket in PAIRS)
    return {
        "alphabet": min(range(4), key=lambda i: options[i]),
        "like most others": max(
            range(4), key=lambda i: sum(a == b for other in options for a, b in zip(options[i], other, strict=True))
        ),
        "frequent ones first": max(range(4), key=lambda i: [often[bracket] for bracket in options[i]]),
    }


def guesses_of_sorting(item: Item) -> dict[str, int]:
    given, options = elements_of(item), [option.strip().split(", ") for option in item.options]

    def alike(one: list[str], other: list[str]) -> int:
        return sum(a == b for a, b in zip(one, other, strict=True))

    return {
        "like the given order": max(range(4), key=lambda i: alike(options[i], given)),
        "unlike the given order": min(range(4), key=lambda i: alike(options[i], given)),
        "like the other options": max(range(4), key=lambda i: sum(alike(options[i], other) for other in options)),
    }


GUESSES = {"copying": guesses_of_copying, "brackets": guesses_of_brackets, "sorting": guesses_of_sorting}


@pytest.mark.parametrize(("task", "settings"), SETTINGS)
def test_choosing_by_the_surface_is_at_chance(task: str, settings: dict[str, Value]) -> None:
    problems = made(task, settings, 600)
    places = Counter(item.answer for item in problems)
    assert all(abs(places[place] / len(problems) - CHANCE) < SLACK for place in range(4))
    right: Counter[str] = Counter()
    for item in problems:
        right.update(name for name, guess in GUESSES[task](item).items() if guess == item.answer)
        right["longest"] += max(range(4), key=lambda i: len(item.options[i])) == item.answer
    rates = {name: right[name] / len(problems) for name in (*GUESSES[task](problems[0]), "longest")}
    assert all(abs(rate - CHANCE) < SLACK for rate in rates.values()), rates
