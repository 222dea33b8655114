"""Questions that people answer in different ways: scores, their ceiling, and that what they dispute chooses nothing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from sweep_results import importance
from tiny import tiny_model, tiny_tokenizer

from shoal.artifacts.evaluation import TaskScore
from shoal.compress.plan import choose_changes
from shoal.compress.sweeps.columns import layer_scores
from shoal.errors import UserError
from shoal.eval.compare.means import columns_that_rank
from shoal.eval.evaluate import evaluate
from shoal.eval.harness.engine import CausalLM
from shoal.eval.report.wording import limits_text
from shoal.eval.tasks.load import load_tasks
from shoal.launch.verbs.distill import _scorer
from shoal.launch.verbs.measure_checks import _check_disputed
from shoal.launch.verbs.run import Run
from shoal.recipe.evaluate import Eval
from shoal.recipe.measure import Sweeps
from shoal.recipe.prune import Prune
from shoal.recipe.recipe import parse_recipe
from shoal.stats.paired import retention

SHARES = [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.6, 0.15, 0.25], [0.4, 0.35, 0.25], [0.34, 0.33, 0.33]]
AGREED, DISPUTED = SHARES[:3], SHARES[3:]
DESCRIPTION = {
    "dataset": "tone",
    "about": "Whether a remark is kind",
    "ability": "tone",
    "protocols": ["loglikelihood", "continuation", "generation", "labels"],
    "items": "rows.jsonl",
    "options": '["kind", "neither", "unkind"]',
    "label_distribution": "shares",
    "metric": "acc",
}
NAMES = [f"tone{kind}_{protocol}" for kind in ("", "_disputed") for protocol in DESCRIPTION["protocols"]]


def described(folder: Path, rows: list[dict[str, Any]] | None = None, **changes: Any) -> dict[str, Any]:
    """What load_tasks needs of a folder with the data set in it."""
    (folder / "tone").mkdir(exist_ok=True)
    (folder / "tone.yaml").write_text(yaml.safe_dump(DESCRIPTION | changes))
    rows = rows or [{"question": f"Remark {number}?", "shares": shares} for number, shares in enumerate(SHARES)]
    (folder / "tone" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"include_path": folder, "data_dir": folder}


@pytest.fixture
def as_people(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that gives every option the share that people do, and writes the letter that most of them chose."""

    def log_shares(self: Any, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        return [(math.log(request.doc["shares"][request.idx]), False) for request in requests]

    def letters(self: Any, requests: list[Any], **_: Any) -> list[str]:
        return ["ABC"[request.doc["answer"]] for request in requests]

    monkeypatch.setattr(CausalLM, "loglikelihood", log_shares)
    monkeypatch.setattr(CausalLM, "generate_until", letters)


def scores(folder: Path, **changes: Any) -> dict[str, TaskScore]:
    places: dict[str, Any] = {key: str(path) for key, path in described(folder, **changes).items()}
    settings = Eval(tasks=tuple(NAMES), perplexity_tokens=0, **places)
    return {score.task: score for score in evaluate(tiny_model("llama"), tiny_tokenizer(), settings, seed=0)}


@pytest.mark.slow
def test_a_model_that_answers_as_people_do_reaches_the_ceiling_and_diverges_nowhere(
    as_people: None, tmp_path: Path
) -> None:
    found = scores(tmp_path)
    for kind, shares, column in (("", AGREED, "public"), ("_disputed", DISPUTED, "disputed")):
        ceiling = sum(map(max, shares)) / len(shares)
        for protocol in ("loglikelihood", "continuation", "generation"):
            score = found[f"tone{kind}_{protocol}"]
            assert (score.n, score.column, score.metric) == (len(shares), column, "agreement")
            assert score.score == pytest.approx(ceiling, abs=1e-12)
            assert score.ceiling == pytest.approx(ceiling, abs=1e-12)
            assert score.chance == pytest.approx(1 / 3)
        divergence = found[f"tone{kind}_labels"]
        assert (divergence.metric, divergence.higher_is_better, divergence.ceiling) == ("divergence", False, 1.0)
        assert divergence.score == pytest.approx(0, abs=1e-12)
    agreed = found["tone_continuation"]
    assert limits_text(agreed) == "chance 33.3 %, people agree 70.0 %"
    assert [item.target for item in agreed.items].count("kind") == 2, "the majority's answer is the right one"


@pytest.mark.slow
def test_another_answer_scores_the_share_of_those_who_gave_it(
    as_people: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backwards(self: Any, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        return [(math.log((0.2, 0.3, 0.5)[request.idx]), False) for request in requests]

    before = scores(tmp_path)
    monkeypatch.setattr(CausalLM, "loglikelihood", backwards)
    monkeypatch.setattr(CausalLM, "generate_until", lambda self, requests, **_: ["C"] * (len(requests) - 1) + ["what?"])
    after = scores(tmp_path)
    last = sum(shares[2] for shares in AGREED) / 3
    assert after["tone_continuation"].score == pytest.approx(last)
    assert retention(before["tone_continuation"], after["tone_continuation"]).value == pytest.approx(
        (last - 1 / 3) / (0.7 - 1 / 3)
    )
    written = [item.score for kind in ("", "_disputed") for item in after[f"tone{kind}_generation"].items]
    assert sorted(written)[0] == 0, "what chooses no option agrees with nobody"
    assert sorted(written)[1] == 0.1
    by_hand = [
        sum(share * math.log(share / model) for share, model in zip(shares, (0.2, 0.3, 0.5), strict=True))
        for shares in AGREED
    ]
    assert after["tone_labels"].score == pytest.approx(sum(by_hand) / 3)


def test_per_character_options_are_compared_as_without_shares(tmp_path: Path) -> None:
    task = load_tasks(["tone_continuation"], **described(tmp_path, metric="acc_norm"))["tone_continuation"]
    doc = next(doc for doc in task.eval_docs if doc["shares"] == SHARES[0])
    # -1.2 / 4 characters, -1.4 / 7, -3 / 6: the second one
    assert task.process_results(doc, [(-1.2, False), (-1.4, False), (-3.0, False)]) == {"agreement_norm": 0.2}


def test_counts_become_shares(tmp_path: Path) -> None:
    rows = [{"question": "A?", "shares": [6, 3, 1]}]
    places = described(tmp_path, rows, label_distribution="shares | shares")
    assert load_tasks(["tone_labels"], **places)["tone_labels"].eval_docs[0]["shares"] == [0.6, 0.3, 0.1]


@pytest.mark.parametrize(
    ("shares", "problem"),
    [
        ([0.5, 0.4, 0.3], "does not give each a share, 1 in all"),
        ([0.5, 0.5], "of 3 options"),
        ([1.2, -0.2, 0.0], "does not give each"),
        ([6, 3, 1], r"write `\| shares` behind the column"),
        (["a", "b", "c"], "does not give each"),
    ],
)
def test_what_is_no_distribution_is_refused(tmp_path: Path, shares: list[Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        load_tasks(["tone_labels"], **described(tmp_path, [{"question": "A?", "shares": shares}]))


def test_a_task_without_items_of_its_kind_is_refused(tmp_path: Path) -> None:
    places = described(tmp_path, [{"question": "A?", "shares": [0.9, 0.1, 0.0]}])
    with pytest.raises(UserError, match="no item on which less than 60% of the people agree; leave this task out"):
        load_tasks(["tone_disputed_labels"], **places)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"label_distribution": None, "answer": "0"}, "labels needs label_distribution"),
        ({"options": None, "answers": "'a'"}, "belong together"),
        ({"lettered": False}, "needs lettered options"),
        ({"bundled": "knowledge", "items": None, "protocols": ["continuation"]}, "leave bundled"),
    ],
)
def test_contradicting_descriptions_are_refused(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        load_tasks(["tone_continuation"], **described(tmp_path, **changes))


def test_what_people_dispute_chooses_no_layers() -> None:
    made = importance()
    assert made.atlas is not None
    columns = made.atlas.sweep.columns
    disputed = tuple(replace(column, disputed=column == columns[0]) for column in columns)
    atlas = replace(made.atlas, sweep=replace(made.atlas.sweep, columns=disputed))
    name = columns[0].task
    assert layer_scores(name, made, setting="prune.metric") == columns[0].importances
    with pytest.raises(UserError, match="asks items that people dispute, which choose no layers"):
        choose_changes(
            Prune(metric=name, num_drop=1), num_layers=made.num_layers, importance=replace(made, atlas=atlas)
        )


def test_what_people_dispute_ranks_nothing() -> None:
    assert columns_that_rank(["disputed"]) == frozenset()
    assert columns_that_rank(["disputed", "in"]) == {"in"}


def test_a_sweep_warns_of_subjective_tasks_and_removes_no_layers_by_disputed_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tasks = load_tasks(["tone_continuation", "tone_disputed_continuation"], **described(tmp_path))
    settings = partial(Sweeps, tasks=tuple(tasks))
    _check_disputed(settings(), tasks)
    assert (
        "tone_continuation asks what people answer in different ways (the most frequent answer is that of 70 % of"
        in (caplog.text)
    )
    _check_disputed(settings(greedy=1, greedy_weights={"tone_continuation": 1.0}), tasks)
    with pytest.raises(UserError, match="greedy: tone_disputed_continuation asks items that people dispute"):
        _check_disputed(settings(greedy=1), tasks)


def test_no_state_is_best_by_what_people_dispute(tmp_path: Path) -> None:
    described(tmp_path)
    eval_settings = {"include_path": str(tmp_path), "data_dir": str(tmp_path)}
    watch = {"tasks": ["tone_disputed_labels"], "best": "tone_disputed_labels"}
    raw = {"model": "m", "run_dir": str(tmp_path / "run"), "distill": {"watch": watch}, "eval": eval_settings}
    with pytest.raises(UserError, match=r"distill\.watch\.best: tone_disputed_labels asks items that people dispute"):
        _scorer(Run(parse_recipe(raw)))
