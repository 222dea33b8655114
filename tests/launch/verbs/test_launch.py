"""What ranks find in their environment that are started from here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import environment
from training_runs import Trial, finished, run

import shoal
from shoal import machine
from shoal.errors import UserError
from shoal.launch import cli, early
from shoal.launch.api import running
from shoal.launch.verbs import pace
from shoal.launch.verbs import run as verbs
from shoal.launch.verbs.launch import LaunchEnded, rank_environment
from shoal.machine import bfloat16_instructions
from shoal.ranks import free_port

SEEN = """import os, sys
from shoal.launch.verbs.launch import see_devices
see_devices()
assert "torch" not in sys.modules, "devices are looked for before they are chosen"
open(os.environ["RANK"], "w").write(str(os.environ.get("CUDA_VISIBLE_DEVICES")))
"""


@pytest.mark.parametrize(
    "visible",
    [
        "4,5",
        pytest.param("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6,GPU-0d", marks=pytest.mark.prove),
        pytest.param("MIG-7d,MIG-8e", marks=pytest.mark.prove),
        pytest.param("7", marks=pytest.mark.prove),
    ],
)
@pytest.mark.slow
def test_ranks_see_the_devices_that_the_command_was_told_to_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str
) -> None:
    """DeepSpeed's launcher alone would let them train on GPUs 0 and 1, whoever uses these."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (tmp_path / "seen.py").write_text(SEEN, encoding="utf-8")
    ranks = len(visible.split(","))
    command = (
        f"-m deepspeed.launcher.runner --num_gpus {ranks} --master_port {free_port()} --no_local_rank --module seen"
    )
    environment = rank_environment(ranks) | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(tmp_path)}
    del environment["PYTHONSAFEPATH"]
    subprocess.run([sys.executable, *command.split()], env=environment, cwd=tmp_path, check=True, capture_output=True)
    assert [(tmp_path / str(rank)).read_text(encoding="utf-8") for rank in range(ranks)] == [visible] * ranks


NOTHING_ELSE = """import subprocess, sys
from shoal.launch.cli import main
popen = subprocess.Popen
def refusing(command, *more, **options):
    assert command[0] != sys.executable, command
    return popen(command, *more, **options)
subprocess.Popen = refusing
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_run_on_one_cpu_starts_no_other_python_and_trains_what_a_started_rank_does(
    tmp_path: Path, pruned: Any
) -> None:
    """Loading torch, transformers and DeepSpeed takes as long as the whole of a small training."""
    path, other = (pruned(tmp_path / name) for name in ("forked", "started"))
    command = [sys.executable, "-c", NOTHING_ELSE, "run", str(path), "measure.num_tokens=512", "device=cpu"]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "distill: starting 1 rank(s)\n" in done.stderr
    ours, theirs = Trial(path), finished(run(other))
    assert ours.curve() == theirs.curve()
    assert all(torch.equal(weight, ours.weights()[name]) for name, weight in theirs.weights().items())


@pytest.mark.parametrize("door", ["shoal", "shoal.run"])
def test_a_recipe_for_the_cpu_hides_every_gpu_while_it_runs_and_not_longer(
    monkeypatch: pytest.MonkeyPatch, door: str
) -> None:
    """A notebook's next run, or the next of --each, may be for a GPU."""
    seen = []

    def look(*_: object, **__: object) -> None:
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
        os.environ["DS_ACCELERATOR"] = "cpu"  # as where torch sees no GPU
        raise UserError("seen")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(early, "refuse_early", look)
    monkeypatch.setattr(running, "refuse_early", lambda *_: None)
    monkeypatch.setattr(verbs, "open_run", look)
    before = dict(os.environ)
    for device in ("cpu", "auto"):
        if door == "shoal":
            assert cli.run_verb("measure", "quickstart", [f"device={device}"]) == 2
        else:
            with pytest.raises(UserError, match="seen"):
                shoal.run("quickstart", f"device={device}")
        assert dict(os.environ) == before
    assert seen == ["", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("verb", [pytest.param("run", marks=pytest.mark.prove), "measure"])
def test_what_starts_ranks_leaves_every_gpu_to_them(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """A context of the process that waits would take memory, and all of a GPU in exclusive mode. This torch, made
    without CUDA, refuses to make one."""
    started, asked = [], []

    def launch(verb: str, run: verbs.Run, **_: object) -> None:
        told = json.loads((run.dir / "run.json").read_text(encoding="utf-8"))
        started.append((verb, run.recipe.dtype, told["environment"]["device"]))
        raise LaunchEnded(9)

    def answers(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command[-2:])
        told = ["a card without a data sheet", [9, 0]] if command[-2] == "card" else 1e15
        return subprocess.CompletedProcess(command, 0, stdout=json.dumps(told), stderr="")

    gpu = torch.device("cuda")
    monkeypatch.setattr(pace, "run_seconds", lambda *runs: [machine.flops_per_second(gpu, torch.bfloat16)] * 2)
    monkeypatch.setattr(cli, "launch_ranks", launch)
    monkeypatch.setattr(machine.subprocess, "run", answers)
    monkeypatch.setattr(machine, "bfloat16_instructions", bfloat16_instructions)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: gpu)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # a training in this process leaves them
        monkeypatch.delenv(name, raising=False)
    machine._asked.cache_clear()
    settings = [f"run_dir={tmp_path / 'run'}", "max_minutes=9000", "eval.tasks=retrieval", "eval.limit=2"]
    assert cli.run_verb(verb, str(teacher), settings) == 9
    assert started == [("measure", "bfloat16", "a card without a data sheet")]
    assert asked == [["card", "0"], ["rate", '"bfloat16"']]


@pytest.mark.slow
def test_a_gpu_that_does_not_answer_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # a training in this process leaves them
        monkeypatch.delenv(name, raising=False)
    machine._asked.cache_clear()
    with pytest.raises(
        UserError, match=r"device: the GPU does not respond: .*(compiled with CUDA|NVIDIA driver).*; see `nvidia-smi`"
    ):
        machine.card()
