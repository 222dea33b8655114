"""`shoal ARGUMENTS` and all Python processes that it starts, forked with everything imported instead of executed.

The command, DeepSpeed's two launchers and the ranks each load torch for themselves, which takes ten times as long as a
tiny training. Here every one of them is forked from the one that starts it, before that one has done anything, and has
its environment, its session and its command line, by which shoal and the tests know processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

COMMAND = "shoal.launch.cli"
STARTS = {COMMAND: 1, "deepspeed.launcher.runner": 1, "deepspeed.launcher.launch": 2}
"""Processes that the modules start; a rank, which is the command as well, starts none."""
STAGES = 3
"""Of `shoal run` as many one after the other, before it scores."""


class Forked:
    """As much of a subprocess.Popen as is asked for, of a process that waits until it is told what it is."""

    def __init__(self) -> None:
        self.returncode: int | None = None
        told, self._tell = os.pipe()
        if (pid := os.fork()) == 0:
            os.close(self._tell)
            _show(["waiting"])
            with open(told, "rb") as pipe, contextlib.suppress(EOFError):
                command, env, own_session = pickle.load(pipe)
                if own_session:
                    os.setsid()
                os._exit(_ended(command, env))
            os._exit(0)
        os.close(told)
        self.pid = pid

    def start(self, command: Sequence[str], env: Mapping[str, str] | None, own_session: bool) -> None:
        with open(self._tell, "wb") as pipe:
            pickle.dump((list(command), dict(os.environ if env is None else env), own_session), pipe)

    def poll(self) -> int | None:
        return self._look(os.WNOHANG)

    def wait(self) -> int | None:
        return self._look(0)

    def _look(self, how: int) -> int | None:
        if self.returncode is None and (found := os.waitpid(self.pid, how))[0]:
            self.returncode = os.waitstatus_to_exitcode(found[1])
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class Command:
    """The same of the command itself, which the forkserver starts."""

    def __init__(self, process: ForkServerProcess) -> None:
        process.start()
        assert process.pid is not None
        self._process, self.pid = process, process.pid
        self.poll = lambda: process.exitcode
        self.send_signal = partial(os.kill, process.pid)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> None:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("shoal", timeout)


def as_command(arguments: Sequence[str], env: Mapping[str, str], folder: str, log: str) -> None:
    """Be `shoal ARGUMENTS` in a session of its own, in ``folder``; a process that the forkserver has just forked."""
    os.setsid()
    os.chdir(folder)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    gc.freeze()
    os._exit(_ended([sys.executable, "-m", COMMAND, *arguments], env))


def _ended(command: list[str], env: Mapping[str, str]) -> int:
    """Be what ``command``, `PYTHON [-u] -m MODULE ARGUMENTS`, starts; its exit code."""
    _show(command)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(env)
    name, *sys.argv[1:] = command[command.index("-m") + 1 :]
    starts = 0 if "LOCAL_RANK" in os.environ else STAGES if sys.argv[1] == "run" else STARTS[name]
    waiting = [Forked() for _ in range(starts)]
    subprocess.Popen = partial(_popen, waiting, subprocess.Popen)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        importlib.import_module(name).main()
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _popen(waiting: list[Forked], popen: Any, command: Any, *more: Any, **options: Any) -> Any:
    """A process that is waiting becomes what a Python module is to be run in; other commands are executed."""
    if not waiting or command[0] != sys.executable or "-m" not in command:
        return popen(command, *more, **options)
    started = waiting.pop(0)
    started.start(command, options.get("env"), options.get("start_new_session", False))
    return started


def _show(command: Sequence[str]) -> None:
    """Let the system tell ``command`` of this process, as much of it as there is room for."""
    facts = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(facts[45]), int(facts[46])  # arg_start and arg_end of proc(5)
    text = b"\0".join(word.encode() for word in command)[: end - start - 1]
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, text, len(text))
