"""Trainings whose teacher a server runs: their curves are the live teacher's, on one rank or two, after a stop too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prompt_server import PromptServer, serving
from training_runs import Trial, finished, go_along_with_loops, recipe, run, unfinished

from shoal.launch.verbs.distill import distill_dry_run
from shoal.launch.verbs.run import open_run
from shoal.recipe.recipe import load_recipe

ON_POLICY = {"share": 0.5, "start": 0.0, "prompt_tokens": 8, "new_tokens": 24, "temperature": 0.0}
SETTINGS: dict[str, Any] = {"on_policy": ON_POLICY, "trainer": {"save_strategy": "steps", "save_steps": 4}}
"""The likeliest tokens, which fall into loops: the teacher is asked whether it goes along with them."""
ASKED: dict[str, Any] = {"before": go_along_with_loops}


@pytest.fixture(scope="module")
def server(teacher: Path) -> Iterator[PromptServer]:
    with serving(teacher) as running:
        yield running


@pytest.fixture
def record(server: PromptServer) -> dict[str, Any]:
    """All words but one of the vocabulary."""
    server.asked, server.dies_after = [], None
    return {"server": {"url": server.url, "retries": 0}, "top_k": 271, "check": {"num_tokens": 100}}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, teacher: Path, cut: Path) -> Trial:
    return finished(run(recipe(tmp_path_factory.mktemp("live"), teacher, cut, **SETTINGS), **ASKED))


def test_a_served_teacher_gives_the_curve_of_the_live_one_also_after_a_stop(live, record, teacher, cut, tmp_path):
    path = recipe(tmp_path / "served", teacher, cut, record=record, teacher={"server": True}, **SETTINGS)
    served = finished(run(path, **ASKED))
    assert "nats of bucket KL from the teacher, over 128 tokens" in served.log
    # the mass of one word of 272 apart
    assert served.curve() == pytest.approx(live.curve(), abs=1e-4)
    assert served.curve("top1_agreement") == pytest.approx(live.curve("top1_agreement"), abs=0.1)
    went_on = finished(run(unfinished(served, tmp_path / "on", step=4), **ASKED))
    assert went_on.curve() == served.curve()
    assert all(torch.equal(weight, served.weights()[name]) for name, weight in went_on.weights().items())


def test_every_rank_asks_about_its_own_rows(live, record, server, teacher, cut, tmp_path):
    path = recipe(tmp_path, teacher, cut, record=record, teacher={"server": True}, **SETTINGS)
    assert finished(run(path, ranks=2, **ASKED)).curve() == pytest.approx(live.curve(), abs=1e-4)


def test_rows_come_from_a_recording_and_the_server_is_asked_about_samples(live, record, server, teacher, cut, tmp_path):
    record |= {"folder": str(tmp_path / "signals"), "check": {"num_tokens": 100, "whole": True}}
    teacher_is = {"recorded": record["folder"], "server": True}
    path = recipe(tmp_path, teacher, cut, record=record, teacher=teacher_is, **SETTINGS)
    finished(run(path, verb="record"))
    data = {tuple(body["prompt"]) for body in server.asked}
    compared, server.asked = {tuple(body["prompt"]) for body in server.asked[:2]}, []
    mixed = finished(run(path, **ASKED))
    # 0.0008 (KL + sqrt(2 KL)) by docs/training/signals.md
    assert mixed.curve() == pytest.approx(live.curve(), rel=4e-3, abs=4e-3)
    assert mixed.curve() != live.curve()
    asked = {tuple(body["prompt"]) for body in server.asked} - compared
    assert asked
    assert not asked & data, "what is recorded is asked again"


def test_a_server_that_goes_away_in_training_leaves_the_checkpoint(record, server, teacher, cut, tmp_path):
    path = recipe(tmp_path, teacher, cut, record=record, teacher={"server": True}, **SETTINGS)
    whole = finished(run(path, **ASKED))
    again = unfinished(whole, tmp_path / "again", step=4)
    server.dies_after, server.asked = 6, []
    gone = run(again, **ASKED)
    assert gone.result is not None
    assert gone.result.returncode == 2
    assert "what is written stays, and the same command goes on" in gone.log
    server.dies_after = None
    assert finished(run(again, **ASKED)).curve() == whole.curve()


def test_any_number_of_ranks_records_the_same_bytes_by_a_server(record, server, teacher, cut, tmp_path):
    record |= {"rows_per_shard": 5}
    shards = []
    for ranks in (1, 2):
        path = recipe(tmp_path / str(ranks), teacher, cut, record=record)
        folder = finished(run(path, verb="record", ranks=ranks)).dir / "signals"
        shards.append({file.name: file.read_bytes() for file in folder.glob("shard-*")})
    assert len(shards[0]) == 7
    assert shards[0] == shards[1]


def test_the_dry_run_of_a_served_training_counts_no_teacher_and_asks_nobody(record, server, teacher, cut, tmp_path):
    path = recipe(tmp_path, teacher, cut, record=record, teacher={"server": True})
    assert "run by a server, not loaded" in distill_dry_run(open_run(load_recipe(str(path), [])))
    assert not server.asked


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"losses": [{"kind": "hidden_states"}]}, "distill.losses: hidden_states needs the teacher's states"),
        ({"losses": [{"kind": "taid"}]}, "taid needs the teacher's whole distribution"),
    ],
)
def test_losses_that_a_server_cannot_serve_are_refused(record, teacher, cut, tmp_path, settings, message):
    path = recipe(tmp_path, teacher, cut, record=record, teacher={"server": True}, **settings)
    refused = run(path)
    assert refused.result is not None
    assert refused.result.returncode == 2
    assert message in refused.log
