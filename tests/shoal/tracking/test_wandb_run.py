"""What W&B is given, read back from the files of an offline run; and that nothing of it can end or spoil a run."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from offline_wandb import read_tracked
from results import evaluation, importance, training
from transformers import TrainerControl, TrainerState, TrainingArguments
from wandb.sdk.lib.wbauth.validation import check_api_key

from shoal.errors import UserError
from shoal.eval.report.findings import score_rows
from shoal.recipe.recipe import Track
from shoal.tracking import wandb_run
from shoal.train.callbacks import Curves

KEY = "0123456789abcdef" * 2 + "01234567"
HUB_TOKEN = "hf_" + "s" * 34
ROLES = ("teacher", "pruned", "distilled")
OFFLINE = Track(wandb="offline", tags=("a", HUB_TOKEN))
RECIPE = {"model": "x", "note": HUB_TOKEN}


@pytest.fixture(autouse=True)
def _own_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test sees what another one did to W&B, or leaves anything in the user's folders."""
    for name in ("WANDB_MODE", "WANDB_NAME", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_SILENT", "true")
    for folder in ("cache", "config", "data"):
        monkeypatch.setenv(f"WANDB_{folder.upper()}_DIR", str(tmp_path / folder))
    monkeypatch.setattr(wandb_run, "_given_up", False)
    yield
    end_service()


def end_service() -> None:
    """Wait until W&B has written everything, as the end of a process does."""
    if "wandb" in sys.modules:
        with contextlib.suppress(ConnectionError):  # a test has killed it
            sys.modules["wandb"].teardown()


def train(run_dir: Path, track: Track) -> None:
    """Two logged steps of a training."""
    assert wandb_run.start(track, run_dir, RECIPE) is not None
    log_steps(run_dir)
    wandb_run.finish(run_dir)


def log_steps(run_dir: Path) -> None:
    curves, state, control = Curves(run_dir), TrainerState(), TrainerControl()
    output = str(run_dir / "checkpoints")
    arguments = TrainingArguments(output_dir=output, use_cpu=True, report_to=[], hub_model_id=HUB_TOKEN)
    curves.on_train_begin(arguments, state, control, model=None)
    for step in (1, 2):
        state.global_step = step
        curves.on_log(arguments, state, control, logs={"loss": 1 / step, "watch/perplexity": 3.0 * step})


def write_results(run_dir: Path) -> None:
    for artifact in (importance(), training()):
        artifact.save(run_dir / artifact.FILE)
    for role in ROLES:
        evaluation(role).save(run_dir / "eval" / f"{role}.json")
    (run_dir / "figures").mkdir()
    (run_dir / "figures/atlas.svg").write_text("<svg><title>atlas</title></svg>")


@pytest.mark.slow
def test_stages_are_one_run_with_curves_scores_and_files_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["shoal", "distill", f"distill.trainer.lr_scheduler_kwargs={{a: {HUB_TOKEN}}}"])
    train(run_dir, OFFLINE)
    write_results(run_dir)
    for _ in range(2):  # the second time nothing is new
        wandb_run.log_results(OFFLINE, run_dir, RECIPE, score_rows)
    assert not wandb_run._given_up, "see the warning above"
    end_service()
    found = read_tracked(run_dir)
    assert found.ids == [(run_dir / "wandb_run_id").read_text().strip()] * 2
    assert found.config["recipe"] == {"model": "x", "note": "(hidden)"}
    steps = [row for row in found.history if "train/loss" in row]
    assert [(row["train/loss"], row["train/watch/perplexity"]) for row in steps] == [(1.0, 3.0), (0.5, 6.0)]
    rows = found.table("before_after")
    assert {"score", "ci_low", "n", "column", "malformed", "wording_gap"} <= rows[0].keys()
    assert {row["role"] for row in rows} == set(ROLES)
    kept = next(row for row in rows if row["role"] == "pruned" and row["task"] == "retrieval_generation")
    assert kept["share_kept_low"] < kept["share_kept"] < kept["share_kept_high"]
    assert found.summary["share_kept/pruned/retrieval_generation/generation/acc"] == pytest.approx(kept["share_kept"])
    assert any("figures/atlas/path" in row for row in found.history)
    content = found.content(f"results-{found.ids[0]}")
    assert set(content) == {"recipe.yaml", "importance.json", "distill.json", *(f"eval/{role}.json" for role in ROLES)}
    assert json.loads(content["importance.json"]) == json.loads((run_dir / "importance.json").read_text())
    assert "distill.trainer.lr_scheduler_kwargs={a: (hidden)}" in found.arguments
    for file in filter(Path.is_file, tmp_path.rglob("*")):
        assert KEY.encode() not in file.read_bytes(), file
        assert HUB_TOKEN.encode() not in file.read_bytes(), file


