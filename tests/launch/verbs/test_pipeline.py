"""The stages: each made once, made again when its settings change, never mixed up, never by two at a time.

Covers: shoal.launch.verbs.distill, shoal.launch.verbs.evaluate, shoal.launch.verbs.overlap, shoal.launch.verbs.prune,
shoal.launch.verbs.run.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import socket
from dataclasses import replace
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import cases
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.importance import Importance
from shoal.artifacts.plan import ClosedGap, Plan
from shoal.artifacts.training import Training
from shoal.errors import UserError
from shoal.launch.early.asked import Asked
from shoal.launch.early.run_directory import refuse_trained
from shoal.launch.verbs import distill, evaluate, measure, report
from shoal.launch.verbs import prune as pruning
from shoal.launch.verbs.dry_run import dry_run
from shoal.launch.verbs.pipeline import run_all
from shoal.launch.verbs.run import Run, locked, open_run, write_story
from shoal.models.checkpoint_files import CLOSED_GAPS, model_fingerprint
from shoal.recipe.recipe import load_recipe, parse_recipe
from shoal.train.engine.checkpoint import commit
from shoal.train.identity import checkpoint_inputs

CASES = cases(__file__)

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def make_run(teacher: Path, tmp_path: Path) -> Any:
    """A run in this test's directory that drops layers 1 and 3, with other settings where a test gives them."""

    def make(**settings: Any) -> Run:
        raw = {"model": str(teacher), "run_dir": str(tmp_path / "run"), "prune": {"drop": [1, 3]}, **settings}
        return open_run(parse_recipe(raw))

    return make


@pytest.fixture(autouse=True)
def log_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="shoal")


MEASURE = {"num_tokens": 64, "sequence_length": 32, "batch_size": 2}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@pytest.mark.slow
def test_prune_with_explicit_layers_writes_plan_and_student_without_measuring(
    make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "measure", lambda _: pytest.fail("measured"))
    run = make_run()
    pruning.prune(run)
    assert sorted(file.name for file in run.dir.iterdir()) == ["plan.json", "student"]
    plan = Plan.load(run.dir / "plan.json")
    assert (plan.num_layers, plan.drop, plan.keep) == (6, (1, 3), (0, 2, 4, 5))
    assert plan.provenance.inputs["model"] == run.teacher_fingerprint
    student = AutoModelForCausalLM.from_pretrained(run.dir / "student")
    assert student.config.num_hidden_layers == 4
    whole = load_file(run.teacher / "model.safetensors")
    for new, old in enumerate(plan.keep):
        name = "model.layers.{}.self_attn.q_proj.weight"
        assert torch.equal(student.get_parameter(name.format(new)), whole[name.format(old)])


def test_what_is_done_is_not_made_again(make_run: Any, caplog: pytest.LogCaptureFixture) -> None:
    pruning.prune(make_run())
    folder = make_run().dir / "student"
    before, inode = contents(folder), folder.stat().st_ino
    pruning.prune(make_run(eval={"limit": 3}))
    assert "prune: done already" in caplog.text
    assert folder.stat().st_ino == inode
    assert contents(folder) == before


@pytest.mark.slow
def test_changed_setting_makes_it_again_and_says_which(make_run: Any, caplog: pytest.LogCaptureFixture) -> None:
    pruning.prune(make_run())
    pruning.prune(make_run(prune={"drop": [2]}))
    assert (
        "plan.json is out of date (prune.drop is [2] in this recipe but [1, 3] there); producing it again"
        in caplog.text
    )
    run = make_run()
    assert Plan.load(run.dir / "plan.json").drop == (2,)
    assert AutoModelForCausalLM.from_pretrained(run.dir / "student").config.num_hidden_layers == 5


