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
        ("A big tree", None),  # an article, not a letter
        ("A, a big tree", 0),
        ("A because of the leaves", 0),
        ("A - an oak tree", 0),
        ("A (an oak tree)", 0),
        ("**A** an oak tree", 0),
        ("A-level questions", None),
        ("The answer is A", 0),
        ("the answer is a.", 0),
        ("The answer is a big one", None),
        ("The answer is an oak tree.", 0),
        ("Answer: Oslo and Rome", 3),
        ("The answer is \u212a", None),  # the sign of kelvin, which is no K
        ("", None),
        ("the moon", None),
        ("not B\nB", None),
        ("Boston", None),
        ("B is wrong, the answer is C", 2),
        ("(B) is not right. The answer is D.", 3),
        ("B isn't right; the answer is D", 3),
        ("A is incorrect, so option C", 2),
        ("option B is incorrect; C", None),
        ("The answer is C? No, B.", None),
        ("B is right, C is wrong", 1),
        ("B, not C", 1),
        ("B - not C", 1),
        ("B is the answer", 1),
        ("The answer is C, no doubt", 2),
        ("C?", 2),
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
        ("3.5km", ["3"], False),
        ("12,500km", ["12"], False),
        ("3/4", ["3"], False),
        ("3 / 4", ["3"], False),
        ("10:30", ["10"], False),
        ("10-4", ["10"], False),
        ("2^4", ["2"], False),
        ("1,2,3", ["1"], False),
        (".5", ["5"], False),
        (".5", ["0.5"], True),
        ("3.", ["3"], True),
        ("3, 4 and 5", ["3"], True),
        ("5-year-old", ["5"], True),
        ("\u201cParis\u201d", ["Paris"], True),
        ("\u00abParis\u00bb \u2014 of course", ["Paris"], True),
        ("O\u2019Neill", ["O'Neill"], True),
        ("5\u00b0", ["5\u20ac"], False),
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
        ("the answer is \\frac{3}{4}", "3", False),
        ("the answer is \\frac{3}{4}", "0.75", True),
        ("the answer is -\\dfrac{3}{4}.", "-0.75", True),
        ("#### 1/2", "1", False),
        ("#### 1/2", "0.5", True),
        ("#### 1/2", "1/2", True),
        ("#### 3", "3/4", False),
        ("#### 1/0", "1", False),
        ("#### 10:30", "10", False),
        ("#### 2^4", "2", False),
        ("#### 2^{4}", "2", False),
        ("Step 1: 5", "5", True),
        ("so .5", "5", False),
        ("60 km/h", "60", True),
    ],
)
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
