"""Ranks without a launcher, forked from one process that has imported everything already.

Importing torch, transformers and DeepSpeed takes longer than a tiny training. What is asked of the launcher itself is
tested with the launcher.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import psutil
import torch
import torch.distributed as dist
from forked import Command, as_command
from torch.multiprocessing.spawn import start_processes

from shoal.ranks import LAUNCHED, free_port
from shoal.stopping import _alive

PRELOADED = [
    "shoal.launch.cli",
    "shoal.launch.verbs.pipeline",
    "shoal.train.distill",
    "deepspeed",
    "deepspeed.ops",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "trl.models.utils",
    "transformers.models.llama.modeling_llama",
    "shoal.compress.plan",
    "shoal.eval.evaluate",
    "torch.profiler._cupti_monitor",
    "torch._inductor.compile_fx",
    "deepspeed.runtime.zero.muon.muon_optimizer",
]
"""What a rank of a training imports; a name that is wrong here only costs time."""


def as_rank(rank: int, world_size: int) -> dict[str, str]:
    """What a launcher tells a rank of the only node."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}


def environment(**more: str) -> dict[str, str]:
    """This process's, for ranks that share its processors; without what would make each of them a rank of this one."""
    here = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    return {**here, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **more}


def call_on_ranks(function: Callable[..., None], *arguments: object, ranks: int) -> None:
    """``function(rank, ranks, *arguments)`` on every rank to its end; it has to be a function of a module.

    Raises:
        torch.multiprocessing.ProcessRaisedException: what the first rank that failed has raised.
    """
    _preload()
    start_processes(function, (ranks, *arguments), nprocs=ranks, start_method="forkserver")


def call_apart(function: Callable[..., None], *arguments: object) -> subprocess.CompletedProcess[str]:
    """``function(*arguments)`` in a process of its own, how it ended and what it wrote; a function of a module."""
    with TemporaryFile("w+") as log:
        process = _preload().Process(target=_call, args=(function, arguments, _path_of(log)))
        process.start()
        process.join()
        log.seek(0)
        return subprocess.CompletedProcess([], process.exitcode or 0, stdout="", stderr=log.read())


@contextmanager
def in_group(rank: int, world_size: int, folder: str) -> Iterator[None]:
    """For a function that `call_on_ranks` calls: one of a group that meets in ``folder``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    yield
    dist.destroy_process_group()


def run_ranks(
    arguments: Sequence[str],
    *,
    ranks: int,
    env: Mapping[str, str],
    cwd: Path,
    timeout_s: float = 300,
    before: Callable[[], None] | None = None,
) -> subprocess.CompletedProcess[str]:
    """`shoal ARGUMENTS` on ``ranks`` ranks to their end; as under a launcher, a rank that fails ends the others.

    Every rank first calls ``before``, which has to be a function of a module.
    """
    with TemporaryFile("w+") as log:
        processes = start_ranks(arguments, ranks=ranks, env=env, cwd=cwd, log=log, before=before)
        deadline = time.monotonic() + timeout_s
        while any(process.is_alive() for process in processes):
            if any(process.exitcode for process in processes) or time.monotonic() > deadline:
                for process in processes:
                    process.kill()
            time.sleep(0.02)
        codes = [process.exitcode or 0 for process in processes]
        log.seek(0)
        failed = next((code for code in codes if code > 0), min(codes))
        return subprocess.CompletedProcess(list(arguments), failed, stdout="", stderr=log.read())


def start_ranks(
    arguments: Sequence[str],
    *,
    ranks: int,
    env: Mapping[str, str],
    cwd: Path,
    log: IO[str],
    before: Callable[[], None] | None = None,
) -> list[ForkServerProcess]:
    """`shoal ARGUMENTS` on ``ranks`` ranks that have begun, all writing to ``log``."""
    port = env.get("MASTER_PORT", str(free_port()))
    processes = []
    for rank in range(ranks):
        own = {**env, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **as_rank(rank, ranks)}
        processes.append(_preload().Process(target=_run, args=(list(arguments), own, str(cwd), _path_of(log), before)))
        processes[-1].start()
    return processes


def _preload() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # the server reads these when it imports; what it has been started with stays
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", DS_ACCELERATOR="cpu")
    return context


def _path_of(log: IO[str]) -> str:
    return f"/proc/{os.getpid()}/fd/{log.fileno()}"


def _begin(log: str) -> None:
    """Write to ``log``, and let collections of garbage pass over what was there before."""
    gc.freeze()
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def _call(function: Callable[..., None], arguments: tuple[object, ...], log: str) -> None:
    _begin(log)
    function(*arguments)


def _run(
    arguments: list[str], env: dict[str, str], cwd: str, log: str, before: Callable[[], None] | None = None
) -> None:
    _begin(log)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    from shoal.launch.cli import main

    if before is not None:
        before()
    sys.argv = ["distill.py", *arguments]
    main(arguments)


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 120) -> Any:
    """What ``condition`` gives as soon as that is something."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)
    return found


GONE_S = 10
"""Seconds in which nothing that was started runs any more."""


class Shoal:
    """`shoal ARGUMENTS` in a session of its own, as a terminal starts it, in ``folder``; ``forked``: with everything
    imported."""

    def __init__(self, folder: Path, *arguments: str, forked: bool = False) -> None:
        self._file = folder / "stderr.txt"
        self.process: Any
        with self._file.open("w") as stderr:
            if forked:
                told = [*arguments], environment(), str(folder), str(self._file)
                self.process = Command(_preload().Process(target=as_command, args=told))
                return
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


def all_gone(started: list[psutil.Process], timeout_s: float = GONE_S) -> None:
    def gone() -> bool:
        return not any(map(_alive, started))

    wait_for(gone, "the processes that were started to end", timeout_s)
