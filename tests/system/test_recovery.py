"""The benchmark of recovery: its arms are recipes, and the command does what its page says, tried with a tiny model."""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from results import counted
from tiny import NUM_LAYERS, tiny_checkpoint

from benchmarks import recovery
from shoal.artifacts.evaluation import TaskScore
from shoal.recipe.recipe import load_recipe

TASKS = {"reworded": ["retrieval_reworded_continuation", "knowledge_reworded_continuation"]}


@pytest.mark.parametrize("arm", recovery.SAID["arms"])
def test_every_phase_of_an_arm_is_a_recipe(arm: str, tmp_path: Path) -> None:
    asked = argparse.Namespace(out=tmp_path, model="gemma", data_dir=Path("/data"), spread=None)
    said = recovery.SAID["arms"][arm]
    phases = said.get("phases", [{}])
    assert sum(phase.get("share", 1) for phase in phases) == pytest.approx(1)
    for phase in phases:
        own: dict[str, Any] = {**said, **phase}
        settings = load_recipe(recovery.recipe(asked, tmp_path / "run", own, tokens=1024, seed=3)).distill
        if "data" in own:
            assert [source.weight for source in settings.data] == [*own["data"].values()]
            assert sum(own["data"].values()) in (pytest.approx(1), 3)
        assert settings.trainer["learning_rate"] == own.get("trainer", {}).get("learning_rate", 1e-3)


def test_a_mean_over_seeds_scores_every_item_as_their_mean_and_a_run_changes_by_nothing_from_itself() -> None:
    def run(right: int) -> dict[str, TaskScore]:
        tasks = {task: counted("distilled", task, "public", "continuation", 0.25, 40, right) for task in "abn"}
        return tasks | {"n": replace(tasks["n"], higher_is_better=False)}  # nats

    pooled = recovery.over_seeds([run(20), run(30)])
    assert Counter(item.score for item in pooled["a"].items) == {1.0: 20, 0.5: 10, 0.0: 10}
    assert pooled["a"].ci_low < pooled["a"].score == 25 / 40 < pooled["a"].ci_high
    of_names = {"teacher": run(40), "default-9-0": run(20), "arm-9-0": run(20), "arm-9-1": run(30), "arm-9-all": pooled}

    def told(name: str, against: str, tasks: str = "ab") -> list[dict[str, Any]]:
        other = recovery.compared(of_names, against, name)
        return [*recovery.rows_of("public", tasks, of_names["teacher"], of_names[name], other)]

    same, none, named = told("arm-9-0", "default"), told("arm-9-all", "default")[-1], told("arm-9-all", "arm-9-0")
    assert [(row["change"], row["kept"]) for row in same] == [(0, pytest.approx(1 / 3))] * 3
    assert none["kept"] == pytest.approx(0.5)
    assert "change" not in none, "there is no default over seeds"
    assert not any(recovery.compared(of_names, against, "arm-9-0") for against in ("arm", "arm-9-0"))
    assert [row["change"] for row in named] == [pytest.approx(1 / 6)] * 3
    (nats,) = told("arm-9-all", "arm-9-0", "n")
    assert nats["change_low"] < nats["change"] == 5 / 40 < nats["change_high"], "nats have no share to keep"
    answered = {(row["name"], row["task"]): row["answers"] for row in recovery.answers(of_names)}
    assert [*map(int, answered["arm-9-0", "a"])] == [item.score for item in of_names["arm-9-0"]["a"].items]
    assert ("arm-9-all", "a") not in answered, "a mean over seeds is no answer"


def test_arms_are_chosen_by_documents_that_none_learns_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, other = tiny_checkpoint(tmp_path / "a", "llama"), tiny_checkpoint(tmp_path / "b", "llama", seed=1)
    monkeypatch.setitem(recovery.SAID["models"], "tiny", {"model": str(teacher)})
    monkeypatch.setitem(recovery.SAID, "texts", {"leads": {"file": "general/leads.jsonl"}})
    documents = [f'{{"text": "{number} is a number of many words"}}\n' for number in range(300)]
    (tmp_path / "data" / "general").mkdir(parents=True)
    (tmp_path / "data" / "general" / "leads.jsonl").write_text("".join(documents))
    folder = recovery.spread(tmp_path / "data", tmp_path / "spread", 8)
    asked = argparse.Namespace(model="tiny", out=tmp_path, data_dir=tmp_path / "data", spread=folder)
    learnt = Path(recovery.source(asked, "leads")["path"]).read_text()
    assert learnt + (tmp_path / "spread/held_out/general/leads.jsonl").read_text() == "".join(documents)
    assert recovery.held_out(asked, teacher) == {"kl_leads": pytest.approx(0, abs=1e-6)}
    assert recovery.held_out(asked, other)["kl_leads"] > 0


@pytest.mark.prove
def test_the_command_heals_scores_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_checkpoint(tmp_path, "llama")
    monkeypatch.setitem(recovery.SAID["models"], "tiny", {"model": str(teacher), "drop": [1], "tasks": TASKS})
    words = [str(tmp_path / "out"), "--model", "tiny", "--seeds", "0", "--tokens", "16384", "--limit", "8", "--arms"]
    phases = [{"share": 0.5, "trainable": "all"}, {"share": 0.5}]
    monkeypatch.setitem(recovery.SAID["arms"], "two", {"data": {"instructions": 1}, "phases": phases})
    monkeypatch.setitem(recovery.SAID["arms"], "other", {"with": "trl", "data": {"instructions": 1}})
    monkeypatch.setitem(recovery.SAID["arms"], "plain", {"data": {"instructions": 1}, "trainable": "all"})
    recovery.main([*words, "two", "other"])
    out = tmp_path / "out" / "tiny"
    rows = list(csv.DictReader((out / "table.csv").open()))
    assert {row["name"] for row in rows} == {"teacher", "cut", "two-16384-0", "other-16384-0"}
    healed = [row for row in rows if row["name"].endswith("-16384-0")]
    assert {(row["tokens"], row["steps"]) for row in healed} == {("16384", "16")}
    assert all(float(row["processor_seconds"]) > 1 for row in healed)
    second = out / "runs" / "two-16384-0" / "phase1"
    assert (second / "student").resolve() == second.with_name("phase0") / "distilled"
    recovery.main([*words, "plain", "--control"])
    told = {row["name"]: row for row in csv.DictReader((out / "table.csv").open()) if not row["task"]}
    both = [told["plain-16384-0"], told["plain_control-16384-0"]]
    assert [(row["tokens"], row["steps"]) for row in both] == [("16384", "16")] * 2
    control = json.loads((out / "runs/plain-16384-0/phase0/control/distilled/config.json").read_bytes())
    assert control["num_hidden_layers"] == NUM_LAYERS, "nothing is cut from it"
    assert not [*out.glob("runs/**/checkpoint-*")], "they would fill the disk"
    shutil.rmtree(out / "scores" / "two-16384-0")
    before = second.joinpath("distill.json").read_bytes()
    recovery.main([*words, "two"])
    assert second.joinpath("distill.json").read_bytes() == before, "what is trained is not trained again"
    assert (out / "scores" / "two-16384-0" / f"{TASKS['reworded'][0]}.items.jsonl").is_file()
