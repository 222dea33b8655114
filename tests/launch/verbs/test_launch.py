"""What ranks find in their environment that are started from here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shoal.launch.cli import run_verb
from shoal.launch.verbs.launch import rank_environment
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


@pytest.mark.parametrize(("device", "seen"), [("cpu", ""), ("auto", "1")])
def test_a_recipe_for_the_cpu_hides_every_gpu_before_anything_else(
    monkeypatch: pytest.MonkeyPatch, device: str, seen: str
) -> None:
    """Of ranks too, which read the same recipe: DeepSpeed's launcher lets them see GPUs again."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert run_verb("measure", "demo:nonsense", [f"device={device}"]) == 2, "there is no such model"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen
