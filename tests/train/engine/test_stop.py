"""The late rank is the one that gives no sign of life, else the one that is behind."""

import json
import time

import pytest

from shoal.train.engine.stop import FOLDER, Heartbeat, late_ranks


def sign(beat, progress, pid=1):
    return {"beat": beat, "progress": progress, "host": "node-a", "pid": pid}


def test_a_silent_rank_is_late_whatever_its_progress():
    before = {0: sign(5, 7), 1: sign(5, 7, pid=42), 2: sign(5, 3)}
    now = {0: sign(9, 7), 1: sign(5, 7, pid=42), 2: sign(9, 3)}
    assert late_ranks(before, now) == {
        1: "(host node-a, process 42) gives no sign of life: it is stopped, or its node is gone"
    }


def test_a_rank_that_lives_without_getting_further_is_late():
    before = {0: sign(5, 7), 1: sign(5, 6)}
    assert list(late_ranks(before, {0: sign(9, 7), 1: sign(9, 6)})) == [1]


def test_nobody_is_late_where_all_live_and_are_equally_far():
    before = {0: sign(5, 7), 1: sign(5, 7)}
    assert late_ranks(before, {0: sign(9, 7), 1: sign(9, 7)}) == {}


@pytest.mark.parametrize("other", ["silent", "alive"])
def test_a_waiting_rank_ends_itself_only_for_a_late_one(tmp_path, monkeypatch, caplog, other):
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended = []
    monkeypatch.setattr("shoal.train.engine.stop.os._exit", ended.append)
    heartbeat = Heartbeat(tmp_path, timeout_s=0.4)
    (tmp_path / FOLDER).mkdir()
    heartbeat.start()
    deadline = time.monotonic() + 1.5
    beat = 0
    while time.monotonic() < deadline and not ended:
        beat += 1
        whole = tmp_path / "sign"
        whole.write_text(json.dumps(sign(1 if other == "silent" else beat, 0, pid=77)))
        whole.replace(tmp_path / FOLDER / "1.json")
        time.sleep(0.005)
    heartbeat.stop()
    if other == "silent":
        assert ended[0] == 1
        assert "rank 1 (host node-a, process 77) gives no sign of life" in caplog.text
        assert "the same command goes on from the last checkpoint" in caplog.text
    else:
        assert not ended
        assert not (tmp_path / FOLDER / "0.json").exists()
