"""A training killed again and again, beside the same training left alone: do curve and weights agree?

    python benchmarks/survives.py [--kills 20] [--seed 0] [--zero 2]

Every life of the run kills itself with SIGKILL at a drawn moment: at a random time during steps, while a checkpoint is
written, as its manifest is renamed into place, while an old one is being removed, or while distilled/ is written.
Moments are found by Python's audit events, so nothing of shoal is changed or knows of it. The next life is the same
command. A tiny random Llama is trained on one rank, so that starting takes longer than training.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from side_by_side import write_recipe, write_tiny

from shoal.artifacts.training import Training

STEPS = 40
MOMENTS = {
    "step": (("open",), "/trainer_state.json"),
    "save": (("os.mkdir",), "/checkpoint-"),
    "rename": (("os.rename",), "/checkpoint-"),
    "remove": (("shutil.rmtree", "os.remove"), "/checkpoint-"),
    "result": (("open", "os.rename", "os.mkdir"), "/.distilled."),
    "never": ((), ""),
}
"""Moment -> the events that begin it, and what is part of the path they are about; `result` is after training."""
LATER_S = {"step": 1.0, "save": 0.05}
"""These begin with an event and end somewhere within so many seconds."""


def main() -> None:
    """Print one line per life and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--zero", type=int, default=2)
    parser.add_argument("--life", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.life is not None:
        _live(*arguments.life)
        return
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(survive(Path(folder), arguments.kills, arguments.seed, arguments.zero), indent=1))


def survive(folder: Path, kills: int, seed: int, zero: int) -> dict[str, Any]:
    """The figure: how often the run was killed and where, and how far it ended from the run left alone."""
    teacher = folder / "teacher"
    write_tiny(teacher, num_hidden_layers=6, num_key_value_heads=2, tie_word_embeddings=True)
    alone, killed = (_recipe(folder / name, teacher, zero) for name in ("alone", "killed"))
    assert _run(alone, "never", 0, 0) == 0
    draw = random.Random(seed)
    during = ("step", "save", "rename", "remove")
    moments = [draw.choice(during) for _ in range(kills - kills // 5)] + ["result"] * (kills // 5)
    hits: Counter[str] = Counter()
    for moment in moments:
        started = time.monotonic()
        code = _run(killed, moment, draw.randrange(1, 9), draw.random())
        assert code in (0, -signal.SIGKILL), code
        hits[moment] += code != 0
        print(f"{moment}: {'killed' if code else 'not reached'} after {time.monotonic() - started:.0f} s", flush=True)
        if code == 0:
            break
    assert _run(killed, "never", 0, 0) == 0
    curves = [_curves(Training.read(path.parent / "distill.json")) for path in (alone, killed)]
    assert curves[0].keys() == curves[1].keys(), curves[0].keys() ^ curves[1].keys()
    weights = [load_file(path.parent / "distilled/model.safetensors") for path in (alone, killed)]
    left = sorted(file.name for file in killed.parent.rglob("*.tmp"))
    return {
        "kills": sum(hits.values()),
        "by moment": dict(hits),
        "steps": sum(name == "loss" for _, name in curves[1]),
        "values": len(curves[1]),
        "largest difference of one": max(abs(value - curves[1][point]) for point, value in curves[0].items()),
        "weights equal bit for bit": all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]),
        "temporary files left": left,
    }


def _curves(training: Training) -> dict[tuple[float, str], float]:
    """Every logged value by step and name, but for those that tell the time."""
    return {
        (row["step"], name): value
        for row in training.history
        for name, value in row.items()
        if name not in ("seconds", "tokens_per_s", "peak_share")
    }


def _recipe(folder: Path, teacher: Path, zero: int) -> Path:
    distill = {
        "num_tokens": STEPS * 4 * 64,
        "sequence_length": 64,
        "batch_size": 4,
        "precision": "float32",
        "deepspeed": f"deepspeed/zero{zero}.json",
        "trainer": {"learning_rate": 1e-3, "save_steps": 2},
    }
    return write_recipe({"model": str(teacher), "run_dir": str(folder), "prune": {"drop": [2, 3]}, "distill": distill})


def _run(recipe: Path, moment: str, count: int, share: float) -> int:
    """The exit code of one life."""
    # what DeepSpeed's launcher tells a process: without it, `shoal distill` starts the launcher
    env = {**os.environ, "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--life", str(recipe), moment, str(count), str(share)]
    with recipe.parent.with_suffix(".log").open("a") as log:
        return subprocess.run(command, env=env, stdout=log, stderr=log, check=False).returncode


def _live(recipe: str, moment: str, count: str, share: str) -> None:
    """One life: shoal's distill verb, with an end at the ``count``-th time that ``moment`` comes."""
    left = int(count)
    events, part = MOMENTS[moment]
    run_dir = str(Path(recipe).parent)

    die = partial(os.kill, os.getpid(), signal.SIGKILL)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        target = str(arguments[1 if event == "os.rename" else 0]) if arguments else ""
        if target.startswith(run_dir) and event in events and part in target:
            left -= 1
            if left <= 0 and moment in LATER_S:
                threading.Timer(float(share) * LATER_S[moment], die).start()
            elif left <= 0:
                die()

    sys.addaudithook(watch)
    from shoal.launch.cli import main as shoal

    shoal(["distill", "--config", recipe])


if __name__ == "__main__":
    main()
