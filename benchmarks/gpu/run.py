"""`make gpu`: how fast training is on this card and what it takes, beside TRL and beside what the preflight tells.

    python -m benchmarks.gpu.run OUT [--budget 600] [--only WORD ...] [--device cpu --tiny]

Models are of Qwen3's shapes with random weights, made on the device; nothing is downloaded and no file is needed
beside the repository. Every case is a process of its own, so that memory is its own, and running out of memory is a
result. Cases come in the order of their importance; those that the budget has no time for are named as left out.
OUT/gpu.json holds every figure with card, driver, versions and commit, OUT/gpu.md a table of them,
OUT/logs what the processes said.

Without a GPU it prints what it would do. `--device cpu --tiny` does all of it with
models of a few thousand weights, which shows that it works and nothing else.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.gpu.cases import SIZES, TINY, Case, Size, cases
from benchmarks.gpu.table import markdown, outcome
from benchmarks.gpu.work import ROOT, measured
from shoal.atomic_files import write_json
from shoal.ranks import set_up_logging

BUDGET_S = 600
LEAST_S = 12
"""Seconds below which no further case is begun."""
QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help=f"seconds of all cases together ({BUDGET_S})")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="cases whose group, size or name holds one of these")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: a GPU if there is one")
    parser.add_argument(
        "--tiny", action="store_true", help="models of a few thousand weights, to try the command itself"
    )
    arguments = parser.parse_args(words)
    os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("--device cpu: a step of these sizes takes minutes there; add --tiny")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; leave it out to see what would be done")
    sizes = TINY if arguments.tiny else SIZES
    chosen = list(wanted(cases(), arguments.only))
    if all(case.kind == "card" for case in chosen):
        parser.error(f"--only: no case has {' or '.join(map(repr, arguments.only))} in its group, size or name")
    if arguments.device is None and not torch.cuda.is_available():
        print("No GPU is seen here: nothing is measured. On one, these cases would be, each in a process of its own:\n")
        print("\n".join(f"{case.group:9}  {case.size:5}  {case.name}" for case in chosen))
        return 0
    # of several GPUs the first: trainers would split a batch over all that they see
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    result = measure(chosen, sizes, arguments)
    print(markdown(result))
    print(f"\n{arguments.out / 'gpu.json'} holds every figure, {arguments.out / 'gpu.md'} this table.")
    return 1 if any("failed" in row for row in result["results"]) else 0


def wanted(known: Sequence[Case], words: Sequence[str] | None) -> Iterator[Case]:
    """Cases of which one of ``words`` tells, and the card, which all figures are read by."""
    for case in known:
        if (
            words is None
            or case.kind == "card"
            or any(word in (case.group, case.size) or word in case.name for word in words)
        ):
            yield case


def measured_apart(case: Case, size: Size, log: Path, seconds: float) -> dict[str, Any]:
    """The figures of ``case``, measured by a process of its own; why there are none if it died, or was ended after so
    many seconds."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, case, size, log), daemon=True)
    with _hidden_gpus(case.on_cpu):
        process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            return {"not_measured": f"was not done after {seconds:.0f} s"}
        return ours.recv()
    except EOFError:
        process.join()
        return {"failed": f"its process ended with exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


@contextmanager
def _hidden_gpus(hidden: bool) -> Iterator[None]:
    """Processes that are started inside see no accelerator, where ``hidden``."""
    before = os.environ["CUDA_VISIBLE_DEVICES"]
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if hidden else before
    try:
        yield
    finally:
        os.environ["CUDA_VISIBLE_DEVICES"] = before


def _serve(pipe: Connection, case: Case, size: Size, log: Path) -> None:
    """Measure a case, send what was found, and end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that waits for it ends it
    with log.open("w") as file, TemporaryDirectory() as folder:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        set_up_logging()
        try:
            figures = measured(case, size, Path(folder))
        except Exception as error:
            figures = {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}
            pipe.send(figures)
            raise
        pipe.send(figures)


def measure(chosen: Sequence[Case], sizes: dict[str, Size], arguments: argparse.Namespace) -> dict[str, Any]:
    """Every figure of ``chosen``; written after each of them, so that what was measured survives what comes after."""
    begun, out = time.monotonic(), arguments.out
    (out / "logs").mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "command": " ".join(sys.argv[1:]),
        "tiny": arguments.tiny,
        "budget_s": arguments.budget,
        "commit": commit(),
        "results": [],
    }
    for number, case in enumerate(chosen):
        left = arguments.budget - (time.monotonic() - begun)
        figures: dict[str, Any] = {"left_out": f"the budget of {arguments.budget:.0f} s was used up"}
        if left >= LEAST_S:
            log, limit_s = out / "logs" / f"{number:02d}.txt", min(case.limit_s, left)
            figures = measured_apart(case, sizes[case.size], log, limit_s)
        row = {"name": case.name, "group": case.group, "size": case.size, "kind": case.kind} | figures
        result["results"].append(row)
        result["seconds"] = round(time.monotonic() - begun, 1)
        write_json(out / "gpu.json", result)
        (out / "gpu.md").write_text(markdown(result) + "\n", encoding="utf-8")
        print(f"{result['seconds']:6.0f} s  {case.size:5} {case.name}: {outcome(row)}", file=sys.stderr, flush=True)
    return result


def commit() -> str | None:
    """The commit that is measured, and whether files differ from it; None outside of a repository."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True
    )
    return described.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())
