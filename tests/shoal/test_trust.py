"""What a received run directory can do: nothing that its reader has not asked for."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from shoal import trust
from shoal.trust import CONSENT, is_signed, is_trusted, signed


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
    assert "nothing is signed" in warning


def test_a_run_is_trusted_where_it_or_a_folder_above_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not is_trusted(tmp_path)
    monkeypatch.setenv(CONSENT, f"/nowhere:{tmp_path}/runs")
    assert is_trusted(tmp_path / "runs" / "x" / "search" / "y")
    assert not is_trusted(tmp_path / "runs-of-others")
