"""Written text is read as a person would read it, and no more kindly."""

from __future__ import annotations

import pytest

from shoal.abilities.matching import chosen_option, contains, exact, number, starts, stated

OPTIONS = ["an oak tree", "the sun", "Oslo", "Oslo and Rome"]


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        (" B", 1),
        (" B.", 1),
        ("(C)", 2),
        ("D. Oslo and Rome", 3),
        ("\n\n B because", 1),
        ("The answer is (B).", 1),
        ("The correct answer is B", 1),
        ("Answer: C", 2),
        ("option d", 3),
        ("the sun", 1),
        ("Sun, of course", 1),
        ("oak tree", 0),
        ("Oslo", 2),
        ("Oslo and Rome", 3),
        ("E", None),
        ("I think so", None),
        ("A big tree", 0),  # an article reads like a letter, here as in every harness
        ("", None),
        ("the moon", None),
        ("not B\nB", None),
        ("Boston", None),
    ],
)
def test_chosen_option(text: str, chosen: int | None) -> None:
    assert chosen_option(text, OPTIONS) == chosen


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        (" Paris, which is", ["Paris"], True),
        (" the Beatles", ["Beatles"], True),
        (" Beatles", ["The Beatles"], True),
        (" Parisian", ["Paris"], False),
        (" It is Paris", ["Paris"], False),
        (" Edward III of England", ["King Edward III", "Edward III"], True),
        ("", ["Paris"], False),
        (" anything", [""], False),
        (" 3 apples", ["3"], True),
        (" $1,234.", ["1234"], True),
        (" (3)", ["3"], True),
        (" 1966, I think", ["1966"], True),
        (" -3", ["-3"], True),
        (" \u22123", ["-3"], True),
        (" -3", ["3"], False),
        (" 3", ["-3"], False),
        (" 3.5", ["3"], False),
        (" 30", ["3"], False),
        (" 3rd", ["3"], False),
        (" three", ["3"], False),
    ],
)
def test_starts(text: str, answers: list[str], expected: bool) -> None:
    assert starts(text, answers) == expected


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("It is in Paris.", ["Paris"], True),
        ("It is a\nParis", ["Paris"], False),
        ("Comparison", ["Paris"], False),
        ('"9ab-12"', ["9ab-12"], True),
        ("9ab-123", ["9ab-12"], False),
    ],
)
def test_contains(text: str, answers: list[str], expected: bool) -> None:
    assert contains(text, answers) == expected


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("3 + 4 = 7", "7", True),
        ("7 apples, then 8", "7", False),
        ("The answer is 7. That leaves 9.", "7", True),
        ("so #### 1,234", "1234", True),
        ("$1,234.00", "1234", True),
        ("7.0", "7", True),
        ("-5", "5", False),
        ("The answer is unclear: 7", "7", True),
        ("none", "7", False),
    ],
)
def test_number(text: str, answer: str, expected: bool) -> None:
    assert number(text, [answer]) == expected


def test_stated_and_exact() -> None:
    assert stated("Now Ann has the cup. The answer is cup.", ["cup"])
    assert stated("The answer is the cup. The answer is pen.", ["cup"])
    assert not stated("Now Ann has the cup.", ["cup"])
    assert not stated("The answer is cupboard", ["cup"])
    assert exact(" ] ) >\n", ["] ) >"])
    assert not exact("] )", ["] ) >"])
