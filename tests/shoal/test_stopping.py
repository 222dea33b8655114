"""Ctrl-C and SIGTERM as a terminal and a scheduler send them: one line, an exit code, and nothing left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from ranks import Shoal, wait_for
from training_runs import MANY_STEPS, write_recipe

from shoal.ranks import free_port
from shoal.stopping import LAUNCHED_BY, Forked, _alive, on_stop, run_launcher

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def test_ctrl_c_ends_a_stage_at_once(teacher: Path, tmp_path: Path) -> None:
    long = ("measure.num_tokens=3_000_000", "measure.sequence_length=64")
    shoal = Shoal(tmp_path, "measure", "--config", str(write_recipe(tmp_path, teacher)), *long)
    wait_for(lambda: "measure: " in shoal.said, "measuring")
    said = shoal.stop(signal.SIGINT)
    assert shoal.process.returncode == 130, shoal.said
    assert said[-1] == ("shoal: stopped; answered and finished work is kept, and the same command resumes from there")
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
    assert "(as asked), saved; the same command resumes from there" in line
    assert not (tmp_path / "imported").exists()


def deaf_ranks(ready: Path) -> list[str]:
    """The command of a launcher whose rank makes the file ``ready`` and does not hear SIGTERM."""
    deaf = "import signal, sys, time; signal.signal(15, signal.SIG_IGN); open(sys.argv[2], 'w'); time.sleep(60)"
    launcher = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
    return [sys.executable, "-c", launcher, deaf, "a.rank", str(ready)]


@pytest.mark.parametrize(
    ("number", "again"), [(signal.SIGINT, "Ctrl-C again"), (signal.SIGTERM, "a second SIGTERM")], ids=["ctrl-c", "term"]
)
def test_a_second_signal_ends_ranks_that_do_not_come_to_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: int, again: str
) -> None:
    monkeypatch.setattr("shoal.stopping.QUIET_S", 0.2)
    ready = tmp_path / "ready"
    command, begun = deaf_ranks(ready), time.monotonic()

    def twice() -> None:
        wait_for(ready.exists, "the rank")
        os.kill(os.getpid(), number)
        threading.Timer(1.0, os.kill, (os.getpid(), number)).start()

    threading.Thread(target=twice).start()
    assert run_launcher(command, os.environ, ranks="a.rank", is_done=bool) == (-signal.SIGKILL, number)
    assert 1 < time.monotonic() - begun < 30
    assert f"waiting for the ranks to save and end; {again} ends them now" in capfd.readouterr().err


@pytest.mark.parametrize("code", [-signal.SIGKILL, 0])
def test_ranks_that_outlive_their_launcher_are_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Those that were only starting when it was killed do not notice. DeepSpeed's ends with 0 where that of its node
    was killed, and nothing is done then."""
    monkeypatch.setattr("shoal.stopping.ORPHAN_S", -1.5)
    rank = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    launcher = (
        "import os, subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', *sys.argv[1:]])\n"
        "while not os.path.exists(sys.argv[2]) or not open(sys.argv[2]).read(): time.sleep(0.01)\n"
        f"os.kill(os.getpid(), {-code})\n"
    )
    number = tmp_path / "number"
    command = [sys.executable, "-c", launcher, rank, str(number)]
    assert run_launcher(command, os.environ, ranks="a.rank", is_done=bool) == (code or 1, None)
    pid = int(number.read_text())
    wait_for(lambda: not psutil.pid_exists(pid) or not _alive(psutil.Process(pid)), "the rank to end", 5)


SAVING_RANK = """
import os, sys, time
from pathlib import Path
from shoal.ranks import free_port
from shoal.stopping import SAVE_S, needs, on_stop, watch_launcher

rank, asked = os.environ["RANK"], []
watch_launcher()
with on_stop(asked.append):
    Path(f"ready-{rank}").touch()
    while not asked:
        time.sleep(0.05)
    needs(SAVE_S)
    time.sleep(12)
    Path(f"saved-{rank}").touch()
"""


