"""Faults while training, each at random moments: nothing is lost that was finished, the same command goes on, and the
student has the bits of one that was never disturbed. Nothing that was started outlives a killed command.

SHOAL_FAULTS_SEED repeats the moments that a failed test has printed.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM
from typing import Any

import pytest
import torch
from ranks import GONE_S, Shoal, all_gone, words
from training_runs import Trial, all_of, finished, run, terminate, unfinished

from shoal.stopping import _alive
from shoal.train.engine.checkpoint import MANIFEST, last_complete

pytestmark = [pytest.mark.prove, pytest.mark.slow]

STEPS = 48
EVERY = 2
MOMENTS = 3
SETTINGS: dict[str, Any] = {
    "steps": STEPS,
    "deepspeed": "zero2",
    "trainer": {"save_strategy": "steps", "save_steps": EVERY},
}
LEAST_BYTES = 2**16
"""No file that a rank writes to before it saves becomes as large."""


@pytest.fixture
def chance() -> random.Random:
    """Where moments come from."""
    seed = int(os.environ.get("SHOAL_FAULTS_SEED", random.SystemRandom().getrandbits(32)))
    print(f"SHOAL_FAULTS_SEED={seed}")
    return random.Random(seed)


@pytest.fixture(scope="session")
def undisturbed(once: Any, pruned: Any) -> Trial:
    """Two ranks under ZeRO 2, and every second step a checkpoint, of which the last two stay. Read only."""
    folder = once("undisturbed", lambda folder: finished(run(pruned(folder, **SETTINGS), ranks=2)))
    return Trial(folder / "recipe.yaml")


def same_bits(trial: Trial, undisturbed: Trial) -> None:
    assert trial.curve(steps=STEPS) == undisturbed.curve(steps=STEPS)
    ours, theirs = trial.weights(), undisturbed.weights()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def newest(run_dir: Path) -> int:
    """The step of the newest complete checkpoint; 0 = there is none."""
    steps = (file.parent.name.removeprefix("checkpoint-") for file in run_dir.glob(f"checkpoints/*/{MANIFEST}"))
    return max(map(int, steps), default=0)


def goes_on(trial: Trial, kept: int) -> Trial:
    """The end of a training that had a checkpoint of the step ``kept``, which it went on from, or from a later one."""
    trial = finished(trial)
    (step,) = re.findall(r"resuming from \S*checkpoint-(\d+)$", trial.log, re.MULTILINE)
    assert int(step) >= kept > 0
    return trial


# --- processes that are killed ------------------------------------------------------------------------------------

VICTIMS = {
    "rank": lambda shoal: shoal.ranks(),
    "launcher": lambda shoal: [child for child in shoal.children() if "deepspeed.launcher" in str(words(child))],
    "shoal": lambda shoal: [shoal.process],
}
"""Of a rank and of a launcher there are two: the first launcher starts that of its node."""


@pytest.mark.parametrize("number", [SIGKILL, SIGTERM], ids=["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize(("verb", "victim"), [*(("distill", victim) for victim in VICTIMS), ("run", "shoal")])
def test_a_killed_process(
    undisturbed: Trial, pruned: Any, tmp_path: Path, chance: random.Random, verb: str, victim: str, number: int
) -> None:
    """Three times in one training: each time the same command goes on, and is killed again."""
    path, kept = pruned(tmp_path, **SETTINGS), 0
    for _ in range(MOMENTS):
        moment = kept + chance.randrange(1, STEPS // 8)
        asked = "num_processes=2", "measure.num_tokens=512"
        shoal = Shoal(tmp_path, verb, "--config", str(path), *asked, forked=True)
        while newest(tmp_path / "run") < moment and shoal.process.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.1))
        before, started = newest(tmp_path / "run"), shoal.children()
        assert started, shoal.said[-3000:]
        assert not kept or f"resuming from {tmp_path}/run/checkpoints/checkpoint-" in shoal.said
        chance.choice(VICTIMS[victim](shoal)).send_signal(number)
        shoal.process.wait(timeout=60)
        if victim == "shoal":
            all_gone(started, 3 * GONE_S)  # which is for a machine with nothing else to do
        assert not any(map(_alive, started)), "the command ends after all that it has started"
        assert shoal.process.returncode not in (0, 2), shoal.said[-3000:]
        assert number == SIGKILL or "Traceback" not in shoal.said
        kept = newest(tmp_path / "run")
        assert kept >= before >= moment
        assert not (tmp_path / "run/distilled").exists()
    same_bits(goes_on(run(path, "num_processes=2", ranks=2), kept), undisturbed)


@pytest.mark.parametrize("number", [SIGKILL, SIGINT], ids=["SIGKILL", "SIGINT"])
def test_a_run_of_one_process_that_is_ended_in_every_stage(
    once: Any, pruned: Any, tmp_path: Path, chance: random.Random, number: int
) -> None:
    """Its rank is forked from it, and no launcher has a part in it."""
    path, settings = pruned(tmp_path, **SETTINGS), ["measure.num_tokens=512", "eval.limit=40"]
    trained = tmp_path / "run" / "distilled"

    def ended(moment: Callable[[], Any], victim: str = "shoal") -> None:
        shoal = Shoal(tmp_path, "run", "--config", str(path), *settings)
        while not moment():
            assert shoal.process.poll() is None, shoal.said[-3000:]
            time.sleep(0.01)
        (rank,) = started = shoal.children()
        (shoal.process if victim == "shoal" else rank).send_signal(number)
        shoal.process.wait(timeout=60)
        all_gone(started)
        assert shoal.process.returncode not in (0, 2), shoal.said[-3000:]
        assert number == SIGKILL or "Traceback" not in shoal.said
        time.sleep(0.1)  # the next begins when nothing holds the run directory

    ended(lambda: (tmp_path / "run" / "run.json").exists())
    for victim in ("shoal", "rank", "shoal"):
        kept = newest(tmp_path / "run")
        ended(lambda kept=kept: newest(tmp_path / "run") > kept + chance.randrange(STEPS // 8), victim)
    assert not trained.exists()
    shoal = Shoal(tmp_path, "run", "--config", str(path), *settings)
    while not (tmp_path / "run/eval/teacher.json").exists():
        assert shoal.process.poll() is None, shoal.said[-3000:]
        time.sleep(0.01)
    shoal.process.send_signal(number)
    shoal.process.wait(timeout=60)
    assert trained.exists()
    assert "resuming from" in shoal.said
    assert "launcher" not in shoal.said
    shoal = Shoal(tmp_path, "run", "--config", str(path), *settings)
    assert shoal.process.wait(timeout=120) == 0, shoal.said[-3000:]
    assert (tmp_path / "run/report.html").exists()
    same_bits(
        Trial(path), Trial(once("alone", lambda folder: finished(run(pruned(folder, **SETTINGS)))) / "recipe.yaml")
    )


# --- what happens to files and to the clock -----------------------------------------------------------------------


def fill_disk(step: int, num_bytes: int, of_rank: int | None) -> None:
    """From the checkpoint of ``step`` on no file of a rank becomes larger; of_rank None = of any."""
    from shoal.train.trainer import DistillTrainer

    save = DistillTrainer._save_checkpoint

    def full(trainer: DistillTrainer, *args: Any) -> None:
        if trainer.state.global_step >= step and of_rank in (None, int(os.environ["RANK"])):
            resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))
        save(trainer, *args)

    DistillTrainer._save_checkpoint = full  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("of_rank", [0, 1, None])
def test_a_disk_that_fills_while_a_checkpoint_is_written(
    undisturbed: Trial, pruned: Any, tmp_path: Path, chance: random.Random, of_rank: int | None
) -> None:
    path, kept = pruned(tmp_path, **SETTINGS), 0
    sizes = [file.stat().st_size for file in undisturbed.dir.glob(f"checkpoints/checkpoint-{STEPS}/**/*.pt")]
    for step in sorted(chance.sample(range(2 * EVERY, STEPS, EVERY), MOMENTS)):
        hook = partial(fill_disk, step, chance.randrange(LEAST_BYTES, max(sizes)), of_rank)
        full = run(path, ranks=2, before=hook)
        assert full.result is not None
        assert full.result.returncode == 2, full.log[-3000:]
        assert "the disk is full, or your quota or file size limit is reached" in full.log
        assert "Traceback" not in full.log
        assert (tmp_path / "run/recipe.yaml").is_file(), "what it is made with is known"
        kept = newest(tmp_path / "run")
        assert kept == step - EVERY
    same_bits(goes_on(run(path, ranks=2), kept), undisturbed)


def test_a_checkpoint_that_is_torn_at_any_of_its_files(
    undisturbed: Trial, tmp_path: Path, chance: random.Random
) -> None:
    path = unfinished(undisturbed, tmp_path / "copy", step=STEPS)
    folder = path.parent / "run/checkpoints"
    last = folder / f"checkpoint-{STEPS}"
    inputs = json.loads((last / MANIFEST).read_bytes())["inputs"]
    files = {file: file.read_bytes() for file in last.rglob("*") if file.is_file() and file.stat().st_size}
    assert len(files) > 8
    assert last_complete(folder, inputs) == last
    for file, content in files.items():
        for size in (0, *(chance.randrange(len(content)) for _ in range(MOMENTS))):
            file.write_bytes(content[:size])
            assert last_complete(folder, inputs) == folder / f"checkpoint-{STEPS - EVERY}", (file, size)
        file.write_bytes(content)
    for file in chance.sample([*files], MOMENTS):
        os.truncate(file, chance.randrange(len(files[file])))
    same_bits(goes_on(run(path, ranks=2), STEPS - EVERY), undisturbed)


def set_clock_back(step: int, seconds: float) -> None:
    """In the middle of ``step``, counted from 1."""
    from shoal.train.trainer import DistillTrainer

    compute, now = DistillTrainer.compute_loss, time.time

    def late(trainer: DistillTrainer, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step + 1 == step:
            time.time = lambda: now() - seconds
        return compute(trainer, *args, **kwargs)

    DistillTrainer.compute_loss = late  # pyright: ignore[reportAttributeAccessIssue]


def test_a_clock_that_is_set_back(undisturbed: Trial, pruned: Any, tmp_path: Path, chance: random.Random) -> None:
    """Also the times of the files, of which the newest seem the oldest."""
    path, kept = pruned(tmp_path, **SETTINGS), 0
    for step in sorted(chance.sample(range(2 * EVERY, STEPS), MOMENTS)):
        set_back = partial(set_clock_back, chance.randrange(kept + 1, step + 1), chance.uniform(1, 1e6))
        stopped = run(path, ranks=2, before=partial(all_of, set_back, partial(terminate, step)))
        assert stopped.result is not None
        assert stopped.result.returncode == 143, stopped.log[-3000:]
        assert kept == 0 or "resuming from" in stopped.log
        kept = newest(tmp_path / "run")
        assert kept == step
        for file in (tmp_path / f"run/checkpoints/checkpoint-{kept}").rglob("*"):
            os.utime(file, times=(1e9, 1e9))
    same_bits(goes_on(run(path, ranks=2), kept), undisturbed)


def test_a_run_directory_that_is_moved_while_it_rests(
    undisturbed: Trial, pruned: Any, tmp_path: Path, chance: random.Random
) -> None:
    """It is then named itself, or by the recipe's run_dir."""
    path, place, kept = pruned(tmp_path, **SETTINGS), tmp_path / "run", 0
    for number, step in enumerate(sorted(chance.sample(range(1, STEPS), MOMENTS))):
        named = [str(path), f"run_dir={place}"] if number % 2 == 0 else [str(place)]
        stopped = run(Path(named[0]), *named[1:], ranks=2, before=partial(terminate, step))
        assert stopped.result is not None
        assert stopped.result.returncode == 143, stopped.log[-3000:]
        kept = newest(place)
        assert kept == step
        (tmp_path / str(number)).mkdir()
        place = place.rename(tmp_path / str(number) / "moved")
    goes_on(run(place, ranks=2), kept)
    place.rename(tmp_path / "run")
    same_bits(Trial(path), undisturbed)
