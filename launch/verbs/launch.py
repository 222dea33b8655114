"""A stage in ranks that are started from here: under the DeepSpeed launcher, or one that is forked. Nothing is imported
that takes long."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.errors import EXIT_USER_ERROR, UserError
from shoal.progress import SPEAKER, doing
from shoal.ranks import LAUNCHED, VOICE, free_port, refuse_crowd
from shoal.stopping import STOPS, Forked, run_launcher

if TYPE_CHECKING:
    from shoal.recipe.recipe import Recipe

    from .run import Run

log = logging.getLogger(__name__)

STARTED = "SHOAL_STARTED"
"""Names the file in the environment of ranks that rank 0 makes once it can speak for itself."""
DONE = "done"
"""Content of that file once rank 0 has done all that it was started for."""

VISIBLE = "CUDA_VISIBLE_DEVICES"
COUNTED = "PYTORCH_NVML_BASED_CUDA_CHECK"
SET_VISIBLE = "SHOAL_VISIBLE_DEVICES"
"""Holds in the environment of ranks the CUDA_VISIBLE_DEVICES of the command: DeepSpeed's launcher ignores and replaces
it where a number of ranks is asked for, and reads no names of devices (GPU-..., MIG-...)."""
GOES_ON = "the same command resumes from the last checkpoint, or starts this stage again if there is none yet"


class LaunchEnded(Exception):
    """The launched ranks ended with ``code`` and have said why, or ``text`` does."""

    def __init__(self, code: int, text: str = "") -> None:
        super().__init__(code, text)
        self.code, self.text = code, text


class LaunchRefused(UserError):
    """The launched ranks have refused the recipe, and said why."""


def forked_rank(recipe: Recipe, main: Callable[[Sequence[str]], object]) -> Forked | None:
    """The rank of a training, forked from this process, which has just loaded the libraries, to call ``main``.

    None where ranks load all anew: there are several, or a device, of which a fork could use nothing, or torch would
    have another number of threads, whose sums differ.
    """
    import torch

    from shoal.machine import num_cores

    as_many = "OMP_NUM_THREADS" in os.environ or torch.get_num_threads() == num_cores()
    is_cpu = sys.platform == "linux" and not torch.accelerator.is_available()
    return Forked(main) if is_cpu and as_many and ranks_of("distill", recipe) == 1 else None


def launch_ranks(verb: str, run: Run, *, config: str, overrides: Sequence[str], forked: Forked | None = None) -> None:
    """Run ``verb`` of ``config``, a recipe or run directory, under the DeepSpeed launcher on this machine; wait for it.

    ``run`` is that of the recipe with these overrides. ``forked`` is its only rank, and has no launcher.

    Raises:
        LaunchEnded: the ranks have not come to their end.
        LaunchRefused: they have refused what they were told.
        UserError: more ranks than this machine has devices or cores.
    """
    words = [verb, "--config", config, *overrides]
    if run.force and verb == "distill":
        words.append("--force")
    start_ranks(verb, ranks_of(verb, run.recipe), words, forked)


def ranks_of(verb: str, recipe: Recipe) -> int:
    """Processes that share the work of ``verb`` on this machine; vLLM has one, which has devices of its own."""
    from shoal.machine import ranks_to_start

    teacher = recipe.distill.teacher
    by_vllm = verb == "eval" and recipe.eval.backend == "vllm"
    by_vllm |= verb == "record" and getattr(teacher, "backend", None) == "vllm"
    return 1 if by_vllm else ranks_to_start(recipe.num_processes)


def start_ranks(verb: str, ranks: int, words: Sequence[str], forked: Forked | None = None) -> None:
    """Run the command of ``words`` in so many ``ranks`` under the DeepSpeed launcher; raises as launch_ranks does."""
    from shoal.runtime import free_memory

    refuse_crowd(ranks)
    words = [*words, *[f"--{VOICE.loudness}"] * (VOICE.loudness != "usual")]
    words += ["--json"] * (VOICE.events and verb == "distill")
    command, port = [sys.executable, "-m", "deepspeed.launcher.runner"], str(free_port())
    command += f"--num_gpus {ranks} --master_addr 127.0.0.1 --master_port {port}".split()
    command += ["--no_local_rank", "--log_level", "critical", "--module", "shoal.launch.cli", *words]
    log.info("%s: starting %d rank(s)%s", verb, ranks, "" if forked else " under the DeepSpeed launcher")
    free_memory()  # what this process has cached on a device is not free to the ranks
    with tempfile.TemporaryDirectory() as folder:
        started = Path(folder) / "started"
        environment = rank_environment(ranks) | {STARTED: str(started)}
        as_rank = dict(zip(LAUNCHED, "001", strict=True), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        with doing(f"{verb}, {'rank' if forked else 'launcher and ranks'}"):
            with SPEAKER.still(started.exists):
                code, asked = run_launcher(
                    forked.start(words, environment | as_rank) if forked else command,
                    environment,
                    ranks="shoal.launch.cli",
                    is_done=lambda: started.exists() and started.read_text() == DONE,
                )
            if code != 0 or asked is not None:
                raise _unfinished(verb, code, asked)  # in here: nothing is called done


def rank_environment(ranks: int) -> dict[str, str]:
    """Variables of a launcher that starts so many ``ranks`` on this machine."""
    import torch

    from shoal.machine import num_cores

    environment = {**os.environ, "PYTHONSAFEPATH": "1"}  # modules come from no current folder
    # the cores that this process may use: threads that share one wait for each other
    environment.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // ranks)))
    if not torch.accelerator.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    elif VISIBLE in environment:
        environment[SET_VISIBLE] = environment.pop(VISIBLE)
    return environment


def see_devices() -> None:
    """Let a rank see the devices that its command was told to use. Before torch looks for any."""
    if SET_VISIBLE in os.environ:
        os.environ[VISIBLE] = os.environ.pop(SET_VISIBLE)


@contextmanager
def seeing(device: str) -> Iterator[None]:
    """In the block this process, and those that it starts, see no GPU where ``device``, the recipe's, is cpu.

    Torch asks NVIDIA's management library there how many it sees: CUDA reads the variable once in the life of a
    process, which would see none after the block either.
    """
    before = {name: os.environ.get(name) for name in (VISIBLE, COUNTED, "DS_ACCELERATOR")}
    if device == "cpu":
        os.environ.update({VISIBLE: "", COUNTED: "1"})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})


def _unfinished(verb: str, code: int, asked: int | None) -> LaunchEnded | LaunchRefused:
    """The end of ranks that have not come to theirs, told unless they have said it; ``asked`` is the signal that
    stopped them."""
    number = -code if code < 0 else 256 - code if code > 256 - signal.NSIG else 0  # the launchers pass -9 on as 247
    if code == EXIT_USER_ERROR:
        return LaunchRefused(f"{verb}: stopped by wrong input; the message is on stderr, above")
    if code in (128 + number for number in STOPS):
        pass  # the rank has said that it has saved
    elif asked is not None:
        done = "the stage had just ended, and the same command resumes from there"
        return LaunchEnded(128 + asked, f"stopped; {done if code == 0 else GOES_ON}")
    elif number:
        reason = ", most often because memory ran out" if number == signal.SIGKILL else ""
        log.error(
            "%s: a rank was ended by signal %d, %s%s; %s", verb, number, signal.strsignal(number), reason, GOES_ON
        )
    elif verb != "doctor":
        log.error("%s ended with exit code %d; its message is above, and %s", verb, code, GOES_ON)
    return LaunchEnded(128 + (asked or number) if asked or number else code)
