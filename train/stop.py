"""Stopping cleanly: on a scheduler's SIGTERM, and when the launcher that started the ranks is gone."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

import psutil

GRACE_S = 120
"""How long an orphaned rank may take to finish its step and save before it ends itself."""


class StopRequest:
    """Set by a signal or by the watchdog on any rank; all of them agree on it at the end of a step, with its sums."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def ask(self, reason: str) -> None:
        if self.reason is None:
            self.reason = reason

    def listen(self) -> None:
        """Take SIGTERM, and watch the launcher: a killed one leaves its ranks training as orphans that hold the run
        directory and the devices."""
        signal.signal(signal.SIGTERM, self._on_sigterm)
        launcher = _launcher_processes()
        if launcher:
            threading.Thread(target=self._watch, args=(launcher,), daemon=True).start()

    def _on_sigterm(self, _number: int, _frame: FrameType | None) -> None:
        self.ask("SIGTERM")

    def _watch(self, launcher: list[psutil.Process]) -> None:
        while all(_alive(process) for process in launcher):
            time.sleep(0.2)
        self.ask("the launcher is gone")
        time.sleep(GRACE_S)
        os._exit(1)  # stuck in a collective whose other side is gone


def _launcher_processes() -> list[psutil.Process]:
    """The chain of launcher processes above this one: `shoal run` starts `deepspeed`, which starts a second launcher,
    which starts the ranks."""
    if "LOCAL_RANK" not in os.environ:
        return []
    chain = []
    for process in psutil.Process().parents():
        if not _is_launcher(process.cmdline()):
            break
        chain.append(process)
    return chain


def _is_launcher(command: list[str]) -> bool:
    words = command[:5]
    if any(Path(word).name == "shoal" or word == "shoal.cli" for word in words):
        return True
    names = ("deepspeed", "torchrun", "torch.distributed", "accelerate")
    return any(name in word for word in words for name in names)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
