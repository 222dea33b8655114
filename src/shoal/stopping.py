"""Ctrl-C and SIGTERM in every stage, and the end of all processes that were started.

Python's own KeyboardInterrupt is not used: it is lost where it arrives in a destructor, and prints the tracebacks of
whatever it interrupts.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from shoal import ranks

STOPS = (signal.SIGINT, signal.SIGTERM)
LAUNCHED_BY = "SHOAL_LAUNCHED_BY"
"""Variable of a launched process: the process number of the `shoal` that started the launcher."""
ORPHAN_S = 8
"""Seconds that a rank without its launcher has before it is ended, unless it needs more (`needs`)."""
SAVE_S = 1800
"""Seconds that ranks may take for that when they are asked to stop: two checkpoints of 100 GB on a slow disk."""
QUIET_S = 5
"""Seconds after which a message says that they are waited for."""


class Stopped(Exception):
    """Training was asked to stop by the signal ``number`` and has saved; the same command goes on."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.number = number


@contextmanager
def on_stop(act: Callable[[int], None]) -> Iterator[None]:
    """Call ``act`` with the number of every SIGINT and SIGTERM while the block runs.

    A forked worker dies of them in silence. One that was ignored when the process began (a shell's background job)
    stays so.
    """
    process = os.getpid()
    if threading.current_thread() is not threading.main_thread():  # where Python sets no handlers: signals are others'
        yield
        return

    def handle(number: int, _frame: object) -> None:
        if os.getpid() == process:
            act(number)
        else:
            die_of(number)

    heard = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def die_of(number: int) -> None:
    """End this process by the signal itself."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


@contextmanager
def passing_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in ``parent`` that is gone after the block, and where stop_at_once ends this process in it."""
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    _PASSING.append(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(_PASSING.pop(), ignore_errors=True)


_PASSING = list[Path]()


def stop_at_once(number: int, text: str) -> None:
    """Say ``text`` and end this process and those it started, with the exit code that a shell gives for the signal.

    Of several ranks the first speaks, and only of Ctrl-C: their launcher sends SIGTERM to all of them where one has
    failed, which has then said why. What `shoal` has launched leaves the word to it.
    """
    for folder in _PASSING:
        shutil.rmtree(folder, ignore_errors=True)
    if LAUNCHED_BY in os.environ:
        die_of(number)
    if ranks.world_size() == 1 or (number == signal.SIGINT and ranks.is_main()):
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, f"\n{text}\n".encode())  # print() may be what was interrupted
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.terminate()
    os._exit(128 + number)


class Forked:
    """A process that is forked once the libraries are loaded, waits for its words, and calls ``be`` with them.

    Whoever forks has computed nothing yet: of threads that compute a fork has none, and would wait for them.
    """

    def __init__(self, be: Callable[[Sequence[str]], object]) -> None:
        told, self._tell = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_wait_and_be, args=(be, told, self._tell), daemon=True)
        self._process.start()
        told.close()
        self.pid, self.poll = self._process.pid or 0, lambda: self._process.exitcode

    def start(self, words: Sequence[str], environment: Mapping[str, str]) -> Forked:
        """Let it begin, once."""
        with contextlib.suppress(BrokenPipeError):  # it may have been killed
            self._tell.send((words, {**environment, LAUNCHED_BY: str(os.getpid())}))
        return self

    def wait(self) -> int | None:
        """Its exit code, once it has ended."""
        self._process.join()
        return self.poll()


def _wait_and_be(be: Callable[[Sequence[str]], object], told: Connection, tell: Connection) -> None:
    os.setsid()
    tell.close()
    multiprocessing.current_process().daemon = False  # it may have processes of its own
    try:
        words, environment = told.recv()
    except EOFError:  # whoever would tell them is gone
        return
    os.environ.update(environment)
    be(words)


