"""Ctrl-C and SIGTERM as a terminal and a scheduler send them: one line, an exit code, and nothing left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from ranks import environment
from training_runs import MANY_STEPS, wait_for, write_recipe

from shoal.stopping import _alive, on_stop, run_launcher

pytestmark = pytest.mark.slow
GONE_S = 10


class Shoal:
    """`shoal ARGUMENTS` in a session of its own, as a terminal starts it, in ``folder``."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._file = folder / "stderr.txt"
        with self._file.open("w") as stderr:
            self.process = subprocess.Popen(
                [str(Path(sys.executable).with_name("shoal")), *arguments],
                env=environment(PYTHONPATH=os.environ.get("PYTHONPATH", "")),
                stderr=stderr,
                cwd=folder,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    @property
    def said(self) -> str:
        return self._file.read_text()

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def ranks(self) -> list[psutil.Process]:
        return [
            child
            for child in self.children()
            if "shoal.launch.cli" in (w := words(child)) and "deepspeed" not in str(w)
        ]

    def stop(self, number: int) -> list[str]:
        """Send a signal as a terminal does, to the whole process group; what is said from then on."""
        before, started = len(self.said), self.children()
        os.killpg(self.process.pid, number)
        self.process.wait(timeout=60)
        all_gone(started)
        return [line for line in self.said[before:].splitlines() if line]


def words(process: psutil.Process) -> list[str]:
    """The beginning of its command; nothing of one that ends meanwhile."""
    try:
        return process.cmdline()[:5]
    except psutil.NoSuchProcess:  # a zombie among them
        return []


def all_gone(started: list[psutil.Process]) -> None:
    def gone() -> bool:
        return not any(map(_alive, started))

    wait_for(gone, "the processes that were started to end", GONE_S)


def test_ctrl_c_ends_a_stage_at_once(teacher: Path, tmp_path: Path) -> None:
    long = ("measure.num_tokens=3_000_000", "measure.sequence_length=64")
    shoal = Shoal(tmp_path, "measure", "--config", str(write_recipe(tmp_path, teacher)), *long)
    wait_for(lambda: "measure: " in shoal.said, "measuring")
    said = shoal.stop(signal.SIGINT)
    assert shoal.process.returncode == 130, shoal.said
    assert said[-1] == ("shoal: stopped; what is answered or finished is kept, and the same command goes on from there")
    assert "Traceback" not in shoal.said


def without_progress(said: list[str]) -> list[str]:
    """Without what a slow machine tells of work that is still going on; that work was done is no such line."""
    return [line for line in said if not any(text in line for text in ("] step ", "waiting for the ranks", " so far"))]


@pytest.mark.prove
@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_a_stop_of_shoal_saves_on_its_ranks(pruned: Any, tmp_path: Path, number: int, ranks: int) -> None:
    """Also: what lies in the current folder is not taken for a module of the ranks."""
    path = pruned(tmp_path, steps=MANY_STEPS)
    (tmp_path / "shoal").mkdir()
    (tmp_path / "psutil.py").write_text("open('imported', 'w')")
    shoal = Shoal(tmp_path, "distill", "--config", str(path), f"num_processes={ranks}")
    checkpoints = tmp_path / "run/checkpoints"
    wait_for(lambda: list(checkpoints.glob("checkpoint-*/manifest.json")), "a first checkpoint")
    said = without_progress(shoal.stop(number))
    assert shoal.process.returncode == 128 + number, shoal.said
    (line,) = said
    assert "(as asked), saved; the same command goes on from there" in line
    assert not (tmp_path / "imported").exists()


@pytest.mark.prove
def test_ranks_do_not_outlive_a_killed_shoal(pruned: Any, tmp_path: Path) -> None:
    shoal = Shoal(tmp_path, "distill", "--config", str(pruned(tmp_path, steps=MANY_STEPS)))
    wait_for(shoal.ranks, "a rank")
    started = shoal.children()
    shoal.process.kill()
    shoal.process.wait()
    all_gone(started)


def later(delay_s: float, act: Callable[[], None]) -> None:
    threading.Timer(delay_s, act).start()


def deaf_ranks(ready: Path) -> list[str]:
    """The command of a launcher whose rank makes the file ``ready`` and does not hear SIGTERM."""
    deaf = "import signal, sys, time; signal.signal(15, signal.SIG_IGN); open(sys.argv[2], 'w'); time.sleep(60)"
    launcher = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
    return [sys.executable, "-c", launcher, deaf, "a.rank", str(ready)]


def test_a_second_ctrl_c_ends_ranks_that_do_not_come_to_an_end(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    command, begun = deaf_ranks(ready), time.monotonic()

    def twice() -> None:
        wait_for(ready.exists, "the rank")
        os.kill(os.getpid(), signal.SIGINT)
        later(1.0, lambda: os.kill(os.getpid(), signal.SIGINT))

    later(0, twice)
    assert run_launcher(command, os.environ, ranks="a.rank") == (-signal.SIGKILL, signal.SIGINT)
    assert 1 < time.monotonic() - begun < 30


def test_signals_are_left_alone_off_the_main_thread() -> None:
    """Python sets handlers there only: a run in a notebook's thread trains all the same."""
    entered = []

    def work() -> None:
        with on_stop(lambda _: None):
            entered.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [before]