@pytest.mark.slow
def test_ranks_of_plain_deepspeed_finish_a_long_save_after_ctrl_c(tmp_path: Path) -> None:
    """Its runner ends at once, and its ranks notice that they have no launcher any more."""
    (tmp_path / "rank.py").write_text(SAVING_RANK)
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    command = [deepspeed, "--num_gpus", "2", "--master_port", str(free_port()), "rank.py"]
    runner = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2, "the ranks", 120)
    os.killpg(runner.pid, signal.SIGINT)
    runner.wait(timeout=60)
    wait_for(lambda: len(list(tmp_path.glob("saved-*"))) == 2, "both saves", 40)


def test_a_fork_is_what_it_is_told_to_be(tmp_path: Path) -> None:
    def be(words: Sequence[str]) -> None:
        (tmp_path / words[0]).write_text(
            f"{os.environ['WORD']} {os.environ[LAUNCHED_BY]} {os.getsid(0) == os.getpid()}"
        )
        sys.exit(7)

    forked = Forked(be)
    assert run_launcher(forked.start(["file"], {"WORD": "a"}), {}, ranks="", is_done=bool) == (7, None)
    assert (tmp_path / "file").read_text() == f"a {os.getpid()} True"


def test_a_fork_is_asked_to_stop_as_ranks_are() -> None:
    forked = Forked(lambda _: time.sleep(60)).start([], {})
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    assert run_launcher(forked, {}, ranks="", is_done=bool) == (-signal.SIGTERM, signal.SIGINT)


@pytest.mark.parametrize("end", ["sys.exit()", "os.kill(os.getpid(), 9)"])
def test_a_fork_that_is_told_nothing_ends_with_the_process_that_waits_to_tell_it(end: str) -> None:
    code = f"import os, sys; from shoal.stopping import Forked; print(Forked(print).pid, flush=True); {end}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    pid = int(done.stdout)
    wait_for(lambda: not psutil.pid_exists(pid) or not _alive(psutil.Process(pid)), "the fork to end", 5)


def test_a_fork_that_was_killed_while_it_waited_has_its_signal_for_an_exit_code() -> None:
    forked = Forked(print)
    os.kill(forked.pid, signal.SIGKILL)
    wait_for(lambda: forked.poll() is not None, "its end", 5)
    assert run_launcher(forked.start([], {}), {}, ranks="", is_done=bool) == (-signal.SIGKILL, None)


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "shoal.launch.cli", "list"],
        ["-c", "from shoal.launch import main; main(['list'])"],
        *([str(ROOT / "launch" / f"{name}.py")] for name in ("distill", "eval", "measure", "record")),
    ],
    ids=lambda words: " ".join(words)[-30:],
)
def test_ctrl_c_while_modules_are_loaded_prints_no_traceback(tmp_path: Path, words: list[str]) -> None:
    """The module of YAML, which all of them load, is one here that presses Ctrl-C."""
    (tmp_path / "yaml.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    ended = subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "")


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


@pytest.mark.parametrize("launched", [True, False])
def test_a_passing_folder_goes_with_its_process(tmp_path: Path, launched: bool) -> None:
    """Weights that wait on disk are as large as the model."""
    code = (
        "import os, sys, pathlib; from shoal.stopping import on_stop, passing_folder, stop_at_once\n"
        "with on_stop(lambda number: stop_at_once(number, '')):\n"
        "    with passing_folder(pathlib.Path(sys.argv[1]), 'offloaded-') as own:\n"
        "        (own / 'weights').touch(); os.kill(os.getpid(), 15); os._exit(0)"
    )
    environment = {**os.environ, **({LAUNCHED_BY: "1"} if launched else {})}
    code = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=False).returncode
    assert code == (-15 if launched else 128 + 15)
    assert not list(tmp_path.iterdir())
