"""Whether somebody is logged in to W&B here, told as W&B's own client tells it."""

from __future__ import annotations

from pathlib import Path

import pytest
from wandb.sdk.lib.wbauth import read_netrc_auth
from wandb.sdk.wandb_settings import Settings

from shoal.recipe.track import Track
from shoal.tracking import login
from shoal.tracking.wandb_run import wandb_mode

KEY = "0123456789" * 4


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without anything of W&B, which is the current folder too."""
    for name in ("API_KEY", "IDENTITY_TOKEN_FILE", "BASE_URL", "MODE", "CONFIG_DIR", "DIR"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_nobody_is_logged_in_at_first() -> None:
    assert not login.has_key()
    assert wandb_mode(Track()) == "off"


@pytest.mark.parametrize(
    ("netrc", "is_logged_in"),
    [
        (f"machine api.wandb.ai login user password {KEY}", True),
        (f"machine wandb.example login user password {KEY}", False),
        (f"default login user password {KEY}", True),
        ("machine api.wandb.ai login user", False),
        (f"machine api.wandb.ai logn user password {KEY}", False),
    ],
)
@pytest.mark.parametrize("name", [".netrc", "_netrc"])
def test_the_file_of_wandb_login(home: Path, name: str, netrc: str, is_logged_in: bool) -> None:
    write(home / name, netrc)
    (home / name).chmod(0o600)
    assert login.has_key() == is_logged_in == (read_netrc_auth(host=login.CLOUD) is not None)
    assert wandb_mode(Track()) == ("online" if is_logged_in else "off")


def test_the_key_is_that_of_the_server_in_use(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(home / ".netrc", f"machine wandb.example login user password {KEY}")
    (home / ".netrc").chmod(0o600)
    assert not login.has_key()
    write(home / ".config/wandb/settings", "[default]\nbase_url = https://wandb.example\n")
    assert login.has_key()
    monkeypatch.setenv("WANDB_BASE_URL", login.CLOUD)
    assert not login.has_key()


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"])
def test_the_environment(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, KEY)
    assert login.has_key()


@pytest.mark.parametrize("place", [".config/wandb/settings", "wandb/settings"])
def test_settings_hold_a_key_or_a_mode_where_wandb_reads_them(home: Path, place: str) -> None:
    write(home / place, f"[default]\napi_key = {KEY}\nmode = offline\n")
    settings = Settings()
    settings.settings_system = str(home / ".config/wandb/settings")
    settings.update_from_system_settings()
    assert (settings.api_key, settings.mode) == (KEY, "offline")
    assert login.has_key()
    assert login.wanted_mode() == "offline"
    assert wandb_mode(Track()) == "offline"
    assert wandb_mode(Track(wandb="online")) == "online", "what the recipe asks for goes first"


@pytest.mark.parametrize(("asked", "mode"), [("offline", "offline"), ("disabled", "off"), ("online", "online")])
def test_a_mode_of_the_environment_goes_before_the_key(monkeypatch: pytest.MonkeyPatch, asked: str, mode: str) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", asked)
    assert wandb_mode(Track()) == mode


def test_files_that_wandb_could_not_read_log_nobody_in(home: Path) -> None:
    write(home / ".config/wandb/settings", "no section")
    (home / ".netrc").mkdir()
    assert not login.has_key()
    assert login.wanted_mode() is None