@pytest.mark.prove
def test_a_server_that_cannot_be_reached_is_said_and_the_stage_is_tracked_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    train(tmp_path, Track(wandb="online"))
    end_service()
    assert "cannot go online" in caplog.text
    assert f"wandb sync --include-online {tmp_path / 'wandb'}" in caplog.text
    assert [row["train/loss"] for row in read_tracked(tmp_path).history if "train/loss" in row] == [1.0, 0.5]


def test_a_setting_that_wandb_refuses_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "soon")
    assert wandb_run.start(OFFLINE, tmp_path, {}) is None
    assert "W&B: it could not be started (init_timeout: Input should be a valid number" in caplog.text


@pytest.mark.slow
def test_a_service_that_dies_ends_nothing_and_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert wandb_run.start(OFFLINE, tmp_path, {}) is not None
    for child in psutil.Process().children(recursive=True):
        if child.name().startswith("wandb"):
            child.kill()
            child.wait(10)
    for _ in range(3):
        log_steps(tmp_path)
    wandb_run.finish(tmp_path)
    assert wandb_run.start(OFFLINE, tmp_path, {}) is None
    warnings = [record.message for record in caplog.records if record.name == "shoal.tracking.wandb_run"]
    assert len([text for text in warnings if "This process stops tracking; results are in" in text]) == 1


def test_a_key_is_needed_only_where_online_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(netrc))
    assert wandb_run.wandb_mode(Track()) == "off", "without a key, who wants files of W&B says so"
    write_results(tmp_path)
    assert wandb_run.start(Track(), tmp_path, RECIPE) is None
    wandb_run.log_results(Track(), tmp_path, RECIPE, score_rows)
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith("wandb")]
    with pytest.raises(UserError, match=r"track\.wandb: online needs an API key; run `wandb login`"):
        wandb_run.wandb_mode(Track(wandb="online"))
    netrc.write_text(f"machine api.wandb.ai\n login user\n password {KEY}\n")
    netrc.chmod(0o600)
    assert wandb_run.wandb_mode(Track()) == "off", "who is logged in has not asked for it"
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    assert wandb_run.wandb_mode(Track()) == "online"
    assert wandb_run.wandb_mode(Track(wandb="off")) == "off"
    monkeypatch.delenv("WANDB_PROJECT")
    monkeypatch.setenv("WANDB_MODE", "online")
    assert wandb_run.wandb_mode(Track()) == "online"
    for key in ("short", "local-" + KEY[:38], "local-" + KEY, "head.pay-load.sign_ed", KEY + "!"):
        monkeypatch.setenv("WANDB_API_KEY", key)
        if check_api_key(key) is None:
            assert wandb_run.wandb_mode(Track()) == "online"
            continue
        with pytest.raises(
            UserError, match=rf"track\.wandb: the API key is not one of W&B \(.* it has {len(key)} char"
        ):
            wandb_run.wandb_mode(Track(wandb="online"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_run.wandb_mode(Track()) == "offline"


def test_rows_tell_family_level_and_how_texts_went_wrong(tmp_path: Path) -> None:
    plain, *_, written = evaluation("pruned").tasks
    rates = {"malformed": 0.25, "repetition": 0.5, "cut_off": 0.0, "mean_tokens": 7.0}
    evaluation("pruned", (plain, replace(written, family="chain", level=3.0, rates=rates))).save(
        tmp_path / "eval" / "pruned.json"
    )
    first, last = score_rows(tmp_path)
    assert (first["family"], first["level"], first["malformed"]) == (None, None, None)
    assert {key: last[key] for key in rates} == rates
    assert (last["family"], last["level"]) == ("chain", 3.0)
