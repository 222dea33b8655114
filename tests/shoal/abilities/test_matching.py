"""Written text is read as a person would read it, and no more kindly."""

from __future__ import annotations

import pytest
from cases import cases

from shoal.abilities.matching import chosen_option, contains, exact, number, starts, stated

CASES = cases(__file__)

OPTIONS = ["an oak tree", "the sun", "Oslo", "Oslo and Rome"]


@pytest.mark.parametrize(("text", "chosen"), CASES["chosen_option"])
def test_chosen_option(text: str, chosen: int | None) -> None:
    assert chosen_option(text, OPTIONS) == chosen


@pytest.mark.parametrize(("text", "answers", "expected"), CASES["starts"])
def test_starts(text: str, answers: list[str], expected: bool) -> None:
    assert starts(text, answers) == expected


@pytest.mark.parametrize(("text", "answers", "expected"), CASES["contains"])
def test_contains(text: str, answers: list[str], expected: bool) -> None:
    assert contains(text, answers) == expected


@pytest.mark.parametrize(("text", "answer", "expected"), CASES["number"])
def test_number(text: str, answer: str, expected: bool) -> None:
    assert number(text, [answer]) == expected


def test_stated_and_exact() -> None:
    assert stated("Now Ann has the cup. The answer is cup.", ["cup"])
    assert stated("The answer is the cup. The answer is pen.", ["cup"])
    assert not stated("Now Ann has the cup.", ["cup"])
    assert not stated("The answer is cupboard", ["cup"])
    assert not stated("The answer is 3/4", ["3"])
    assert exact(" ] ) >\n", ["] ) >"])
    assert not exact("] )", ["] ) >"])
