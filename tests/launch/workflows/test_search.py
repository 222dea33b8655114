"""The search stage: plans as runs of their own, healed once each and ranked; going on after a kill; what is refused.

Covers: shoal.recipe.search.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from results import speed
from searches import EVAL, MEASURE, Healer

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.evaluation import Evaluation
from shoal.artifacts.importance import Importance
from shoal.artifacts.plan import PruningPlan
from shoal.artifacts.search import SearchResult
from shoal.artifacts.speed import Speed
from shoal.errors import UserError
from shoal.launch import cli
from shoal.launch.verbs import evaluate, measure
from shoal.launch.verbs.plan import read_goals
from shoal.launch.verbs.run import Run, open_run
from shoal.launch.workflows import search as searching
from shoal.launch.workflows.search import prune_of
from shoal.recipe.prune import Compensate, PlanTarget, Prune
from shoal.recipe.recipe import parse_recipe
from shoal.recipe.search import SearchPlan
from shoal.recipe.section import as_dict

PLANS: list[dict[str, Any]] = [{"drop": [1, 3]}, {"metric": "block_influence", "num_drop": 2}]


@pytest.fixture
def make_run(teacher: Path, tmp_path: Path) -> Callable[..., Run]:
    """A run in this test's directory that searches among ``plans``; keywords replace sections of its recipe."""

    def make(plans: list[dict[str, Any]] = PLANS, *, search: dict[str, Any] | None = None, **sections: Any) -> Run:
        raw = {
            "model": str(teacher),
            "run_dir": str(tmp_path / "run"),
            "prune": {"drop": [2, 4]},
            "measure": MEASURE,
            "distill": {"sequence_length": 64},
            "eval": {**EVAL, "control": True},  # of the run alone: no plan is healed twice
            "track": {"wandb": "off"},
            "search": {"plans": plans, "num_tokens": 128, "rank_by": ["perplexity"], **(search or {})},
            **sections,
        }
        return open_run(parse_recipe(raw))

    return make


@pytest.fixture(autouse=True)
def log_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="shoal")


def stop(*_: Any) -> None:
    pytest.fail("healed again")


@pytest.mark.slow
def test_plans_are_cut_healed_scored_and_ranked(make_run: Any, caplog: pytest.LogCaptureFixture) -> None:
    run, healer = make_run(), Healer(0.5, 0.1)
    text = searching.search(run, healer)
    folder = run.dir / "search"
    assert healer.healed == ["drop-1-3", "block_influence-2"]
    result = SearchResult.read(run.dir / "search.json")
    assert result.num_tokens == 128
    assert [(plan.name, plan.num_layers, plan.same_as) for plan in result.plans] == [
        ("drop-1-3", 4, None),
        ("block_influence-2", 4, None),
    ]
    for plan in result.plans:
        assert PruningPlan.read(folder / plan.name / "plan.json").drop == plan.drop
        for role, moment in (("pruned", "before"), ("distilled", "after")):
            perplexity = Evaluation.read(folder / plan.name / "eval" / f"{role}.json").tasks[-1]
            standing = next(one for one in result.ranking.plans if one.name == plan.name)
            assert getattr(standing, moment).value.value == pytest.approx(perplexity.score)
    assert (run.dir / "search.md").read_text().startswith("# 2 plans, each healed for 128 tokens")
    assert f"## The recipe of {result.winner.name}" in text
    assert not (run.dir / "student").exists(), "the run's own plan is the user's choice"
    # the metric was not among the recipe's; it was measured beside the run's own importance.json
    assert "block_influence" in Importance.read(folder / "block_influence-2" / "importance.json").layers
    assert not (run.dir / "importance.json").exists()

    caplog.clear()
    assert searching.search(make_run(), stop) == text
    assert "search: done already" in caplog.text
    assert "search: the teacher, once for all plans" not in caplog.text
    with pytest.raises(
        UserError, match=r"search plan drop-1-3: was healed with other .*num_tokens is 256 in this .*128"
    ):
        searching.search(make_run(search={"num_tokens": 256}), stop)


@pytest.mark.slow
def test_a_search_killed_between_two_plans_goes_on(make_run: Any, caplog: pytest.LogCaptureFixture) -> None:
    healer = Healer(0.5)
    with pytest.raises(KeyboardInterrupt):
        searching.search(make_run(), healer)
    assert not (make_run().dir / "search.json").exists()
    caplog.clear()
    again = Healer(0.1)
    searching.search(make_run(), again)
    assert again.healed == ["block_influence-2"]
    assert caplog.text.count("eval teacher: done already") == 4, "each plan, before and after its heal"
    assert "measure: done already" in caplog.text
    assert len(SearchResult.read(make_run().dir / "search.json").ranking.plans) == 2


