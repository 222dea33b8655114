"""What W&B is given, read back from the files of an offline run; and that nothing of it can end or spoil a run.

Covers: shoal.eval.report.score_rows, shoal.tracking.wandb_results, shoal.tracking.wandb_run,
shoal.train.callbacks.wandb_curves.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml
from offline_wandb import Tracked, read_tracked
from PIL import Image
from results import evaluation, formed, importance, speed, training, write_formed
from tiny import tiny_checkpoint
from transformers import TrainerControl, TrainerState, TrainingArguments
from wandb_server import WandbServer

from shoal.artifacts.plan import PruningPlan
from shoal.errors import UserError
from shoal.eval.report.score_rows import COLUMNS, score_rows
from shoal.launch.cli import run_verb
from shoal.recipe.recipe import load_recipe
from shoal.recipe.section import as_dict
from shoal.recipe.track import Track
from shoal.redaction import redacted, redacted_arguments
from shoal.tracking import wandb_results, wandb_run
from shoal.tracking.wandb_results import log_results
from shoal.train.callbacks.wandb_curves import Curves

pytestmark = pytest.mark.slow
KEY = "0123456789abcdef" * 2 + "01234567"
HUB_TOKEN = "hf_" + "s" * 34
ROLES = ("teacher", "pruned", "distilled")
OFFLINE = Track(wandb="offline")


@pytest.fixture(autouse=True)
def _own_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test sees what another one did to W&B, or leaves anything in the user's folders."""
    with fresh_wandb(tmp_path, monkeypatch):
        yield


