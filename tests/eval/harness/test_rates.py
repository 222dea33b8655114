"""How written text fails: each rate by its definition, and the change between two models item by item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from cases import cases
from lm_eval.config.task import TaskConfig
from results import capitals
from scipy import stats

from shoal.artifacts.evaluation import TaskScore
from shoal.errors import UserError
from shoal.eval.harness.engine import ending_key
from shoal.eval.harness.rates import answer_pattern, rate, rate_difference
from shoal.eval.harness.samples import prompts_fingerprint, task_score
from shoal.eval.tasks.protocols import match_rule, match_start, match_stated
from shoal.stats.intervals import newcombe_paired
from shoal.stats.paired import mcnemar, paired


@pytest.mark.parametrize(("texts", "targets", "readable"), cases(__file__))
def test_an_answer_is_something_of_the_kind_that_every_target_holds(
    texts: list[str], targets: list[str], readable: list[int]
) -> None:
    assert [answer_pattern(targets).search(text) is not None for text in texts] == list(map(bool, readable))


def test_rates_of_a_task_are_means_over_its_texts() -> None:
    made = capitals(["Rome", "...", "Rome, " * 9, "Paris"], lengths=[1, 2, 30, 3], cut=[False, False, True, False])
    assert made.rates == {"malformed": 0.25, "repetition": 0.25, "cut_off": 0.25, "mean_tokens": 9.0}
    found = rate(made, "cut_off")
    expected = stats.binomtest(1, 4).proportion_ci(method="wilson")
    assert (found.value, found.ci_low, found.ci_high) == pytest.approx((0.25, expected.low, expected.high))
    length = rate(made, "mean_tokens")
    assert length.ci_low < 9.0 < length.ci_high


def test_changes_of_a_share_are_paired_by_item_and_fewer_defects_are_a_gain() -> None:
    before = capitals(["..."] * 12 + ["Rome"] * 38)
    after = capitals(["Rome"] * 11 + ["..."] + ["..."] * 2 + ["Rome"] * 36)
    shuffled = replace(after, items=after.items[::-1])
    for other in (after, shuffled):
        found = rate_difference(before, other, "malformed")
        assert (found.won, found.lost, found.test) == (11, 2, "mcnemar-exact")
        assert found.difference == pytest.approx(-9 / 50)
        assert found.p_value == mcnemar(11, 2)
        assert (found.ci_low, found.ci_high) == newcombe_paired(both=1, won=2, lost=11, neither=36)


# --- from what lm-eval logs ---------------------------------------------------------------------------------------


def logged(texts: Sequence[str], rule: Any = "", asked: str = "", **described: Any) -> TaskScore:
    """The score of written texts, of which every prompt is told apart by its number; ``asked`` = the rule of items."""
    settings = {"max_gen_toks": 8, "until": ["\n"]}
    config = SimpleNamespace(
        metadata=described,
        process_results=rule,
        to_dict=lambda: {"generation_kwargs": settings, "process_results": rule},
    )
    task = SimpleNamespace(
        OUTPUT_TYPE="generate_until",
        VERSION="1.0",
        config=config,
        higher_is_better=lambda: {"match": True},
        doc_to_text=lambda doc: doc["question"],
    )
    samples = [
        {
            "doc": {
                "id": f"i{n}",
                "question": f"question {n}" + "?" * (2000 * n),
                "options": ["The sun", "A planet"],
                "rule": asked,
            },
            "doc_id": n,
            "target": "Rome",
            "arguments": [(f"prompt {n}", settings)],
            "resps": [[text]],
            "filtered_resps": [text],
            "filter": "none",
            "metrics": ["match"],
            "match": float(text == "Rome"),
        }
        for n, text in enumerate(texts)
    ]
    endings: Any = {ending_key("prompt 1", settings): SimpleNamespace(num_tokens=8, finished=False)}
    return task_score(
        "capitals", task, samples, num_fewshot=0, count_tokens=lambda _, text: len(text.split()), endings=endings
    )


def test_the_engine_says_how_texts_ended_and_otherwise_their_tokens_are_counted() -> None:
    made = logged(["Rome", "a b", "a b c d e f g h", ""])
    assert [item.rates["tokens"] for item in made.items] == [1, 8, 8, 0]
    assert [item.rates["cut_off"] for item in made.items] == [0, 1, 1, 0]
    assert [item.rates["malformed"] for item in made.items] == [0, 0, 0, 1]
    assert made.rates["mean_tokens"] == 17 / 4


def test_refusals_and_unreadable_json_are_counted_where_they_are_asked_for() -> None:
    texts = ["I'm sorry, I can't.", "Take a car."]
    made = logged(texts, match_rule, '{"refused": true}')
    assert [item.rates["refused"] for item in made.items] == [1, 0]
    assert made.rates["refused"] == 0.5
    change = rate_difference(made, logged(texts[:1] * 2, match_rule, '{"refused": true}'), "refused")
    assert (change.difference, change.test) == (0.5, "mcnemar-exact")
    for rule in ('{"fields": {"a": "whole"}}', '{"object": {"a": 1}}'):
        read = logged(['{"a": 1}', '{"b"', "a: 1"], match_rule, rule)
        assert [item.rates["malformed"] for item in read.items] == [0, 1, 1]
    assert "refused" not in read.rates


def test_a_score_knows_its_family_level_and_questions() -> None:
    made = logged(["Rome", "Paris"], family="steps", level=3)
    assert (made.family, made.level) == ("steps", 3.0)
    assert made.items[0].question == "question 0"
    assert len(made.items[1].question) < 1510
    assert made.items[1].question.startswith("question 1?")
    assert (logged(["Rome"]).family, logged(["Rome"]).level) == (None, None)


def test_scores_of_other_prompts_are_refused() -> None:
    made = logged(["Rome", "Paris"])
    assert made.prompts == logged(["Lyon", "Nice"]).prompts != logged(["Rome", "Paris"], "other").prompts
    ours, other = (logged(["Rome"], f"<function f at 0x7f{number}>").prompts for number in (1, 2))
    assert ours == other  # where a function lies in memory is no rule
    with pytest.raises(UserError, match=r"'capitals': prompts has the fingerprint \w+ .* evaluate both"):
        paired(made, replace(made, prompts="0" * 16))
    assert paired(made, replace(made, prompts="")).n == 2  # results of before there were fingerprints
    asked = replace(made.items[1], question="something else")
    with pytest.raises(UserError, match="question of item 'i1' is"):
        paired(made, replace(made, items=(made.items[0], asked)))


def match_own(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """A rule as a task file of a user's own holds it."""
    return {"match": float(results[0] == doc["answer"])}


def test_shoals_rules_count_by_name_in_the_prompts_fingerprint_and_others_by_their_source(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def print_of(rule: Any, source: str) -> str:
        monkeypatch.setattr("lm_eval.config.task.getsource", lambda _: source)
        config = TaskConfig(task="capitals", output_type="generate_until", process_results=rule)
        return prompts_fingerprint(SimpleNamespace(config=config), [{"arguments": [("prompt", {})]}])

    assert print_of(match_stated, "as it is") == print_of(match_stated, "as it is after its helpers have moved")
    assert print_of(match_stated, "as it is") != print_of(match_start, "as it is")
    assert print_of(match_own, "as it is") != print_of(match_own, "as it is after a change")
