"""What takes long says so, with rate and time left: a bar on a terminal, in a file lines that become fewer."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from shoal import progress as module
from shoal.progress import BYTES, POLL_S, Lines, Speaker, Work, doing, progress
from shoal.train.callbacks import Progress


class Clock:
    """A clock that stands until it is moved, and lets the speaker look as often as its thread would."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def run(self, speaker: Speaker, seconds: float) -> None:
        for _ in range(round(seconds / POLL_S)):
            self.now += POLL_S
            speaker.tick()


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _a_terminal_that_can_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def speaker(clock: Clock, caplog: pytest.LogCaptureFixture) -> Iterator[Speaker]:
    with caplog.at_level("INFO"):
        yield Speaker(clock=clock, stream=io.StringIO())


@pytest.mark.parametrize("term", ["dumb", None])
def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch, clock, caplog, term):
    if term is None:
        monkeypatch.delenv("TERM")
    else:
        monkeypatch.setenv("TERM", term)
    stream = Terminal()
    with caplog.at_level("INFO"):
        speaker = Speaker(clock=clock, stream=stream)
        with speaker.telling("measure", 100, "rows"):
            clock.run(speaker, 4.5)
    assert caplog.messages == ["measure: 0 of 100 rows, 00:04, ? rows/s, ? left", "measure: 0 of 100 rows, 00:04"]
    assert stream.getvalue() == ""
    monkeypatch.setenv("TERM", "xterm")
    with caplog.at_level("INFO"), speaker.telling("measure", 100, "rows"):
        clock.run(speaker, 4.5)
    assert "measure" in stream.getvalue()


def test_lines_stand_at_growing_distances_so_that_ten_hours_can_be_read(speaker, clock, monkeypatch):
    times: list[float] = []
    monkeypatch.setattr(module.log, "info", lambda *_: times.append(clock.now - 1000))
    with speaker.telling("training", 100, "steps"):
        clock.run(speaker, 36_000)
    assert times[:5] == [4, 19, 79, 379, 679]
    assert times[-1] == 36_000, "its end"
    assert len(times) < 125


def test_of_nested_work_the_innermost_is_told(speaker, clock, caplog):
    with speaker.telling("search\x1b", 3, "plans"):
        with speaker.telling("measure", 10, "rows"):
            clock.run(speaker, 4.0)
        clock.run(speaker, 4.0)
    assert [line.split(":")[0] for line in caplog.messages] == ["measure", "measure", r"search\x1b", r"search\x1b"]


def test_a_training_that_saves_every_minute_is_told_of_and_not_its_saving(speaker, clock, caplog):
    with speaker.telling("training", 1200, "steps") as step:
        for _ in range(20):
            clock.run(speaker, 58)
            step(60)
            with speaker.telling("saving", None, ""):
                clock.run(speaker, 2)
    assert {message.split(":")[0] for message in caplog.messages} == {"training"}
    assert len(caplog.messages) == 7, "after 4 s, 19 s, 79 s, then every five minutes, and at the end"


def test_a_failure_leaves_nothing_behind_that_would_go_on_talking(speaker, clock, caplog):
    with contextlib.suppress(ValueError), speaker.telling("measure", 10, "rows"):
        clock.run(speaker, 4.0)
        raise ValueError
    told = len(caplog.messages)
    clock.run(speaker, 20.0)
    assert told == len(caplog.messages) == 1


def test_a_terminal_gets_a_bar_and_lines_stand_above_it(clock, caplog, monkeypatch):
    terminal = Terminal()
    speaker = Speaker(clock=clock, stream=terminal)
    monkeypatch.setattr(module, "SPEAKER", speaker)
    handler = Lines(terminal)
    with caplog.at_level("INFO"), speaker.telling("measure", 10, "rows") as step:
        step(5)
        step.note = "loss 1.5"
        clock.run(speaker, 5.0)
        assert not caplog.messages
        shown = terminal.getvalue().split("\r")[-1]
        assert shown.startswith("measure:  50%|")
        assert "5/10" in shown
        assert "loss 1.5" in shown
        handler.emit(logging.makeLogRecord({"msg": "a line"}))
        *_, cleared, line = terminal.getvalue().split("\r")[:-1]
        assert (cleared.strip(), line) == ("", "a line\n")
    assert caplog.messages == ["measure: 5 of 10 rows, 00:05, loss 1.5"]


SLOW = """
import sys, time
from shoal import ranks
from shoal.progress import doing
ranks.set_up_logging()
with doing("waiting"):
    time.sleep(5)
"""


@pytest.mark.slow
def test_a_thread_of_its_own_speaks_while_the_work_cannot() -> None:
    told = subprocess.run([sys.executable, "-c", SLOW], capture_output=True, text=True, check=True).stderr
    assert re.search(r"waiting: 00:0[345] so far", told)


def test_a_forked_process_speaks_of_its_own_work_alone(caplog):
    with caplog.at_level("INFO"), progress("outer", unit="rows"):
        pid = os.fork()
        if pid == 0:
            with doing("inner"):
                os._exit(len(module.SPEAKER.works))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def test_training_tells_loss_and_rate_and_the_time_left_by_the_clock(
    speaker, clock, caplog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SPEAKER", speaker)
    state: Any = SimpleNamespace(global_step=2, max_steps=6)  # it goes on from step 2
    with Progress(tokens_per_step=140) as line:
        clock.run(speaker, 4.0)
        assert caplog.messages == ["setting up DeepSpeed: 00:04 so far"]
        line.on_train_begin(None, state, None)
        state.global_step = 4
        line.on_step_end(None, state, None)
        line.on_log(None, state, None, {"loss": 1.5, "seconds": 8.0})  # scoring and saving took the rest
        clock.run(speaker, 100.0)
        assert (
            caplog.messages[-1] == "training: 4 of 6 steps, 01:19, 39.50 s each, 01:19 left, loss 1.5000, 70 tokens/s"
        )
        state.global_step = 6
        line.on_step_end(None, state, None)
        line.on_log(None, state, None, {"loss": 1.5, "seconds": 12.0, "mfu": 0.25})  # on a GPU with a data sheet
    assert caplog.messages[-1] == "training: 6 of 6 steps, 01:40, loss 1.5000, 70 tokens/s, MFU 25%"
    clock.run(speaker, 100.0)
    assert caplog.messages[-1] == "training: 6 of 6 steps, 01:40, loss 1.5000, 70 tokens/s, MFU 25%"


@pytest.mark.parametrize(
    ("total", "unit", "known", "done", "line"),
    [
        (100, "rows", 0, 8, "work: 8 of 100 rows, 00:04,  2.00 rows/s, 00:46 left"),
        (100, "rows", 60, 8, "work: 68 of 100 rows, 00:04,  2.00 rows/s, 00:16 left"),
        (16_000_000_000, BYTES, 0, 4_000_000_000, "work: 4.00G of 16.0GB, 00:04, 1.00GB/s, 00:12 left"),
        (None, "documents", 0, 12_000, "work: 12000 documents, 00:04"),
        (None, "", 0, 0, "work: 00:04 so far"),
    ],
)
def test_a_line_tells_rate_and_time_left(total: int | None, unit: str, known: int, done: int, line: str) -> None:
    work = Work("work", total, unit, 0.0)
    work.known(known)
    work(done)
    assert work.told(4.0) == line