@contextlib.contextmanager
def fresh_wandb(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[None]:
    patch.delenv("WANDB_MODE", raising=False)
    patch.setenv("WANDB_API_KEY", KEY)
    patch.setenv("WANDB_CACHE_DIR", str(folder / "cache"))
    patch.setenv("WANDB_CONFIG_DIR", str(folder / "config"))
    patch.setenv("WANDB_SILENT", "true")
    patch.setattr(wandb_run, "_given_up", False)
    yield
    end_service()


def end_service() -> None:
    """Wait until W&B has written everything, as the end of a process does."""
    if "wandb" in sys.modules:
        with contextlib.suppress(ConnectionError):  # a test has killed it
            sys.modules["wandb"].teardown()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose stages were tracked one after the other: cut, training, everything else."""
    folder = tmp_path_factory.mktemp("tracked")
    teacher = tiny_checkpoint(folder, "llama")
    run = folder / "run"
    settings = {"model": str(teacher), "run_dir": str(run), "prune": {"drop": [2, 3]}}
    settings |= {"track": {"wandb": "offline", "tags": ["a", HUB_TOKEN], "name": f"with {HUB_TOKEN}"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    overrides = [f"distill.trainer.lr_scheduler_kwargs={{a: {HUB_TOKEN}}}"]
    with pytest.MonkeyPatch.context() as patch, fresh_wandb(folder, patch):
        patch.setattr(sys, "argv", ["shoal", "prune", *overrides])
        assert run_verb("prune", str(folder / "recipe.yaml"), overrides) == 0
        recipe = load_recipe(folder / "recipe.yaml", overrides)
        train(run, recipe.track, as_dict(recipe))
        shutil.copytree(run / "student", run / "distilled")
        write_results(run)
        draw(run / "figures")
        log_results(recipe.track, run, as_dict(recipe), teacher=teacher, score_rows=score_rows)
        assert not wandb_run._given_up, "see the warning above"
    return run


def train(run_dir: Path, track: Track, recipe: dict[str, Any]) -> None:
    """Two logged steps of a training."""
    assert wandb_run.start(track, run_dir, recipe) is not None
    log_steps(run_dir, 1, 2)
    wandb_run.finish(run_dir)


def log_steps(run_dir: Path, *steps: int) -> None:
    curves, state, control = Curves(run_dir), TrainerState(), TrainerControl()
    output = str(run_dir / "checkpoints")
    arguments = TrainingArguments(output_dir=output, use_cpu=True, report_to=[], hub_model_id=HUB_TOKEN)
    curves.on_train_begin(arguments, state, control, model=None)
    for step in steps:
        state.global_step = step
        curves.on_log(arguments, state, control, logs={"loss": 1 / step, "watch/perplexity": 3.0 * step})


def write_results(run_dir: Path) -> None:
    """Made-up results, of the teacher of the plan that is there."""
    plan = run_dir / PruningPlan.FILE
    provenance = PruningPlan.read(plan).provenance if plan.is_file() else importance().provenance
    for artifact in (importance(), training()):
        replace(artifact, provenance=provenance).write(run_dir / artifact.FILE)
    for role in ROLES:
        replace(evaluation(role), provenance=provenance).write(run_dir / "eval" / f"{role}.json")
    speed().write(run_dir / "eval" / "speed.json")


def draw(folder: Path) -> None:
    folder.mkdir()
    Image.new("RGB", (2, 2)).save(folder / "before_after.png")
    for name in ("before_after", "atlas"):
        (folder / f"{name}.svg").write_text(f"<svg><title>{name}</title></svg>")


@pytest.fixture(scope="module")
def found(run_dir: Path) -> Tracked:
    return read_tracked(run_dir)


@pytest.mark.slow
def test_all_stages_are_one_run_that_is_gone_on_with(found: Tracked, run_dir: Path) -> None:
    assert len(found.ids) == 3
    assert set(found.ids) == {(run_dir / "wandb_run_id").read_text().strip()}
    assert all(found.resumed)


def test_the_configuration_is_the_resolved_recipe(found: Tracked) -> None:
    recipe = found.config["recipe"]
    assert recipe["prune"]["drop"] == [2, 3]
    assert recipe["eval"]["sequence_length"] == 512
    assert recipe["distill"]["trainer"] == {"lr_scheduler_kwargs": {"a": "(hidden)"}}
    assert found.config["environment"]["torch"]


def test_the_curve_of_training_is_there(found: Tracked) -> None:
    rows = [row for row in found.history if "train/loss" in row]
    assert [(row["train/global_step"], row["train/loss"]) for row in rows] == [(1, 1.0), (2, 0.5)]
    assert [row["train/watch/perplexity"] for row in rows] == [3.0, 6.0]


def test_importance_is_a_table_of_layers(found: Tracked) -> None:
    rows = found.table("importance")
    assert [row["block_influence"] for row in rows] == list(importance().layers["block_influence"])
    assert [row["layer"] for row in rows if row["dropped"]] == [2, 3]
    runs = {(row["first_layer"], row["num_layers"]): row["importance"] for row in found.table("importance_of_runs")}
    assert runs[1, 3] == importance().runs["angular"][2][1]


def test_before_and_after_is_a_table_with_intervals_and_retention(found: Tracked, run_dir: Path) -> None:
    rows = found.table("before_after")
    assert tuple(rows[0]) == COLUMNS
    scores = {(row["role"], row["task"], row["protocol"], row["metric"]): row for row in rows}
    for role in ROLES:
        for task in evaluation(role).tasks:
            row = scores.pop((role, task.task, task.protocol, task.metric))
            expected = (task.score, task.ci_low, task.ci_high, task.n, task.chance)
            assert tuple(row[key] for key in ("score", "ci_low", "ci_high", "n", "chance")) == pytest.approx(expected)
            key = f"score/{role}/{task.task}/{task.protocol}/{task.metric}"
            assert found.summary[key] == pytest.approx(task.score)
    assert not scores
    kept = next(row for row in rows if row["role"] == "pruned" and row["task"] == "retrieval_generation")
    teacher, pruned = (
        next(task.score for task in evaluation(role).tasks if task.task == "retrieval_generation")
        for role in ("teacher", "pruned")
    )
    assert kept["retention"] == pytest.approx(pruned / teacher)
    assert kept["retention_low"] < kept["retention"] < kept["retention_high"]
    assert found.summary["retention/pruned/retrieval_generation/generation/acc"] == pytest.approx(kept["retention"])


def test_rows_tell_family_level_and_how_texts_went_wrong(tmp_path: Path) -> None:
    plain, *_, written = evaluation("pruned").tasks
    rates = {"malformed": 0.25, "repetition": 0.5, "cut_off": 0.0, "mean_tokens": 7.0}
    tasks = (plain, replace(written, family="chain", level=3.0, rates=rates))
    evaluation("pruned", tasks).write(tmp_path / "eval" / "pruned.json")
    first, second = (dict(zip(COLUMNS, row, strict=True)) for row in score_rows(tmp_path).rows)
    assert [first[key] for key in ("family", "level", *rates)] == [None] * 6
    assert {key: second[key] for key in ("family", "level", *rates)} == {"family": "chain", "level": 3.0, **rates}


def test_summary_values_are_named_by_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary: dict[str, Any] = {}
    monkeypatch.setattr(wandb_results, "_table", lambda rows: rows)
    run: Any = SimpleNamespace(summary=summary)
    write_formed(tmp_path)
    found = wandb_results._scores(run, tmp_path, score_rows(tmp_path))["before_after"]
    scores = {task.task: task.score for task in formed("distilled").tasks}
    for column, task in (("in", "retrieval_generation"), ("twin", "retrieval_twin_generation")):
        assert summary[f"score/{column}/distilled/{task}/generation/match"] == scores[task]
        assert f"retention/{column}/control/{task}/generation/match" in summary
    gap = scores["retrieval_generation"] - scores["retrieval_twin_generation"]
    assert summary["form_gap/twin/distilled/retrieval_twin_generation/generation/match"] == pytest.approx(gap)
    assert not [name for name in summary if name.startswith(("form_gap/in", "form_gap/public"))]
    assert "score/distilled/perplexity/rolling/nats_per_token" in summary, "without a column: as ever"
    assert summary["num_parameters/control"] == summary["num_parameters/teacher"]
    assert {"column", "form_gap", "form_gap_low", "form_gap_high"} <= set(found.columns)


def test_figures_are_pictures_or_where_there_is_no_other_markup(found: Tracked, run_dir: Path) -> None:
    logged = {key.removesuffix("/path"): value for row in found.history for key, value in row.items()}
    picture = found.files[logged["figures/before_after"]]
    assert picture.read_bytes() == (run_dir / "figures" / "before_after.png").read_bytes()
    assert found.files[logged["figures/atlas"]].read_text() == "<svg><title>atlas</title></svg>"


def test_lineage_goes_from_teacher_to_student_to_distilled(found: Tracked, run_dir: Path) -> None:
    (run_id,) = set(found.ids)
    teacher, student, distilled = "llama", f"student-{run_id}", f"distilled-{run_id}"
    assert found.artifacts[teacher].use_after_commit
    assert found.artifacts[teacher].user_created
    assert not found.artifacts[student].use_after_commit
    assert found.made_from(student) == [teacher]
    assert found.made_from(distilled) == [student, teacher]
    assert json.loads(found.artifacts[student].metadata)["drop"] == [2, 3]
    for name in ("student", "distilled"):
        artifact = f"{name}-{run_id}"
        assert f"{(run_dir / name).as_uri()}/model.safetensors" in found.references(artifact)
        assert set(found.content(artifact)) == {"made_from.json"}


def test_results_are_files_of_an_artifact(found: Tracked, run_dir: Path) -> None:
    content = found.content(f"results-{found.ids[0]}")
    for name in ("plan.json", "importance.json", "distill.json", "eval/distilled.json", "eval/speed.json"):
        assert json.loads(content[name]) == redacted(json.loads((run_dir / name).read_text())), name
    assert yaml.safe_load(content["recipe.yaml"]) == found.config["recipe"]
    assert all(str(run_dir / "wandb") in entry.local_path for entry in _staged(found))


def _staged(found: Tracked) -> list[Any]:
    return [entry for entry in found.artifacts[f"results-{found.ids[0]}"].manifest.contents if entry.local_path]


def test_no_secret_is_in_any_file_of_wandb(found: Tracked, run_dir: Path) -> None:
    assert "distill.trainer.lr_scheduler_kwargs={a: (hidden)}" in found.arguments
    for folder in (run_dir / "wandb", run_dir.parent / "cache", run_dir.parent / "config"):
        for file in filter(Path.is_file, folder.rglob("*")):
            content = file.read_bytes()
            assert KEY.encode() not in content, file
            assert HUB_TOKEN.encode() not in content, file


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    found = WandbServer()
    threading.Thread(target=found.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", found.url)
    yield found
    end_service()
    found.shutdown()
    found.server_close()


@pytest.mark.slow
def test_online_stages_arrive_as_one_run_that_has_used_the_teacher(tmp_path: Path, server: WandbServer) -> None:
    track, recipe = Track(wandb="online"), {"model": str(tmp_path / "base"), "revision": None, "note": HUB_TOKEN}
    run_dir, teacher = tmp_path / "run", tiny_checkpoint(tmp_path / "base", "llama")
    importance().write(run_dir / "importance.json")
    log_results(track, run_dir, recipe, teacher=teacher, score_rows=score_rows)
    train(run_dir, track, recipe)
    assert server.run == (run_dir / "wandb_run_id").read_text().strip()
    assert [row["_step"] for row in server.history] == [0, 1, 2]
    assert [row["train/loss"] for row in server.history[1:]] == [1.0, 0.5]
    assert server.used == {"base"}
    assert {"base", f"results-{server.run}", f"run-{server.run}-importance"} <= server.committed
    arrived = json.loads(server.uploads[f"results-{server.run}/importance.json"])
    assert arrived == json.loads((run_dir / "importance.json").read_text())
    assert not [body for body in server.seen if HUB_TOKEN.encode() in body]


@pytest.mark.slow
def test_offline_stages_are_put_together_in_order_when_they_are_uploaded(
    run_dir: Path, found: Tracked, server: WandbServer
) -> None:
    words = wandb_run.sync_command(run_dir).split()
    program = str(Path(sys.executable).with_name(words[0]))
    subprocess.run([program, *words[1:]], check=True, capture_output=True, timeout=120, cwd=run_dir.parent)
    assert server.run == found.ids[0]
    assert [row["_step"] for row in server.history] == list(range(len(found.history)))
    assert [row["train/loss"] for row in server.history if "train/loss" in row] == [1.0, 0.5]
    assert server.used == {"llama"}
    assert set(found.artifacts) == server.committed


def test_what_has_been_logged_is_not_logged_again(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Path] = []
    monkeypatch.setattr(wandb_results, "start", lambda track, folder, recipe, wait_s: started.append(folder))
    recipe = as_dict(load_recipe(run_dir.parent / "recipe.yaml"))
    arguments: dict[str, Any] = {"teacher": run_dir.parent / "llama", "score_rows": score_rows}
    log_results(OFFLINE, run_dir, recipe, **arguments)
    assert not started
    log_results(Track(wandb="off", upload_weights=True), run_dir, recipe, **arguments)
    assert not started
    log_results(Track(wandb="offline", upload_weights=True), run_dir, recipe, **arguments)
    assert started == [run_dir]


def test_weights_are_uploaded_only_where_the_recipe_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    logged: list[Any] = []
    run = SimpleNamespace(id="abcd", log_artifact=logged.append)
    for upload in (False, True):
        wandb_results.model_fingerprint, before = lambda _: "print", wandb_results.model_fingerprint
        wandb_results._checkpoint(run, folder=folder, base="base", plan=tmp_path / "none", upload=upload)  # pyright: ignore[reportArgumentType]
        wandb_results.model_fingerprint = before
    entries = [artifact.manifest.entries["checkpoint/model.safetensors"] for artifact in logged]
    assert entries[0].ref == (folder / "model.safetensors").as_uri()
    assert entries[1].ref is None
    assert Path(entries[1].local_path).samefile(folder / "model.safetensors")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.message for record in caplog.records if record.name == "shoal.tracking.wandb_run" and record.levelno > 20
    ]


def test_a_server_that_cannot_be_reached_is_said_and_the_stage_is_tracked_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    caplog.set_level(logging.INFO, "shoal")
    run_dir = tmp_path / "run"
    train(run_dir, Track(wandb="online"), {"model": "x"})
    end_service()
    (warning,) = warnings(caplog)
    assert "cannot go online" in warning
    assert f"wandb sync --include-online {run_dir / 'wandb'}" in warning
    found = read_tracked(run_dir)
    assert [row["train/loss"] for row in found.history if "train/loss" in row] == [1.0, 0.5]
    assert found.config["recipe"] == {"model": "x"}
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()]


def test_a_service_that_dies_ends_nothing_and_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert wandb_run.start(OFFLINE, tmp_path, {}) is not None
    for child in psutil.Process().children(recursive=True):
        if child.name().startswith("wandb"):
            child.kill()
            child.wait(10)
    for _ in range(3):
        log_steps(tmp_path, 1, 2)
    wandb_run.finish(tmp_path)
    assert wandb_run.start(OFFLINE, tmp_path, {}) is None
    (warning,) = warnings(caplog)
    assert "Nothing more is tracked by this process; results are in" in warning


def test_results_that_cannot_be_logged_end_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_results(tmp_path)
    (tmp_path / wandb_results.LOGGED_FILE).write_text("not json")
    for _ in range(2):
        log_results(OFFLINE, tmp_path, {"model": "x", "revision": None}, teacher=tmp_path, score_rows=score_rows)
    (warning,) = warnings(caplog)
    assert "results could not be logged (Expecting value" in warning
    assert not (tmp_path / "wandb").exists()


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=object(), finish=lambda: None, teardown=lambda: None))
    wandb_run.finish(tmp_path)
    assert not caplog.records
    monkeypatch.setattr(wandb_run.shutil, "disk_usage", lambda _: SimpleNamespace(free=4096))
    wandb_run.finish(tmp_path)
    assert "the disk is full, so its records are not complete" in caplog.text


def test_a_key_is_needed_only_where_online_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_run.wandb_mode(Track()) == "off", "without a key, who wants files of W&B says so"
    assert wandb_run.wandb_mode(Track(wandb="off")) == "off"
    with pytest.raises(UserError, match=r"track\.wandb: online needs an API key; run `wandb login`"):
        wandb_run.wandb_mode(Track(wandb="online"))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert wandb_run.wandb_mode(Track()) == "online"
    assert wandb_run.wandb_mode(Track(wandb="offline")) == "offline"


def test_what_is_offline_is_told_of_until_it_is_uploaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "shoal")
    (tmp_path / "wandb" / "offline-run-1").mkdir(parents=True)
    wandb_run.tell_unsent(Track(wandb="off"), tmp_path)
    assert not caplog.records
    wandb_run.tell_unsent(OFFLINE, tmp_path)
    commands = [record.getMessage().partition("upload it with: ")[2] for record in caplog.records]
    assert [shlex.split(command) for command in commands] == [
        ["wandb", "sync", "--include-online", str(tmp_path / "wandb")]
    ]
    (tmp_path / "wandb" / "offline-run-1" / "run-1.wandb.synced").touch()
    caplog.clear()
    wandb_run.tell_unsent(OFFLINE, tmp_path)
    assert not caplog.records


def test_without_a_key_and_a_word_in_the_recipe_nothing_is_tracked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    write_results(tmp_path)
    assert wandb_run.start(Track(), tmp_path, {"model": "x"}) is None
    log_results(Track(), tmp_path, {"model": "x", "revision": None}, teacher=tmp_path, score_rows=score_rows)
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith("wandb")]


def test_a_missing_key_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "r.yaml").write_text(f"model: nowhere\nrun_dir: {tmp_path}/run\ntrack: {{wandb: online}}\n")
    assert run_verb("measure", str(tmp_path / "r.yaml"), []) == 2
    assert "track.wandb: online needs an API key" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_secrets_are_hidden_by_name_form_and_because_the_environment_holds_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MY_SECRET", "swordfish-1")
    for key in ("sk-proj-" + "a1-b_" * 5, "sk-ant-api03-" + "x" * 20, "AKIA" + "A" * 16, "glpat-" + "y" * 20):
        assert redacted({"note": f"with {key} in it"}) == {"note": "with (hidden) in it"}
    assert redacted("a sk-lift and AKIA") == "a sk-lift and AKIA"
    assert redacted(["the swordfish-1 is out", {"note": f"key {KEY}"}]) == [
        "the (hidden) is out",
        {"note": "key (hidden)"},
    ]
    words = ["distill.num_tokens=80_000", "distill.trainer.hub_token=abc def", f"x={HUB_TOKEN}", "--config"]
    assert redacted_arguments(words) == [
        "distill.num_tokens=80_000",
        "distill.trainer.hub_token=(hidden)",
        "x=(hidden)",
        "--config",
    ]
    nested = "distill.trainer={hub_token: 'ab c', eval_tokens: 5_000, other: {api_key: \"x, y\"}, last: 1}"
    assert redacted_arguments([nested]) == [
        "distill.trainer={hub_token: (hidden), eval_tokens: 5_000, other: {api_key: (hidden)}, last: 1}"
    ]
