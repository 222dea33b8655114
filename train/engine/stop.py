"""Stopping cleanly: on Ctrl-C, on a scheduler's SIGTERM, and when the launcher that started the ranks is gone."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from shoal.stopping import die_of, on_stop


class StopRequest:
    """Set by a signal on any rank; all of them agree on it at the end of a step, with its sums."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.number: int = signal.SIGTERM
        """What the exit code is made of."""

    def ask(self, reason: str) -> None:
        if self.reason is None:
            self.reason = reason

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM while the block runs; a second SIGINT ends this process at once."""
        with on_stop(self._on_signal):
            yield

    def _on_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        if self.reason == name == "SIGINT":
            die_of(number)
        if self.reason is None:
            self.number = number
        self.ask(name)
