"""What a received run directory can do: nothing that its reader has not asked for."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import yaml

from shoal import trust
from shoal.errors import UserError
from shoal.launch.cli import run_verb
from shoal.trust import CONSENT, is_signed, is_trusted, refuse_links, signed


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder without a key."""
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(CONSENT, raising=False)
    trust._key_at.cache_clear()
    return tmp_path / "cache"


def test_what_was_signed_is_known_again_and_nothing_else(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = {"b": (1, 2), "a": {"x": 0.1, "y": None}}
    made = signed(document)
    assert is_signed(made)
    assert is_signed({"signature": made["signature"], "a": {"y": None, "x": 0.1}, "b": [1, 2]})
    assert not is_signed({**made, "b": [1, 3]})
    assert not is_signed({**made, "more": 1})
    assert not is_signed(document)
    assert not is_signed({**made, "signature": 5})
    (key,) = own_cache.iterdir()
    assert key.stat().st_mode & 0o777 == 0o600
    trust._key_at.cache_clear()
    assert is_signed(made), "the key is kept"
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "other"))
    assert not is_signed(made), "another user's key"


def test_a_key_that_cannot_be_had_is_said_and_nothing_is_signed(
    own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own_cache.mkdir()
    elsewhere = own_cache / "elsewhere"
    elsewhere.write_bytes(b"k" * trust.KEY_BYTES)
    (own_cache / f"checkpoint-key-{os.geteuid()}").symlink_to(elsewhere)
    with caplog.at_level(logging.WARNING):
        assert not is_signed(signed({"a": 1}))
        assert "signature" not in signed({"a": 1})
    (warning,) = caplog.messages
    assert "checkpoints and recipe.yaml are written without a signature" in warning


def test_a_run_is_trusted_where_it_or_a_folder_above_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not is_trusted(tmp_path)
    monkeypatch.setenv(CONSENT, f"/nowhere:{tmp_path}/runs")
    assert is_trusted(tmp_path / "runs" / "x" / "search" / "y")
    assert not is_trusted(tmp_path / "runs-of-others")


def lead_out(run: Path, outside: Path) -> None:
    (run / "deep" / "eval").symlink_to(outside)


def lead_to_a_file(run: Path, outside: Path) -> None:
    (run / "items.jsonl").symlink_to(outside / "precious")


def lead_nowhere(run: Path, outside: Path) -> None:
    (run / "log").symlink_to(outside / "not there")


def put_a_fifo(run: Path, outside: Path) -> None:
    os.mkfifo(run / "plan.json")


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (lead_out, r"deep/eval: is a link that leads out of the run directory, to .*outside, .* SHOAL_TRUSTED_RUNS="),
        (lead_to_a_file, r"items.jsonl: is a link that leads out .*outside/precious, where"),
        (lead_nowhere, r"log: is a link that leads out"),
        (put_a_fifo, r"plan.json: is neither file nor folder; remove it"),
    ],
)
def test_what_leads_out_of_a_run_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant, message: str
) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    (run / "deep").mkdir(parents=True)
    outside.mkdir()
    (run / "inside").symlink_to("deep")
    (tmp_path / "way").symlink_to(run)
    refuse_links(run)
    refuse_links(tmp_path / "way")
    refuse_links(tmp_path / "not there")
    plant(run, outside)
    with pytest.raises(UserError, match=message):
        refuse_links(run)
    monkeypatch.setenv(CONSENT, str(run))
    refuse_links(run)


@pytest.mark.parametrize("verb", ["measure", "prune", "eval", "report", "distill", "run"])
@pytest.mark.parametrize("name", [".lock", "eval", "wandb_run_id"])
def test_no_verb_writes_through_a_link_in_the_run_directory(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, name: str
) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(precious)
    settings = {"model": str(teacher), "run_dir": f"{tmp_path}/run", "prune": {"drop": [1]}, "track": {"wandb": "off"}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(settings))
    assert run_verb(verb, str(tmp_path / "r.yaml"), []) == 2
    assert f"run/{name}: is a link that leads out" in capsys.readouterr().err
    assert precious.read_text() == "precious"
    assert [file.name for file in (tmp_path / "run").iterdir()] == [name]
