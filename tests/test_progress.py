"""The log's line of a step: one rate with the report, and the time that is left by the clock."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from shoal.train import progress
from shoal.train.progress import Progress


def test_the_rate_leaves_out_what_the_report_leaves_out_and_the_time_left_does_not(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter((0.0, 0.0, 100.0, 1000.0, 1000.0, 1060.0))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    state = SimpleNamespace(global_step=0, max_steps=4)
    line = Progress(tokens_per_step=140)
    line.on_train_begin(None, state, None)
    state.global_step = 2
    with caplog.at_level("INFO"):
        line.on_log(None, state, None, {"loss": 1.5, "seconds": 4.0})  # of 100, the rest was for scoring and saving
    assert caplog.messages == ["step 2/4  loss 1.5000  70 tokens/s  1:40 left"]
    again = Progress(tokens_per_step=140)
    again.on_train_begin(None, state, None)
    state.global_step = 3
    with caplog.at_level("INFO"):
        again.on_log(None, state, None, {"loss": 1.5, "seconds": 6.0})  # those before it was stopped are among them
    assert caplog.messages[1:] == ["step 3/4  loss 1.5000  70 tokens/s  1:00 left"]
