"""What takes long says so: a bar on a terminal, else a line in the log before 5 s have passed in silence.

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
from functools import partial
from typing import Any, TextIO, TypeVar

from shoal.formatting import bytes_text, clock_text

log = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_S = 4.0
"""Seconds of silence after which a line says what is being done."""
SHARE = 1 / 75
"""Silence as a share of the time that the work has taken: long work is told less often."""
LONGEST_S = 60.0
POLL_S = 0.5
"""Seconds between two looks of the thread; bars are drawn as often."""
BYTES = "bytes"
"""The unit that is told as a size."""


def draws(stream: TextIO) -> bool:
    """Whether bars can be drawn there: a terminal that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


class Work:
    """A piece of work while it is done. Calling it counts steps."""

    def __init__(self, label: str, total: int | None, unit: str, started: float) -> None:
        self.label, self.total, self.unit, self.started = label, total, unit, started
        self.done = 0
        self.note = ""
        """Text behind the counts, such as the loss."""
        self._known = 0

    def __call__(self, count: int = 1) -> None:
        self.done += count

    def known(self, count: int) -> None:
        """Count steps that an earlier run did: they say nothing of the rate."""
        self.done += count
        self._known += count

    def told(self, now: float, *, finished: bool = False) -> str:
        """One line: how far it is, how fast it goes and how long it will take, or how long it took."""
        seconds, new = now - self.started, self.done - self._known
        if not self.unit:
            parts = [f"done in {clock_text(seconds)}" if finished else f"{clock_text(seconds)} so far"]
        else:
            unit = "" if self.unit == BYTES else f" {self.unit}"
            total = "" if self.total is None else f" of {self._amount(self.total)}"
            parts = [f"{self._amount(self.done)}{total}{unit}"]
            if finished:
                parts[0] += f" in {clock_text(seconds)}"
            elif new and seconds > 0:
                parts.append(self._rate(new / seconds))
                if self.total is not None:
                    parts.append(f"{clock_text((self.total - self.done) * seconds / new)} left")
            else:
                parts.append(f"{clock_text(seconds)} so far")
        return f"{self.label}: {', '.join([*parts, *filter(None, [self.note])])}"

    def _rate(self, per_s: float) -> str:
        if self.unit == BYTES:
            return f"{bytes_text(per_s)}/s"
        return f"{per_s:.3g} {self.unit}/s" if per_s >= 1 else f"{1 / per_s:.3g} s each"

    def _amount(self, count: int) -> str:
        return bytes_text(count) if self.unit == BYTES else f"{count:,}"


class Speaker:
    """Says what is being done: of nested pieces of work the innermost in lines, all of them as bars."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, stream: TextIO | None = None) -> None:
        """``stream`` None = stderr as it is then. With another clock than the machine's no thread calls `tick`."""
        self._clock, self._stream = clock, stream
        self._reset()

    def _reset(self) -> None:
        self._works: list[Work] = []
        self._bars: dict[Work, Any] = {}
        self._last_said = self._clock()
        self._lock = threading.RLock()
        self._waiting = threading.Event()
        self._others_speak: Callable[[], bool] = lambda: False
        self._thread: threading.Thread | None = None
        self._restore_others: Callable[[], Any] | None = None

    @property
    def draws_bars(self) -> bool:
        return bool(self._bars)

    def heard(self) -> None:
        """Something was said, by whomever."""
        self._last_said = self._clock()

    @contextmanager
    def telling(self, label: str, total: int | None, unit: str) -> Iterator[Work]:
        """Speak of this piece of work while it is done; once it took long, also of its end."""
        work = Work(label, total, unit, self._clock())
        if not log.isEnabledFor(logging.INFO):
            yield work
            return
        with self._lock:
            self._works.append(work)
            self._hide_others()
        self._start()
        finished = False
        try:
            yield work
            finished = True
        finally:
            with self._lock:
                self._works.remove(work)
                if not self._works and self._restore_others is not None:
                    self._restore_others()
                    self._restore_others = None
                if (bar := self._bars.pop(work, None)) is not None:
                    bar.close()
                if finished and self._clock() - work.started >= FIRST_S:
                    self._say(work, finished=True)

    def _hide_others(self) -> None:
        """Until all work is done, no bar of transformers, such as that of weights it loads: it would run into ours."""
        library: Any = sys.modules.get("transformers.utils.logging")
        if library is not None and self._restore_others is None:
            before = library.set_tqdm_hook(lambda _, args, kwargs: library.EmptyTqdm(*args, **kwargs))
            self._restore_others = partial(library.set_tqdm_hook, before)

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
            if self._others_speak():
                for bar in self._bars.values():
                    bar.close()
                self._bars.clear()
                return
            if not self._works:
                return
            stream, now = self._stream or sys.stderr, self._clock()
            if draws(stream):
                for work in self._works:
                    self._draw(work, stream, now)
                return
            work = self._works[-1]
            if now - self._last_said >= max(FIRST_S, min(LONGEST_S, SHARE * (now - work.started))):
                self._say(work)

    def _say(self, work: Work, *, finished: bool = False) -> None:
        log.info("%s", work.told(self._clock(), finished=finished))
        self.heard()

    def _draw(self, work: Work, stream: TextIO, now: float) -> None:
        from tqdm import tqdm  # takes time to import, and only a terminal needs it

        bar = self._bars.get(work)
        if bar is None:
            unit: dict[str, Any] = {"unit": f" {work.unit}"}
            if not work.unit:
                unit = {"bar_format": "{desc}: {elapsed}{postfix}"}
            elif work.unit == BYTES:
                unit = {"unit": "B", "unit_scale": True}
            bar = tqdm(total=work.total, desc=work.label, leave=False, file=stream, dynamic_ncols=True, **unit)
            bar.start_t -= now - work.started
            self._bars[work] = bar
        bar.initial, bar.n = work._known, work.done
        bar.set_postfix_str(work.note, refresh=False)
        bar.refresh()

    def _start(self) -> None:
        """Have a thread that ticks while there is work; a process that was forked off has none yet."""
        self._waiting.set()
        if self._clock is time.monotonic and (self._thread is None or not self._thread.is_alive()):
            self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            self._waiting.wait()
            time.sleep(POLL_S)
            with self._lock:
                if not self._works:
                    self._waiting.clear()
            self.tick()


SPEAKER = Speaker()
os.register_at_fork(after_in_child=SPEAKER._reset)


class Lines(logging.StreamHandler[TextIO]):
    """The log on a stream: above bars, where some are drawn, and known to the speaker, who then keeps still."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        SPEAKER.heard()
        if not SPEAKER.draws_bars:
            super().emit(record)
            return
        from tqdm import tqdm

        with tqdm.external_write_mode(file=self.stream):
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


def doing(label: str) -> AbstractContextManager[Work]:
    """Tell that ``label`` is being done, where there are no steps to count."""
    return SPEAKER.telling(label, None, "")