@pytest.mark.slow
@pytest.mark.parametrize(("prune", "change", "message"), CASES)
def test_a_plan_that_was_edited_is_not_believed(
    make_run: Any, prune: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    run = make_run(prune=prune)
    pruning.prune(run)
    path = run.dir / "plan.json"
    body = json.loads(path.read_text())
    assert body["drop"] != change.get("drop")
    pruning.read_plan(make_run(prune=prune))
    path.write_text(json.dumps({**body, **change}))
    for stage in (pruning.prune, pruning.read_plan):
        with pytest.raises(UserError, match=rf"plan\.json: {message}"):
            stage(make_run(prune=prune))


@pytest.mark.slow
def test_a_new_measurement_that_chooses_the_same_layers_gives_the_same_student(make_run: Any) -> None:
    first = {
        "measure": {**MEASURE, "metrics": ["block_influence"]},
        "prune": {"metric": "block_influence", "num_drop": 2},
    }
    second = {**first, "measure": {**MEASURE, "metrics": ["block_influence", "magnitude"]}}
    run = make_run(**first)
    pruning.prune(run)
    last = Plan.load(run.dir / "plan.json")
    measure.measure(make_run(**second))
    pruning.prune(make_run(**second))
    again = pruning.read_plan(make_run(**second))
    assert (again.drop, again.student) == (last.drop, last.student), "so what was trained from it goes on"


@pytest.mark.slow
def test_choosing_by_metric_measures_first_and_reads_what_is_measured(
    make_run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"measure": MEASURE, "prune": {"num_drop": 2}}
    run = make_run(**settings)
    pruning.prune(run)
    assert "prune: needs importance.json, measuring first" in caplog.text
    importance = Importance.load(run.dir / "importance.json")
    scores = importance.layers["block_influence"]
    assert Plan.load(run.dir / "plan.json").drop == tuple(sorted(sorted(range(1, 5), key=scores.__getitem__)[:2]))
    caplog.clear()
    measure.measure(make_run(**settings))
    assert "measure: done already" in caplog.text
    other = make_run(measure={**MEASURE, "num_tokens": 96}, prune={"num_drop": 2})
    for stage in (pruning.prune, pruning.read_plan):
        with pytest.raises(UserError, match=r"importance.json: belongs to another run: measure.num_tokens is 96 in"):
            stage(other)


@pytest.mark.slow
def test_run_json_tells_the_story(make_run: Any) -> None:
    run = make_run()
    pruning.prune(run)
    write_story(run)
    story = json.loads((run.dir / "run.json").read_text())
    assert parse_recipe(story["recipe"]) == run.recipe
    assert story["environment"]["torch"] == torch.__version__
    plan = Plan.load(run.dir / "plan.json").provenance
    assert story["stages"] == {"plan.json": {"fingerprint": plan.fingerprint, "created": plan.created}}


@pytest.mark.slow
def test_run_json_has_the_kernels_of_every_stage_and_a_run_of_other_libraries_says_so(
    make_run: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernels = {"kernels-community/activation": "abc"}
    with monkeypatch.context() as there:
        there.setattr("shoal.runtime.loaded_kernels", lambda: kernels)
        run = make_run()
        pruning.prune(run)
    write_story(run)
    story = json.loads((run.dir / "run.json").read_text())
    assert story["environment"]["hub_kernels"] == kernels  # of another process
    story["environment"]["torch"] = "2.1.0"
    (run.dir / "run.json").write_text(json.dumps(story))
    caplog.clear()
    make_run()
    assert f"run: was made with torch 2.1.0 (this is {torch.__version__})" in caplog.text


def test_run_json_holds_no_secret(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", "opensesame")
    token = "hf_" + "s" * 34
    run = make_run(
        track={"wandb": "off", "tags": [token, "db:opensesame"]},
        distill={"trainer": {"hub_model_id": f"https://me:{token}@host/x", "learning_rate": 1e-3}},
    )
    run.dir.mkdir(parents=True)
    write_story(run)
    text = (run.dir / "run.json").read_text()
    assert token not in text
    assert "opensesame" not in text
    assert json.loads(text)["recipe"]["track"]["tags"] == ["(hidden)", "db:(hidden)"]
    assert json.loads(text)["recipe"]["distill"]["trainer"]["learning_rate"] == 1e-3


def hold(run: Run, holding: Event, release: Event) -> None:
    with locked(run):
        holding.set()
        release.wait(60)


def test_second_process_in_a_run_dir_is_refused_and_told_who_is_there(
    make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.launch.verbs.run.LOCK_WAIT_S", 0)
    run, holding, release = make_run(), FORK.Event(), FORK.Event()
    holder = FORK.Process(target=hold, args=(run, holding, release))
    holder.start()
    assert holding.wait(60)
    who = f"process {holder.pid} on {socket.gethostname()}"
    with pytest.raises(UserError) as refused, locked(run):
        pass
    assert str(refused.value) == (
        f"run_dir {run.dir}: is in use by {who}; wait for it, stop it, or choose another folder"
    )
    release.set()
    holder.join(60)
    with locked(run):
        assert (run.dir / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def test_a_refused_run_leaves_no_folder_that_it_made(make_run: Any, tmp_path: Path) -> None:
    run = make_run(run_dir=str(tmp_path / "runs" / "deep" / "mine"))
    with pytest.raises(UserError, match="refused"), locked(run):
        raise UserError("refused")
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="refused"), locked(run):
        raise UserError("refused")
    assert list((tmp_path / "runs").iterdir()) == []


def trained_to(run: Run, step: int, **identity: Any) -> None:
    """A checkpoint of this run, as two ranks would leave it."""
    inputs = distill.training_inputs(run, pruning.read_plan(run))
    folder = run.dir / "checkpoints" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    commit(folder, {**checkpoint_inputs(run.recipe.distill, inputs), **identity})


@pytest.mark.slow
def test_a_training_of_other_settings_is_refused_before_the_launch_and_not_promised(
    make_run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"num_tokens": 64, "sequence_length": 32}
    run = make_run(distill=settings)
    pruning.prune(run)
    trained_to(run, 2)
    (run.dir / "distilled").mkdir()
    (run.dir / "distilled" / "config.json").write_text("{}")
    inputs = distill.training_inputs(run, pruning.read_plan(run))
    made = Training(Provenance(inputs), 2, 64, 1.0, (), {}, {}, 0)
    made.save(run.dir / Training.FILE)
    assert distill.distill_is_done(run)
    other = make_run(distill={**settings, "num_tokens": 128})
    with pytest.raises(UserError, match=r"checkpoint-2: belongs to another run: distill.num_tokens is 128 in this re"):
        distill.distill_is_done(other)
    assert "producing it again" not in caplog.text


@pytest.mark.parametrize("what_goes", [[], ["plan.json"], ["plan.json", "importance.json"]], ids=len)
def test_other_layers_by_a_metric_are_refused_before_they_replace_the_student_of_checkpoints(
    make_run: Any, what_goes: list[str]
) -> None:
    settings: dict[str, Any] = {"measure": MEASURE, "distill": {"num_tokens": 64, "sequence_length": 32}}
    run = make_run(**settings, prune={"num_drop": 1})
    pruning.prune(run)
    trained_to(run, 2)
    (dropped,) = pruning.read_plan(run).drop
    before = (run.dir / "student" / "model.safetensors").stat().st_ino
    for name in what_goes:
        (run.dir / name).unlink()
    settings["prune"] = {"num_drop": 1, "protect": [0, dropped, -1]}
    other, measured_anew = make_run(**settings), make_run(**settings | {"measure": {**MEASURE, "num_tokens": 96}})
    says = rf"checkpoint-2: belongs to another run: prune.drop is \[\d\] in this recipe but \[{dropped}\] there\. "
    of_all = [(dry_run, "run", other), (run_all, other, pytest.fail), (run_all, measured_anew, pytest.fail)]
    for ask, *given in [(pruning.read_plan, other)] if what_goes else of_all:
        with pytest.raises(UserError, match=says):
            ask(*given)
    assert (run.dir / "student" / "model.safetensors").stat().st_ino == before


@pytest.fixture
def asked_again(once: Any, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the recipe of a training with checkpoints asks, with other settings where a test gives them."""

    def trained(folder: Path) -> None:
        settings = {"data": "texts.jsonl", "num_tokens": 64, "sequence_length": 32, "trainer": {"learning_rate": 1e-3}}
        recipe = {"model": str(teacher), "run_dir": "run", "prune": {"drop": [1, 3]}, "distill": settings}
        folder.mkdir()
        monkeypatch.chdir(folder)
        Path("texts.jsonl").write_text('{"text": "stones"}\n')
        Path("recipe.yaml").write_text(json.dumps(recipe))
        run = open_run(load_recipe("recipe.yaml"))
        pruning.prune(run)
        trained_to(run, 8)
        trained_to(run, 16)

    shutil.copytree(once("trained to step 16", trained), tmp_path / "again")
    monkeypatch.chdir(tmp_path / "again")
    return lambda *changed: Asked("run", load_recipe("recipe.yaml", changed))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ("distill.trainer.learning_rate=2e-3", "distill.trainer.learning_rate is 0.002 in this recipe but 0.001 there"),
        ("distill.trainer.weight_decay=0.1", "distill.trainer.weight_decay is 0.1 in this recipe but not set there"),
        ("distill.num_tokens=128", "distill.num_tokens is 128 in this recipe but 64 there"),
        ("distill.batch_size=8", "distill.batch_size is 8 in this recipe but 4 there"),
        ("seed=1", "seed is 1 in this recipe but 0 there"),
        ("prune.drop=[2]", r"prune.drop is \[2\] in this recipe but \[1, 3\] there"),
        ("prune={num_drop: 3}", r"prune.drop is '3 layers' in this recipe but \[1, 3\] there"),
        (
            "prune={drop: [1, 3], changes: [{kind: compensate}]}",
            r"prune.changes is \[{'kind': 'compensate', 'method': 'both'}\] in this recipe but None there",
        ),
    ],
)
def test_a_training_of_other_settings_is_refused_by_the_recipe_alone(asked_again: Any, changed: str, says: str) -> None:
    asked = asked_again(changed)
    with pytest.raises(UserError, match=rf"^run/checkpoints/checkpoint-16: belongs to another run: {says}\. ") as early:
        refuse_trained(asked)
    if not changed.startswith("prune"):  # without the look the cut would be made again
        with pytest.raises(UserError) as late:
            distill.refuse_other_checkpoints(open_run(asked.recipe))
        assert str(early.value) == str(late.value)


def test_another_text_under_the_name_of_the_trained_one_is_refused_by_the_recipe_alone(asked_again: Any) -> None:
    Path("texts.jsonl").write_text('{"text": "apples"}\n')
    with pytest.raises(UserError, match=r"checkpoint-16: belongs to another run: data is '.*' in this recipe but '"):
        refuse_trained(asked_again())


@pytest.mark.parametrize(
    "changed",
    [
        [],
        ["device=cpu", "num_processes=1"],
        ["distill.deepspeed=zero1", "distill.trainer.save_steps=3", "distill.watch=null"],
        ["distill.watch={tasks: [brackets_depth3_continuation]}", "distill.stop_on_spike=3"],
        ["distill.batch_size=4", "distill.trainer.per_device_train_batch_size=1"],
        ["distill.num_tokens=null"],
        ["distill.trainer.lr_scheduler_type=cosine"],
        ["distill.data=auto"],
        ["max_minutes=5", "distill.num_tokens=128"],
        ["eval.control=true", "prune={num_drop: 2}"],
    ],
)
def test_a_training_that_may_go_on_is_not_refused_by_the_recipe_alone(asked_again: Any, changed: list[str]) -> None:
    refuse_trained(asked_again(*changed))
    Path("run").rename("moved")
    refuse_trained(asked_again(*changed, "run_dir=moved"))


def test_a_finished_training_is_not_refused_for_its_checkpoints_and_a_damaged_one_is_left_to_the_training(
    asked_again: Any,
) -> None:
    asked = asked_again("seed=1")
    run = open_run(asked.recipe)
    Training(Provenance(distill.training_inputs(run, pruning.read_plan(run))), 1, 64, 1.0, (), {}, {}, 1).save(
        run.dir / Training.FILE
    )
    refuse_trained(asked)
    (run.dir / Training.FILE).unlink()
    (run.dir / "checkpoints" / "checkpoint-16" / "manifest.json").write_text("{")
    refuse_trained(asked)


def as_trained(folder: Path, inputs: dict[str, Any], model: Path) -> None:
    """What a training with these inputs leaves, with the weights of ``model``."""
    shutil.copytree(model, folder / "distilled")
    settings = {"distilled": model_fingerprint(folder / "distilled")}
    Training(Provenance(inputs), 1, 64, 1.0, (), settings, {}, 1).save(folder / Training.FILE)


@pytest.mark.slow
def test_a_model_in_place_of_the_trained_one_is_not_scored_under_its_name(make_run: Any) -> None:
    run = make_run()
    pruning.prune(run)
    as_trained(run.dir, distill.training_inputs(run, pruning.read_plan(run)), run.teacher)
    evaluate.require_models_of_this_run(run, evaluate.roles(run))
    told = Training.load(run.dir / Training.FILE)
    replace(told, settings={}).save(run.dir / Training.FILE)
    with pytest.raises(UserError, match=r"distilled: cannot be checked: distill\.json is of an older shoal"):
        evaluate.evaluate(run)
    told.save(run.dir / Training.FILE)
    shutil.rmtree(run.dir / "distilled")
    shutil.copytree(run.dir / "student", run.dir / "distilled")
    for verb in (evaluate.evaluate, report.report):
        with pytest.raises(UserError, match=r"distilled: is not the model of distill\.json"):
            verb(run)


@pytest.mark.slow
def test_a_report_with_a_gguf_file_has_the_card_next_to_the_weights(make_run: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(report, "export_gguf", lambda _: None)
    plain, asked = make_run(), make_run(export={"gguf": True})
    pruning.prune(plain)
    as_trained(plain.dir, distill.training_inputs(plain, pruning.read_plan(plain)), plain.teacher)
    report.report(plain)
    card = plain.dir / "distilled" / "README.md"
    assert not card.exists()
    report.report(asked)
    assert "library_name: transformers" in card.read_text()


@pytest.mark.slow
def test_a_control_is_due_where_it_is_asked_for_and_not_there(make_run: Any, caplog: pytest.LogCaptureFixture) -> None:
    plain, asked = make_run(), make_run(eval={"control": True})
    pruning.prune(plain)
    plan = pruning.read_plan(plain)
    as_trained(plain.dir, distill.training_inputs(plain, plan), plain.dir / "student")
    assert distill.distill_is_done(plain)
    assert not distill.distill_is_done(asked)
    as_trained(plain.dir / "control", distill.control_inputs(asked, plan), plain.teacher)
    assert distill.distill_is_done(asked)
    assert list(evaluate.roles(plain)) == ["teacher", "pruned", "distilled"]
    assert list(evaluate.roles(asked)) == ["teacher", "pruned", "control", "distilled"]
    evaluate.require_models_of_this_run(asked, evaluate.roles(asked))
    (plain.dir / "student").rename(plain.dir / "moved")  # whose results stay
    assert distill.distill_is_done(asked)
    (plain.dir / "moved").rename(plain.dir / "student")
    inputs = distill.control_inputs(make_run(distill={"num_tokens": 7}), plan)
    Training(Provenance(inputs), 1, 7, 1.0, (), {}, {}, 1).save(plain.dir / "control" / Training.FILE)
    assert not distill.distill_is_done(asked)
    with pytest.raises(UserError, match=r"control/distill.json: belongs to another run: distill.num_tokens is 200000 "):
        evaluate.require_models_of_this_run(asked, evaluate.roles(asked))
    evaluate.require_models_of_this_run(plain, evaluate.roles(plain))


# --- compensation -------------------------------------------------------------------------------------------------

COMPENSATE = {"prune": {"drop": [1, 3], "changes": ["compensate"]}}


def test_a_compensated_student_is_made_once_and_remembered_in_its_plan(make_run: Any, monkeypatch: Any) -> None:
    run = make_run(**COMPENSATE)
    pruning.prune(run)
    plan = Plan.load(run.dir / Plan.FILE)
    assert [(gap.first, gap.last) for gap in plan.gaps] == [(1, 1), (3, 3)]
    assert all(gap.divergence_after <= gap.divergence_before for gap in plan.gaps)
    closed = [gap for gap in plan.gaps if gap.is_closed]
    assert closed, "random layers, but no gap gained: the test shows nothing"
    config = AutoConfig.from_pretrained(run.dir / "student")
    assert [ClosedGap(**gap) for gap in getattr(config, CLOSED_GAPS)] == closed
    plain = make_run(run_dir=str(run.dir.parent / "plain"))
    pruning.prune(plain)
    ours, theirs = (load_file(at.dir / "student/model.safetensors") for at in (run, plain))
    changed = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert changed
    assert all(name.startswith("model.layers.") for name in changed), "embeddings, norms and head stay"
    before = contents(run.dir / "student")
    monkeypatch.setattr("shoal.compress.apply.apply_plan", lambda *_, **__: pytest.fail("made again"))
    pruning.prune(make_run(**COMPENSATE))
    assert contents(run.dir / "student") == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("best", "changes"),
    [
        ("perplexity", [{"perplexity_data": "python_docs"}]),
        ("retrieval_continuation", [{"num_fewshot": 2}, {"apply_chat_template": True}]),
    ],
)
def test_what_chooses_the_best_state_is_part_of_the_training(
    make_run: Any, best: str, changes: list[dict[str, Any]]
) -> None:
    def trained_by(evaluation: dict[str, Any], best: str | None) -> dict[str, Any]:
        watch = {"tasks": ["retrieval_continuation"], "metric_for_best_model": best}
        run = make_run(distill={"watch": watch}, eval=evaluation)
        return distill.training_inputs(run, pruning.read_plan(run))

    pruning.prune(make_run())
    for change in changes:
        assert trained_by({}, best) != trained_by(change, best)
        assert trained_by({}, None) == trained_by(change, None), "it only looks on"
    assert trained_by({}, best) == trained_by({"limit": 3, "perplexity_tokens": 9}, best), "watch has its own"
