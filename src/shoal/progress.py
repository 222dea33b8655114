"""What takes long says so: tqdm's bar on a terminal, else lines in the log, at distances that grow with its length.

One mechanism for work that has steps to count (`progress`, `each`) and for work that has none (`doing`). A thread of
its own speaks for what is being done: one slow step is told of like many quick ones, and a step costs an addition, no
look at a clock and no wait for the device. Ranks that do not log (shoal.runtime) say nothing here either.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TextIO, TypeVar

from shoal.redaction import printable

log = logging.getLogger(__name__)

T = TypeVar("T")

DISTANCES_S = (4.0, 15.0, 60.0, 300.0)
"""Seconds before the first line about a piece of work, from that to the second, ...; the last one goes on."""
SILENCE_S = DISTANCES_S[0]
"""Seconds in which nothing was said by anybody before any of these lines."""
POLL_S = 0.5
"""Seconds between two looks of the thread; bars are drawn as often."""
BYTES = "bytes"
"""The unit that is told as a size."""


def _tqdm() -> Any:
    """The class of bars; its package takes a third of the time in which `shoal --help` answers."""
    from tqdm import tqdm

    return tqdm


class Work:
    """A piece of work while it is done. Calling it counts steps."""

    def __init__(self, label: str, total: int | None, unit: str, started: float) -> None:
        self.label, self.total, self.unit, self.started = label, total, unit, started
        self.done = self._known = self.lines = 0
        self.said = started
        """When its last line was said. Its own: a training would never speak that saves often."""
        self.note = ""
        """Text behind the counts, such as the loss."""
        self.bar: Any = None

    def __call__(self, count: int = 1) -> None:
        self.done += count

    def known(self, count: int) -> None:
        """Count steps that an earlier run did: they say nothing of the rate."""
        self.done += count
        self._known += count

    def told(self, now: float, *, finished: bool = False) -> str:
        """One line: how far it is, how fast it goes and how long it will take, or how long it took."""
        size = {"unit": "B", "unit_scale": True} if self.unit == BYTES else {"unit": f" {self.unit}"}
        ending = "{desc}: done in {elapsed}" if finished else "{desc}: {elapsed} so far"
        if self.unit:
            counts = "{n_fmt}{unit}" if self.total is None else "{n_fmt} of {total_fmt}{unit}"
            left = "" if finished or self.total is None else ", {rate_fmt}, {remaining} left"
            ending = f"{{desc}}: {counts}, {{elapsed}}{left}"
        about: dict[str, Any] = {"total": self.total, "initial": self._known, "postfix": self.note, **size}
        line = _tqdm().format_meter(
            self.done, elapsed=now - self.started, prefix=self.label, bar_format=ending + "{postfix}", **about
        )
        return line.replace(f"s/ {self.unit}", " s each") if self.unit else line

    def draw(self, stream: TextIO, now: float) -> None:
        """Show or renew the bar."""
        if self.bar is None:
            unit: dict[str, Any] = {"unit": f" {self.unit}"} if self.unit else {"bar_format": "{desc}: {elapsed}"}
            unit = {"unit": "B", "unit_scale": True} if self.unit == BYTES else unit
            self.bar = _tqdm()(total=self.total, desc=self.label, leave=False, file=stream, dynamic_ncols=True, **unit)
            self.bar.start_t -= now - self.started
        self.bar.initial, self.bar.n = self._known, self.done
        self.bar.set_postfix_str(self.note, refresh=False)
        self.bar.refresh()

    def clear(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class Speaker:
    """Says what is being done: of nested pieces of work the innermost in lines, all of them as bars."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, stream: TextIO | None = None) -> None:
        """``stream`` None = stderr as it is then. With another clock than the machine's no thread calls `tick`."""
        self._clock, self._stream = clock, stream
        self.reset()

    def reset(self) -> None:
        """Forget all work; a process that was forked off has none, and no thread."""
        self.works: list[Work] = []
        self.last_said = self._clock()
        self._lock = threading.RLock()
        self._others_speak: Callable[[], bool] = lambda: False
        self._thread: threading.Thread | None = None
        if sys.modules.get("tqdm"):  # whose own lock is shared with processes that may be killed while they hold it
            _tqdm().set_lock(threading.RLock())

    def heard(self) -> None:
        """Something was said, by whomever."""
        self.last_said = self._clock()

    @contextmanager
    def telling(self, label: str, total: int | None, unit: str) -> Iterator[Work]:
        """Speak of this piece of work while it is done; once it took long, also of its end."""
        work = Work(printable(label), total, unit, self._clock())
        if not log.isEnabledFor(logging.INFO):
            yield work
            return
        with self._lock:
            self.works.append(work)
        if self._clock is time.monotonic and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
            self._thread.start()
        finished = False
        try:
            yield work
            finished = True
        finally:
            with self._lock:
                self.works.remove(work)
                work.clear()
                if finished and self._clock() - work.started >= DISTANCES_S[0]:
                    self._say(work, finished=True)

    @contextmanager
    def still(self, when: Callable[[], bool]) -> Iterator[None]:
        """Say nothing from when ``when`` is true: another process speaks."""
        self._others_speak = when
        try:
            yield
        finally:
            self._others_speak = lambda: False

    def tick(self) -> None:
        """Draw the bars, or say a line if it is time for one."""
        with self._lock:
            stream, now = self._stream or sys.stderr, self._clock()
            if self._others_speak():
                for work in self.works:
                    work.clear()
            elif stream.isatty() and os.environ.get("TERM", "dumb") != "dumb":
                for work in self.works:
                    work.draw(stream, now)
            elif self.works:
                work = self.works[-1]
                is_due = now - work.said >= DISTANCES_S[min(work.lines, len(DISTANCES_S) - 1)]
                if is_due and now - self.last_said >= SILENCE_S:
                    work.lines, work.said = work.lines + 1, now
                    self._say(work)

    def _say(self, work: Work, *, finished: bool = False) -> None:
        log.info("%s", work.told(self._clock(), finished=finished))
        self.heard()

    def _run(self) -> None:
        while True:
            time.sleep(POLL_S)
            self.tick()


