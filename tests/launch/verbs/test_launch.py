"""What ranks find in their environment that are started from here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shoal
from shoal.errors import UserError
from shoal.launch import cli
from shoal.launch.verbs import run as verbs
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
    monkeypatch.setattr(cli, "_refuse_early", look)
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
