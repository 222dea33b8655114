"""The late rank is the one that does not respond, else the one that is behind."""

import json
import time

import pytest
from ranks import as_rank

from shoal.train.engine.stop import FOLDER, Heartbeat, late_ranks


def sign(beat, progress, pid=1):
    return {"beat": beat, "progress": progress, "host": "node-a", "pid": pid}


@pytest.mark.parametrize(
    ("before", "now", "late"),
    [
        ([(5, 7), (5, 7, 42), (5, 3)], [(9, 7), (5, 7, 42), (9, 3)], {1: "process 42) does not respond"}),
        ([(5, 7), (5, 6)], [(9, 7), (9, 6)], {1: "responds, but is later than the others"}),
        ([(5, 7), (5, 7)], [(9, 7), (9, 7)], {}),
        ([(5, 7), (5, 7)], [(9, 8), {}], {}),  # who has ended shows no sign any more
    ],
    ids=["silent, whatever its progress", "alive and behind", "all alive and equally far", "ended"],
)
def test_a_rank_is_late_that_is_silent_or_else_behind(before, now, late):
    found = late_ranks(*({rank: one and sign(*one) for rank, one in enumerate(signs)} for signs in (before, now)))
    assert found.keys() == late.keys()
    assert all(words in found[rank] for rank, words in late.items())


@pytest.mark.parametrize(("other", "lives_s"), [("silent", 0), ("lost late in a long wait", 1), ("alive", 9)])
def test_a_waiting_rank_ends_itself_only_for_a_late_one(tmp_path, monkeypatch, caplog, other, lives_s):
    for name, value in as_rank(0, 2).items():
        monkeypatch.setenv(name, value)
    ended = []
    monkeypatch.setattr("shoal.train.engine.stop.os._exit", ended.append)
    heartbeat = Heartbeat(tmp_path, timeout_s=0.4)
    (tmp_path / FOLDER).mkdir()
    heartbeat.start()
    begun = time.monotonic()
    beat = 1
    while time.monotonic() < begun + 2.5 and not ended:
        beat += time.monotonic() < begun + lives_s
        whole = tmp_path / "sign"
        whole.write_text(json.dumps(sign(beat, 0, pid=77)))
        whole.replace(tmp_path / FOLDER / "1.json")
        time.sleep(0.005)
    heartbeat.stop()
    if other != "alive":
        assert ended[0] == 1
        assert "rank 1 (host node-a, process 77) does not respond" in caplog.text
        assert "the same command resumes from what is saved" in caplog.text
    else:
        assert not ended
        assert not (tmp_path / FOLDER / "0.json").exists()
