"""How a training ends before its time: asked to, on Ctrl-C, on a scheduler's SIGTERM or when the launcher that started
the ranks is gone, and because a rank keeps the others waiting.

A collective that times out says on whom it waited in nobody's words, and under NCCL ends the process without an
exception. So every rank keeps a small file in the run directory, which all nodes share, and a thread beside training
ends a rank that has waited for too long, once it has said for whom: every rank shows that it lives and how far it is,
and the others look there when they wait.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from shoal.ranks import rank, world_size
from shoal.stopping import LAUNCHED_BY, die_of, on_stop

log = logging.getLogger(__name__)

FOLDER = ".ranks"
PATIENCE = 0.9
"""Share of the timeout after which the late rank is named; the collective itself would end the job a little later."""
HEAD_START_S = 3.0
"""What the other waiting ranks leave the one that speaks for all of them, before the launcher ends it with the job."""


class StopRequest:
    """Set by a signal on any rank; all of them agree on it at the end of a step, with its sums."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.number: int = signal.SIGTERM
        """What the exit code is made of."""

    def ask(self, reason: str) -> None:
        if self.reason is None:
            self.reason = reason

    def listening(self) -> contextlib.AbstractContextManager[None]:
        """Take SIGINT and SIGTERM while the block runs; a second SIGINT ends this process at once."""
        return on_stop(self._on_signal)

    def _on_signal(self, number: int) -> None:
        # what has started this rank says SIGTERM on Ctrl-C too
        name = "as asked" if LAUNCHED_BY in os.environ else signal.Signals(number).name
        if self.reason == name == "SIGINT":
            die_of(number)
        if self.reason is None:
            self.number = number
        self.ask(name)


class Heartbeat(TrainerCallback):
    """Writes RUN_DIR/.ranks/<rank>.json while it runs, and ends this process when another rank keeps it waiting.

    Liveness and progress are told apart: a stopped process or a lost node does neither, a rank that hangs in reading
    data or writing a file lives on without getting further. Only changes of the others' files are looked at, never
    their times, because nodes have clocks of their own.
    """

    def __init__(self, run_dir: Path, *, timeout_s: float) -> None:
        self._folder = run_dir / FOLDER
        self._patience_s = PATIENCE * timeout_s
        self._interval_s = min(5.0, timeout_s / 20)
        self._progress = 0
        self._moved = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def start(self) -> None:
        """Begin to beat; a world of one has nobody to wait for."""
        if world_size() > 1:
            self._thread.start()

    def stop(self) -> None:
        """Leave no file behind."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
            self._file(rank()).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another rank's file is still there
                self._folder.rmdir()

    def moved(self, *_: Any, **__: Any) -> None:
        """This rank got further."""
        self._progress += 1
        self._moved = time.monotonic()

    on_step_begin = on_substep_end = on_step_end = on_save = moved

    def _file(self, of_rank: int) -> Path:
        return self._folder / f"{of_rank}.json"

    def _beat(self) -> None:
        beat = 0
        before: dict[int, dict[str, Any]] | None = None  # what the others said when this rank last looked
        looked = self._moved
        while not self._ended.wait(self._interval_s):
            beat += 1
            self._show(beat)
            waited_s = time.monotonic() - self._moved
            if waited_s < self._patience_s / 2:
                before = None
            elif before is None or time.monotonic() - looked > self._patience_s / 2:
                with contextlib.suppress(OSError, ValueError):  # a file that its rank replaces now, on a shared disk
                    now = read_signs(self._folder)
                    late = late_ranks(before, now) if before is not None and waited_s > self._patience_s else {}
                    if late and rank() not in late:
                        self._end(late, waited_s)
                    before, looked = now, time.monotonic()  # again and again: a rank may be lost late in a long wait

    def _show(self, beat: int) -> None:
        """Written whole, but not forced to the disk: that could stall for longer than a beat while a checkpoint is."""
        sign = {"beat": beat, "progress": self._progress, "host": socket.gethostname(), "pid": os.getpid()}
        file = self._file(rank())
        temporary = file.with_suffix(".tmp")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(sign))
            temporary.replace(file)
        except OSError as error:
            log.debug("no heartbeat this time: %s", error)  # a full disk ends the job where it costs something

    def _end(self, late: dict[int, str], waited_s: float) -> None:
        if rank() == min(set(range(world_size())) - set(late)):
            for number, reason in late.items():
                log.error(
                    "no rank made progress for %.0f s: rank %d %s. Stopping; the same command resumes from what is "
                    "saved (distill.trainer.ddp_timeout sets this limit)",
                    waited_s,
                    number,
                    reason,
                )
        else:
            time.sleep(HEAD_START_S)
        os._exit(1)  # the main thread is stuck in a collective that nothing interrupts


def read_signs(folder: Path) -> dict[int, dict[str, Any]]:
    """What every rank has last said about itself; an empty mapping for one that has said nothing."""
    files = {number: folder / f"{number}.json" for number in range(world_size())}
    return {number: json.loads(file.read_bytes()) if file.is_file() else {} for number, file in files.items()}


def late_ranks(before: dict[int, dict[str, Any]], now: dict[int, dict[str, Any]]) -> dict[int, str]:
    """The ranks for whom the others wait, and what is known of each; none where all live and are equally far."""
    silent = {
        number: f"({_place(sign)}) does not respond: its process is stopped, or its node is down"
        for number, sign in now.items()
        if sign.get("beat") == before[number].get("beat")
    }
    if silent:
        return silent
    furthest = max(sign.get("progress", 0) for sign in now.values())
    return {
        number: f"({_place(sign)}) responds, but is later than the others: it may hang in reading or writing a file"
        for number, sign in now.items()
        if sign.get("progress", furthest) < furthest  # who has no sign any more has ended
    }


def _place(sign: dict[str, Any]) -> str:
    return f"host {sign['host']}, process {sign['pid']}" if sign else "never seen"
