"""The ranking of healed plans against tables worked out by hand.

Covers: shoal.artifacts.search, shoal.eval.compare.means, shoal.eval.report.search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from results import provenance

from shoal.artifacts.evaluation import Evaluation, ItemScore, TaskScore
from shoal.artifacts.search import HealedPlan, Ranking, SearchResult
from shoal.compress.plan import choose_changes
from shoal.errors import UserError
from shoal.eval.compare.ranking import check_columns, correlation, measure_by, rank_plans
from shoal.eval.harness.samples import with_interval
from shoal.eval.report.search import ranked_by, recipe_lines, search_text, verdicts
from shoal.recipe.recipe import parse_recipe
from shoal.stats.paired import paired, retention
from shoal.yaml_text import read_yaml

LIKELY, WRITTEN, OTHER = "retrieval_continuation", "retrieval_generation", "knowledge_continuation"


def task(
    name: str, right: int, *, n: int = 20, chance: float = 0.25, protocol: str = "continuation", column: Any = ""
) -> TaskScore:
    """A task whose first ``right`` items are right."""
    items = tuple(ItemScore(f"{name.split('_')[0]}-{i}", float(i < right)) for i in range(n))
    ability = name.split("_")[0]
    draft = TaskScore(name, ability, protocol, "acc", right / n, 0, 0, n, chance, True, "1", 0, items, column=column)
    return with_interval(draft)


def written(right: int, n: int = 20) -> TaskScore:
    return task(WRITTEN, right, n=n, chance=0.0, protocol="generation")


def nats(*values: float) -> TaskScore:
    items = tuple(ItemScore(f"w{i}", value) for i, value in enumerate(values))
    mean = sum(values) / len(values)
    draft = TaskScore(
        "perplexity", "language", "rolling", "nats_per_token", mean, 0, 0, len(values), 0, False, "1", 0, items
    )
    return with_interval(draft)


def evaluation(*tasks: TaskScore) -> Evaluation:
    return Evaluation(provenance(), "role", tasks, 10, 4, 40, 1.0)


def twice(*tasks: TaskScore) -> tuple[Evaluation, Evaluation]:
    """A plan that the heal does not change."""
    return evaluation(*tasks), evaluation(*tasks)


TEACHER = evaluation(task(LIKELY, 17), written(16), nats(2.0, 2.2, 2.4))
"""Chance-corrected: .85 - .25 = .6 and .8."""
PLANS = {
    "a": (
        evaluation(task(LIKELY, 11), written(0), nats(3.0, 3.1, 3.2)),
        evaluation(task(LIKELY, 11), written(12), nats(2.2, 2.5, 2.6)),
    ),
    "b": (
        evaluation(task(LIKELY, 8), written(4), nats(3.5, 3.6, 3.4)),
        evaluation(task(LIKELY, 14), written(4), nats(2.4, 2.3, 2.8)),
    ),
    "c": (
        evaluation(task(LIKELY, 5), written(0), nats(5.0, 5.1, 5.3)),
        evaluation(task(LIKELY, 8), written(2), nats(3.0, 3.1, 3.3)),
    ),
}
"""Kept of likelihood before .5 .25 0, after .5 .75 .25; of generated text before 0 .25 0, after .75 .25 .125."""


def ranking(rank_by: Sequence[str] = ()) -> Ranking:
    return rank_plans(TEACHER, PLANS, rank_by=rank_by)


def test_plans_rank_by_the_mean_of_both_kinds_of_protocol() -> None:
    found = ranking()
    assert [plan.name for plan in found.plans] == ["a", "b", "c"]
    by_name = {plan.name: plan for plan in found.plans}
    assert [by_name[name].before.value.value for name in "abc"] == pytest.approx([0.25, 0.25, 0.0])
    assert [by_name[name].after.value.value for name in "abc"] == pytest.approx([0.625, 0.5, 0.1875])
    assert [by_name[name].before.rank for name in "abc"] == [1, 1, 3]
    assert [by_name[name].after.rank for name in "abc"] == [1, 2, 3]
    kept = [(one.after.likelihood, one.after.generation) for one in found.plans]
    assert [(likely.value, text.value) for likely, text in kept if likely and text] == [
        (pytest.approx(0.5), pytest.approx(0.75)),
        (pytest.approx(0.75), pytest.approx(0.25)),
        (pytest.approx(0.25), pytest.approx(0.125)),
    ]
    assert {column.task: column.weight for column in found.columns} == {LIKELY: 0.5, WRITTEN: 0.5, "perplexity": 0.0}


def test_two_kinds_count_the_same_whatever_the_number_of_their_tasks() -> None:
    teacher = evaluation(*TEACHER.tasks, task(OTHER, 20), task("reasoning_generation", 0, protocol="generation"))
    assert measure_by(teacher, ()).weights == {LIKELY: 0.25, OTHER: 0.25, WRITTEN: 0.5}, "chance level counts nothing"


def in_columns(likely: int, twin: int, out: int, public: int, other_public: int) -> Evaluation:
    return evaluation(
        task(LIKELY, likely, column="in"),
        task("retrieval_twin_continuation", twin, column="twin"),
        task("needle_generation", out, chance=0.0, protocol="generation", column="out"),
        task("arc_continuation", public, column="public"),
        task("piqa_continuation", other_public, column="public"),
    )


def test_columns_outside_the_trained_form_rank_and_count_the_same() -> None:
    teacher = in_columns(17, 17, 16, 17, 17)
    third = 1 / 3
    weights = {"retrieval_twin_continuation": third, "needle_generation": third}
    assert measure_by(teacher, ()).weights == weights | {"arc_continuation": third / 2, "piqa_continuation": third / 2}
    trained, healed = in_columns(20, 8, 4, 8, 8), in_columns(8, 14, 12, 11, 11)
    found = rank_plans(teacher, {"form": (trained, trained), "ability": (healed, healed)})
    assert found.winner_after == "ability", "what the form of the text lifts ranks nothing"
    kept = {plan.name: plan.after for plan in found.plans}
    assert f"Not counted, being asked in the form of training text: {LIKELY}." in ranked_by(found)
    assert kept["ability"].value.value == pytest.approx((0.75 + 0.75 + 0.5) / 3)
    assert kept["ability"].likelihood is not None
    assert kept["ability"].likelihood.value == pytest.approx((0.75 + 0.5) / 2)


def test_the_trained_form_ranks_where_nothing_else_was_scored() -> None:
    inside = evaluation(*(replace(score, column="in") for score in TEACHER.tasks))
    assert measure_by(inside, ()).weights == measure_by(TEACHER, ()).weights
    assert "All of it is asked in the form of training text" in ranked_by(rank_plans(inside, PLANS))
    assert "form of training text" not in ranked_by(ranking())


def test_tasks_of_which_none_that_ranks_writes_text_are_refused() -> None:
    def described(protocol: str, column: str) -> Any:
        return SimpleNamespace(config=SimpleNamespace(metadata={"protocol": protocol, "column": column}))

    tasks = {WRITTEN: described("generation", "in"), LIKELY: described("continuation", "in")}
    check_columns(tasks, ())
    tasks |= {"arc_continuation": described("continuation", "public")}
    with pytest.raises(UserError, match=r"none of arc_continuation, which are outside the form .*, writes text"):
        check_columns(tasks, ())
    check_columns(tasks, [WRITTEN])
    check_columns(tasks | {"needle_generation": described("generation", "out")}, ())


def test_winner_of_a_tie_before_the_heal_is_the_one_that_wins_after_it() -> None:
    found = ranking()
    assert (found.winner_before, found.winner_after, found.held) == ("a", "a", True)
    assert (found.difference.value, found.difference.excludes_zero) == (0.0, False)


def test_named_columns_rank_and_each_name_counts_the_same() -> None:
    by_likelihood = ranking([LIKELY])
    assert [plan.name for plan in by_likelihood.plans] == ["b", "a", "c"]
    assert (by_likelihood.winner_before, by_likelihood.held) == ("a", False)
    assert ranking(["retrieval/generation"]).winner_before == "b"
    two = measure_by(evaluation(*TEACHER.tasks, task(OTHER, 20)), ["retrieval", OTHER]).weights
    assert two == {LIKELY: 0.25, WRITTEN: 0.25, OTHER: 0.5}


def test_nats_rank_the_other_way_round() -> None:
    found = ranking(["language/rolling"])
    assert found.unit == "nats"
    assert [plan.name for plan in found.plans] == ["a", "b", "c"]
    assert [plan.after.value.value for plan in found.plans] == pytest.approx([7.3 / 3, 2.5, 9.4 / 3])
    assert [plan.after.behind.value for plan in found.plans] == pytest.approx([0, 0.2 / 3, 2.1 / 3])


def test_agreement_of_before_and_after_is_that_of_the_two_lists() -> None:
    columns = {column.task: column.agreement for column in ranking().columns}
    # likelihood a > b > c becomes b > a > c: one of three pairs changes places
    assert columns[LIKELY].kendall == pytest.approx(1 / 3)
    assert columns[LIKELY].spearman == pytest.approx(0.5)
    # generated text b > a = c becomes a > b > c: one pair agrees, one does not, one is tied on one side
    assert columns[WRITTEN].kendall == pytest.approx(0.0)
    assert columns["perplexity"].kendall == pytest.approx(1.0)
    assert ranking().agreement["likelihood"] == columns[LIKELY]
    assert ranking().agreement["overall"].kendall == pytest.approx(2 / math.sqrt(2 * 3))


def test_a_list_of_equal_values_agrees_with_nothing() -> None:
    assert correlation([1, 1, 1], [1, 2, 3]).kendall is None
    assert correlation([3, 2, 1], [1, 2, 3]).spearman == -1


def test_difference_on_one_column_is_the_paired_one_in_the_columns_unit() -> None:
    found = ranking([LIKELY])
    behind = next(plan.after.behind for plan in found.plans if plan.name == "a")
    one = paired(PLANS["b"][1].tasks[0], PLANS["a"][1].tasks[0])
    assert (behind.value, behind.ci_low, behind.ci_high) == pytest.approx(
        (one.difference / 0.6, one.ci_low / 0.6, one.ci_high / 0.6)
    )
    assert found.difference.value == pytest.approx(0.25)
    assert found.difference.ci_low == pytest.approx(-one.ci_high / 0.6)


def test_columns_of_different_items_add_like_standard_errors_and_of_the_same_ones_with_their_correlation() -> None:
    worse, better = (task(LIKELY, 9), task(OTHER, 9)), (task(LIKELY, 12), task(OTHER, 12))
    teacher = evaluation(task(LIKELY, 17), task(OTHER, 17))
    plans = {"worse": twice(*worse), "better": twice(*better)}
    one = paired(better[0], worse[0])
    found = rank_plans(teacher, plans, rank_by=[LIKELY, OTHER]).plans[1].after.behind
    assert found.value == pytest.approx(one.difference / 0.6)
    assert found.value - found.ci_low == pytest.approx((one.difference - one.ci_low) / 0.6 / math.sqrt(2))

    def same_items(score: TaskScore) -> TaskScore:
        return replace(score, task=f"{score.task}_again")

    both = {name: twice(side.tasks[0], same_items(side.tasks[0])) for name, (side, _) in plans.items()}
    doubled = evaluation(task(LIKELY, 17), same_items(task(LIKELY, 17)))
    again = rank_plans(doubled, both, rank_by=["retrieval"]).plans[1].after.behind
    assert again.value - again.ci_low == pytest.approx((one.difference - one.ci_low) / 0.6), (
        "asked twice, no more known"
    )


def test_scores_and_shares_of_every_plan_are_kept() -> None:
    found = next(plan for plan in ranking().plans if plan.name == "b")
    score = next(score for score in found.scores if score.task == WRITTEN)
    kept = retention(TEACHER.tasks[1], PLANS["b"][1].tasks[1])
    assert (score.before.value, score.after.value) == (0.2, 0.2)
    assert score.kept_after is not None
    assert (score.kept_after.value, score.kept_after.ci_low) == (kept.value, kept.ci_low)
    assert next(score for score in found.scores if score.task == "perplexity").kept_after is None


@pytest.mark.parametrize(
    ("rank_by", "message"),
    [
        (["retrieval/loglikelihood"], r"no task gives 'retrieval/loglikelihood'; there is retrieval_continuation, "),
        ([LIKELY, "perplexity"], r"perplexity is in nats_per_token and retrieval_continuation a share above chance"),
        (
            ["reasoning_generation"],
            r"reasoning_generation ranks nothing: the teacher is not shown to be above chance \(0.00 ",
        ),
    ],
)
def test_columns_that_cannot_rank_are_refused(rank_by: list[str], message: str) -> None:
    teacher = evaluation(*TEACHER.tasks, task("reasoning_generation", 0, chance=0.0, protocol="generation"))
    with pytest.raises(UserError, match=f"search.rank_by: {message}"):
        measure_by(teacher, rank_by)


def test_a_column_of_one_window_ranks_nothing() -> None:
    with pytest.raises(UserError, match=r"search.rank_by: perplexity ranks nothing: a single item .*perplexity_tokens"):
        measure_by(evaluation(task(LIKELY, 17), nats(2.0)), ["perplexity"])


def test_a_teacher_at_chance_ranks_nothing_but_by_text() -> None:
    with pytest.raises(UserError, match=r"above chance on none of them.*rank_by: \[perplexity\]"):
        measure_by(evaluation(task(LIKELY, 5), nats(2.0)), ())


def test_scores_of_different_settings_are_never_ranked_together() -> None:
    other = evaluation(replace(task(LIKELY, 11), version="2"), written(0), nats(3.0, 3.1, 3.2))
    with pytest.raises(UserError, match="version is '1' in one evaluation and '2' in the other"):
        rank_plans(TEACHER, {**PLANS, "d": (other, other)})


def healed(name: str, drop: tuple[int, ...], same_as: str | None = None) -> HealedPlan:
    return HealedPlan(name, {"drop": list(drop)}, drop, (), "2 of 6 layers named in the recipe", 6 - len(drop), same_as)


def result(rank_by: Sequence[str] = ()) -> SearchResult:
    plans = (healed("a", (1, 2)), healed("b", (2, 3)), healed("c", (3, 4, 5)), healed("d", (1, 2), same_as="a"))
    return SearchResult(provenance(), 4096, plans, ranking(rank_by))


def test_verdicts_say_what_cannot_be_told_apart_and_with_how_many_items() -> None:
    said = verdicts(result())
    assert said[0] == "The ranking before the heal held at its top: a is first before and after it."
    assert "Worse than a after the heal, by more than noise with 20 items: c." in said
    assert "Cannot be told apart from a after the heal with 20 items: b." in said
    assert "The plans leave different numbers of layers (3 and 4): size is compared too." in said
    assert said[-1] == "d comes to the layers of a, which were healed once."
    changed = verdicts(result([LIKELY]))[0]
    assert changed.startswith(
        "The ranking before the heal did not hold: a was first, b is. After the heal b is +25.0 po"
    )
    assert changed.endswith("from a: they cannot be told apart with 20 items.")


def test_the_winner_is_printed_as_recipe_lines_that_make_it() -> None:
    text = search_text(result())
    assert text.endswith("```yaml\n# 2 of 6 layers named in the recipe\nprune:\n  drop: [1, 2]\n```\n")
    assert "## Every score" not in text
    assert "62.5 %" in text
    whole = search_text(result(), every_score=True)
    row = next(line for line in whole.splitlines() if "retrieval_generation " in line and "| b " in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:5] == [WRITTEN, "20", "80.0 % [58.4, 91.9]", "b", "20.0 % [8.1, 41.6]"]


def test_recipe_lines_of_edits_come_to_the_same_plan() -> None:
    edits: list[dict[str, Any]] = [{"kind": "merge", "layers": [2, 3]}, {"kind": "skip_mlp", "layers": [4]}]
    prune = parse_recipe({"model": "m", "run_dir": "r", "prune": {"drop": [1], "edits": edits}}).prune
    choice = choose_changes(prune, num_layers=6, importance=None)
    plan = HealedPlan("edited", {}, choice.drop, choice.edits, choice.reason, 4, None)
    again = parse_recipe({"model": "m", "run_dir": "r", **read_yaml(recipe_lines(plan))}).prune
    assert choose_changes(again, num_layers=6, importance=None) == choice
    assert again == prune