@pytest.mark.slow
def test_importance_and_teacher_of_the_run_itself_are_used(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [{"metric": "angular", "num_drop": 2}, {"drop": [1, 3]}]
    run = make_run(plans)
    measure.measure(run)
    evaluate.evaluate(open_run(parse_recipe({**as_dict(run.recipe), "eval": {**EVAL, "speed": False}})))
    teacher = (run.dir / "eval" / "teacher.json").read_bytes()
    monkeypatch.setattr("shoal.launch.verbs.measure.load_model", stop)
    searching.search(run, Healer(0.5, 0.1))
    for plan in ("angular-2", "drop-1-3"):
        assert (run.dir / "search" / plan / "eval" / "teacher.json").read_bytes() == teacher
    assert not (run.dir / "search" / "_measured").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"plans": [{"drop": [1]}, {"name": "b", "drop": [1]}]},
            r"all 2 come to the same plan \(dropping 1 of 6 layers: 1",
        ),
        (
            {"rank_by": ["knowledge/continuation"]},
            r"search.rank_by: no task gives 'knowledge/continuation'; there is kno",
        ),
        (
            {"rank_by": [], "tasks": ["knowledge_continuation"]},
            r"search.tasks: none of knowledge_continuation writes te",
        ),
        ({"rank_by": []}, r"the teacher is above chance on none of them.*rank_by: \[perplexity\]"),
        ({"plans": [{}, {"metric": "angulra"}]}, r"search.plans: 'angulra' is no metric; did you mean angular\?"),
        ({"plans": [{}, {"drop": [9]}]}, r"prune.drop: 9 is no layer of this model; its layers are 0..5"),
        (
            {"plans": [{}, {"drop": [1], "edits": [{"kind": "skip_mlp", "layers": [1]}]}]},
            r"^search.plans.1 \(drop-1\): ",
        ),
    ],
)
def test_what_cannot_be_searched_is_refused_before_any_heal(make_run: Any, changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        searching.search(make_run(search=changes), stop)


def test_a_candidate_shares_written_text_and_publishes_nothing(make_run: Any) -> None:
    run = make_run(
        search={"tasks": ["knowledge_generation"], "plans": [{"name": "x"}, {"drop": [1]}]},
        distill={"data": ["python_docs", "teacher_text"], "sequence_length": 64, "trainer": {"learning_rate": 1e-5}},
        eval={**EVAL, "tasks": ["reasoning_worked"], "limits": {"reasoning_worked": 3}},
        export={"hub_repo": "owner/name"},
    )
    settings = run.recipe.search
    own = searching._candidates(run, settings)[0].run.recipe
    assert own.run_dir == str(run.dir / "search" / "x")
    assert own.distill.writing.folder == str(run.dir / "search" / "_text")
    assert (own.distill.num_tokens, own.distill.trainer) == (128, {"learning_rate": 1e-5})
    assert (own.eval.tasks, own.eval.limit, own.eval.limits) == (("knowledge_generation",), 2, {})
    assert (own.export.hub_repo, own.track.name, own.search) == (None, "run-x", None)


def test_a_recipe_without_plans_is_refused_with_an_example(make_run: Any) -> None:
    run = open_run(parse_recipe({key: value for key, value in as_dict(make_run().recipe).items() if key != "search"}))
    with pytest.raises(UserError, match=r"search: the recipe does not say which plans .* search: \{plans: \[\{metric"):
        searching.search(run, stop)


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"plans": [{}]}, r"search.plans: must have at least 2 items"),
        ({"plans": [{}, {"metrik": "a"}]}, r"search.plans.1.metrik: unknown key; did you mean 'metric'\?"),
        ({"plans": [{}, {"drop": [1], "metric": "a"}]}, r"search.plans.1: .*metric has no effect beside drop"),
        ({"plans": [{}, {"num_drop": 1, "ratio": 0.5}]}, r"search.plans.1: .*num_drop and ratio are both given"),
        ({"plans": [{"name": "../up"}, {}]}, r"search.plans.0.name: "),
        ({"plans": [{"metric": "a"}, {"metric": "a", "protect": []}]}, r"search.plans.1: is called 'a' as plan 0 is"),
        ({"plans": [{}, {"metric": "a"}], "rank_by": ["x", "x"]}, r"search.rank_by: names 'x' twice"),
    ],
)
def test_wrong_settings_are_refused_when_the_recipe_is_read(search: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_recipe({"model": "m", "run_dir": "r", "search": search})


def test_a_budget_in_steps_would_make_the_tokens_mean_nothing() -> None:
    raw = {"model": "m", "run_dir": "r", "search": {"plans": PLANS}, "distill": {"trainer": {"max_steps": 3}}}
    with pytest.raises(UserError, match=r"search.num_tokens: has no effect beside distill.trainer.max_steps"):
        parse_recipe(raw)


@pytest.mark.parametrize(
    ("plan", "own", "meant"),
    [
        ({"num_drop": 2}, Prune(target=PlanTarget(params=3)), Prune(num_drop=2)),
        ({"drop": [2]}, Prune(target=PlanTarget(params=3)), Prune(drop=(2,))),
        (
            {"metric": "angular"},
            Prune(target=PlanTarget(params=3)),
            Prune(metric="angular", target=PlanTarget(params=3)),
        ),
        ({}, Prune(drop=(1,)), Prune(drop=(1,))),
        ({"drop": [2]}, Prune(metric="m", num_drop=3, spare=("x",)), Prune(drop=(2,))),
        ({"drop": [2]}, Prune(protect=("cornerstone", 0)), Prune(drop=(2,), protect=(0,))),
        ({"metric": "m"}, Prune(drop=(1, 3, 5)), Prune(metric="m", num_drop=3)),
        ({"metric": "m"}, Prune(weights={"a": 1.0}, ratio=0.5), Prune(metric="m", ratio=0.5)),
        ({"num_drop": 4}, Prune(metric="m", ratio=0.5), Prune(metric="m", num_drop=4)),
        (
            {"weights": {"a": 1.0}},
            Prune(metric="m", contiguous=True, num_drop=2),
            Prune(weights={"a": 1.0}, num_drop=2),
        ),
        ({"contiguous": True}, Prune(metric="m", num_drop=2), Prune(contiguous=True, num_drop=2)),
        (
            {"contiguous": True, "metric": "r"},
            Prune(metric="m", num_drop=2),
            Prune(metric="r", contiguous=True, num_drop=2),
        ),
        ({"drop": [3]}, Prune(num_drop=2, compensate=Compensate()), Prune(drop=(3,), compensate=Compensate())),
        (
            {"drop": [3]},
            Prune(num_drop=2, mtp="keep", vision_tower="auto", proof="files", targets=("vllm",)),
            Prune(drop=(3,), mtp="keep", vision_tower="auto", proof="files", targets=("vllm",)),
        ),
        ({"protect": []}, Prune(metric="m", num_drop=2), Prune(metric="m", num_drop=2, protect=())),
    ],
)
def test_a_plan_is_the_runs_own_but_for_what_it_says(plan: dict[str, Any], own: Prune, meant: Prune) -> None:
    raw = {"model": "m", "run_dir": "r", "search": {"plans": [plan, {"name": "other"}]}}
    search = parse_recipe(raw).search
    assert search is not None
    assert prune_of(search.plans[0], own) == meant


@pytest.mark.parametrize(
    ("plan", "name"),
    [
        (SearchPlan(), "own"),
        (SearchPlan(metric="retrieval/generation", num_drop=4), "retrieval-generation-4"),
        (SearchPlan(contiguous=True, ratio=0.25), "own-run-0.25"),
        (SearchPlan(weights={"a": 1, "b": 2}), "mix-a-b"),
        (SearchPlan(drop=tuple(range(10, 40))), "drop-30-"),
    ],
)
def test_plans_are_named_after_what_they_say(plan: SearchPlan, name: str) -> None:
    assert plan.called.startswith(name)
    assert len(plan.called) <= 48


@pytest.mark.slow
def test_the_verb_heals_plans_of_the_same_layers_once_from_their_own_recipes_and_prints_the_ranking(
    make_run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    healer = Healer(0.5, 0.1)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(cli, "launch_distill", lambda run, file, overrides: healer(run, Path(file)))
    run = make_run([{"drop": [1, 3]}, {"name": "again", "drop": [3, 1]}, {}])
    cli._dispatch("search", run.recipe, "recipe.yaml", [])
    assert healer.healed == ["drop-1-3", "own"]
    text = capsys.readouterr().out
    assert text.startswith("# 2 plans, each healed for 128 tokens")
    assert "- again comes to the layers of drop-1-3, which were healed once." in text
    assert [plan.same_as for plan in SearchResult.read(run.dir / "search.json").plans] == [None, "drop-1-3", None]
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="`shoal search` starts its own launcher"):
        cli._dispatch("search", run.recipe, "recipe.yaml", [])


@pytest.mark.slow
def test_plans_keep_to_the_time_that_was_measured_in_the_run_directory(make_run: Any) -> None:
    target = {"ms_per_token": {"limit": 40.0, "length": 144}}
    run = make_run([{}, {"contiguous": True}], prune={"target": target})
    settings = run.recipe.search
    assert settings is not None
    with pytest.raises(UserError, match="needs the teacher's own time to scale; run `shoal eval` first"):
        searching._candidates(run, settings)
    measured = speed()
    batch = replace(measured.roles["teacher"].batches[0], decode_tokens_per_s=20.0)
    roles = {"teacher": replace(measured.roles["teacher"], batches=(batch,))}
    own = Provenance({"teacher": run.teacher_fingerprint})
    replace(measured, provenance=own, roles=roles, half_depth=None).write(run.dir / Speed.FILE)
    for candidate in searching._candidates(run, settings):
        goals = read_goals(candidate.run)
        assert goals is not None
        assert "predicted from the teacher's 50 ms in eval/speed.json" in goals.in_words(())