SPEAKER = Speaker()
# nothing is half said while a process forks: the locks that the thread holds then, the fork would hold for ever
os.register_at_fork(
    before=lambda: SPEAKER._lock.acquire(),
    after_in_parent=lambda: SPEAKER._lock.release(),
    after_in_child=SPEAKER.reset,
)


class Lines(logging.StreamHandler[TextIO]):
    """The log on a stream: above bars, where some are drawn, and known to the speaker, who then keeps still."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        SPEAKER.heard()
        if not any(work.bar for work in SPEAKER.works):
            super().emit(record)
            return
        with _tqdm().external_write_mode(file=self.stream):
            super().emit(record)


def progress(label: str, *, total: int | None = None, unit: str) -> AbstractContextManager[Work]:
    """Tell how far the work ``label`` is while it is done; calling what this gives counts steps.

    ``unit`` is a plural ("rows") or BYTES; ``total`` None = not known.
    """
    return SPEAKER.telling(label, total, unit)


def each(items: Iterable[T], label: str, *, unit: str, total: int | None = None) -> Iterator[T]:
    """The items one after the other, while it is told how many of them are done; ``total`` where they have no len."""
    with progress(label, total=len(items) if isinstance(items, Sized) else total, unit=unit) as step:
        for item in items:
            yield item
            step()


@contextmanager
def loading() -> Iterator[None]:
    """The imports of the block take seconds, and what they load is turned down."""
    with doing("loading the libraries"):
        from shoal.runtime import turn_down_libraries

        turn_down_libraries()
        yield


def doing(label: str) -> AbstractContextManager[Work]:
    """Tell that ``label`` is being done, where there are no steps to count."""
    return SPEAKER.telling(label, None, "")