def run_launcher(
    command: Sequence[str] | Forked, environment: Mapping[str, str], *, ranks: str, is_done: Callable[[], bool]
) -> tuple[int, int | None]:
    """The exit code of a launcher of ranks, and the signal that this process was sent meanwhile, if any; or that of the
    only rank, which has begun and needs no launcher.

    DeepSpeed's ends with 0 where the launcher of its node was killed; unless ``is_done`` that is 1 here.

    The launcher has a session of its own, so that a terminal's Ctrl-C reaches this process alone. The
    ranks, whose command line holds the word ``ranks``, are then asked to stop; when they have saved, or at a second
    Ctrl-C, all that is left ends.
    """
    environment = {**environment, LAUNCHED_BY: str(os.getpid())}
    asked: list[int] = []
    with on_stop(asked.append):
        is_rank = isinstance(command, Forked)
        process = command if is_rank else subprocess.Popen(command, env=environment, start_new_session=True)
        while (code := process.poll()) is None and not asked:
            time.sleep(0.1)
        patience_s = SAVE_S if code is None and _ask_to_stop(process, ranks) else 0
        begun, said = time.monotonic(), False
        while process.poll() is None and len(asked) < 2 and (waited := time.monotonic() - begun) < patience_s:
            if waited > QUIET_S and not said:
                said, again = True, "Ctrl-C again" if asked[:1] == [signal.SIGINT] else "a second SIGTERM"
                with contextlib.suppress(OSError):
                    os.write(2, f"shoal: waiting for the ranks to save and end; {again} ends them now\n".encode())
            time.sleep(0.1)
        if (code := process.poll()) == 0 and not is_done():
            code = 1
        if asked or code:
            # ranks whose launcher was killed end by themselves (watch_launcher), unless they are only starting
            deadline = time.monotonic() + (0 if asked else ORPHAN_S + 2)
            with contextlib.suppress(ProcessLookupError):  # all are gone
                while time.monotonic() < deadline:
                    os.killpg(process.pid, 0)
                    time.sleep(0.1)
                os.killpg(process.pid, signal.SIGKILL)
        return code or process.wait() or 0, asked[0] if asked else None


def _ask_to_stop(launcher: subprocess.Popen[bytes] | Forked, ranks: str) -> bool:
    """Send SIGTERM to the ranks; whether there are any. The launchers in between would kill them at once, and a rank
    whose interpreter is only just starting would print a traceback at SIGINT."""
    if any_asked := isinstance(launcher, Forked):
        os.kill(launcher.pid, signal.SIGTERM)
    for child in psutil.Process(launcher.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            words = child.cmdline()[:5]
            if ranks in words and not any("deepspeed" in word for word in words):
                child.terminate()
                any_asked = True
    return any_asked


def watch_launcher() -> None:
    """From now on, end this process when the launcher that started it as a rank is gone, as SIGTERM would.

    A killed launcher leaves its ranks as orphans that hold the run directory and the devices. A rank that is stuck in a
    collective, whose other side is gone, is ended after ORPHAN_S, or after the time that its step or save needs. The
    runner of plain `deepspeed` is gone at the first Ctrl-C, while its ranks have yet to save.
    """
    if "LOCAL_RANK" in os.environ:
        threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = _launcher_processes()
        if not launcher:
            return
        while all(_alive(process) for process in launcher):
            time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGTERM)
    orphaned = time.monotonic()
    while time.monotonic() < max(orphaned + ORPHAN_S, _NEEDED["until"]):
        time.sleep(0.2)
    os._exit(128 + signal.SIGTERM)


_NEEDED = {"until": 0.0}
"""On the monotonic clock, when this process will have done what it does now."""


def needs(seconds: float) -> None:
    """Say that what this process does now takes so many ``seconds`` at most: it is not ended before, if its launcher
    is gone."""
    _NEEDED["until"] = time.monotonic() + seconds


def _launcher_processes() -> list[psutil.Process]:
    """The chain of launcher processes above this one: `shoal run` starts `deepspeed`, which starts a second launcher,
    which starts the ranks."""
    chain = [psutil.Process(int(os.environ[LAUNCHED_BY]))] if LAUNCHED_BY in os.environ else []
    for process in psutil.Process().parents():
        if not _is_launcher(process.cmdline()):
            break
        chain.append(process)
    return chain


def _is_launcher(command: list[str]) -> bool:
    words = command[:5]
    if any(Path(word).name == "shoal" or word == "shoal.launch.cli" for word in words):
        return True
    names = ("deepspeed", "torchrun", "torch.distributed", "accelerate")
    return any(name in word for word in words for name in names)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
