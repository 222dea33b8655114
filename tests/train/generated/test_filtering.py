"""Which written texts are kept."""

import pytest

from shoal.abilities.knowledge import stated_facts
from shoal.train.generated.filtering import answers_alike, sifted, without_evaluation_facts


def record(written: str, *, prompt: str = "Well, ", answer: str | None = None) -> dict[str, str | None]:
    return {"text": prompt + written, "written": written, "answer": answer}


@pytest.mark.slow
def test_what_is_not_worth_training_on_is_left_out_and_counted():
    fact = sorted(stated_facts("eval"))[0]
    records = [record(one) for one in ("a text", "  \n", "no " * 40, "a text", f"so {fact}", "another")]
    kept, counts = sifted(records, keep="all")
    assert [one["written"] for one in kept] == ["a text", "another"]
    assert counts == {
        "written": 6,
        "empty": 1,
        "looping": 1,
        "repeated": 1,
        "evaluation fact": 1,
        "wrong": 0,
        "kept": 2,
    }
    assert without_evaluation_facts([fact, "a text"]) == ["a text"]


def test_only_right_answers_are_kept_where_that_is_asked_for():
    records = [record("6 * 7 = 42", answer="#### 42"), record("6 * 7 = 41", answer="#### 42")]
    kept, counts = sifted(records, keep="correct")
    assert [one["written"] for one in kept] == ["6 * 7 = 42"]
    assert counts["wrong"] == 1
    assert len(sifted(records, keep="all")[0]) == 2


@pytest.mark.parametrize(
    ("written", "answer", "alike"),
    [
        ("so it is 42.", "6 * 7 = <<6*7=42>>42\n#### 42", True),
        ("so it is 1,042.00 in all", "#### 1042", True),
        ("first 42, then 43", "#### 42", False),
        ("#### 42\nThat took 3 minutes", "#### 42", True),
        ("10-3 = 7, so -7", "#### -7", True),
        ("5-3", "#### -3", False),
        (r"therefore \boxed{\frac{3}{4}}", r"we find \boxed{ \frac{3}{4} }", True),
        (r"therefore \boxed{\frac{3}{5}}", r"we find \boxed{\frac{3}{4}}", False),
        ("therefore 4", r"we find \boxed{\frac{3}{4}}", False),
        ("It was built in 1889.\nparis", "Paris.", True),
        ("Paris, as we know", "Paris", False),
        ("The capital of France is **Paris**.", "Paris", True),
        ('The plural of "foot" is "feet."', "feet", True),
        ("It was Franz Kafka", "Kafka", True),
        ("It was Kafka", "Franz Kafka", False),
        ("It is comparis.", "Paris", False),
        ("It is not Paris.", "Paris", False),
        ("It isn't really Paris.", "Paris", False),
        (r"so it is a + \frac{b}{c}", r"\boxed{\frac{b}{c}}", False),
        ("no number", "#### 5", False),
        ("in all 12", "There were 12 of them", True),
        (r"\boxed{\frac{3}{4}}", r"so \boxed{4}", False),
        (r"\boxed{2^{4}}", "#### 4", False),
        ("#### 10-4", "#### 4", False),
        (r"\boxed{\sqrt{4}}", "#### 4", False),
        (r"\boxed{4\pi}", "#### 4", False),
        ("#### 10-4 = 6", "#### 6", True),
        ("#### 42 dollars", "#### 42", True),
        (r"so \boxed{\$1{,}042}", "#### 1042", True),
        (r"so \boxed{x = -42\text{ km}}", "#### -42", True),
        (r"\boxed{50\%}", "#### 50", True),
        ("The answer is 2.", "1/2", False),
        (r"x = \boxed{2}", "1/2", False),
        ("The answer is 1/2", "2", False),
        ("The answer is 0.5", "1/2", True),
        ("so 1/2", "1/2", True),
        (r"so \boxed{1/2}", "1/2", True),
        (r"so \boxed{x = \frac{1}{2}}", "#### 0.5", True),
        ("so it is 3/4", r"\boxed{\frac{3}{4}}", True),
        (r"so \boxed{-\frac{1}{2}}", "#### 0.5", False),
        ("so it is .5", "0.5", True),
        ("#### .5", "0.5", True),
        ("#### .5", "5", False),
        ("so it is \u22127", "#### -7", True),
        ("So it is 30", "at 10:30", False),
        ("It leaves at 10:30, as said", "at 10:30", True),
        ("It leaves at 11:30", "at 10:30", False),
        ("It is 3", "2^3", False),
        ("It is 2^3", "3", False),
        ("It is 2^{3}", "2^3", True),
        ("", "Paris", False),
        ("", "", False),
    ],
)
def test_answers_are_compared_by_what_they_come_to(written: str, answer: str, alike: bool):
    assert answers_alike(written, answer) is alike
