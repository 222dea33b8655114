"""Liger's kernels in the place of a model's own norms, MLPs and rotary embedding: interpreted, or stood in for."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shoal.errors import UserError
from shoal.train.engine import kernels
from shoal.train.engine.kernels import require_liger

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HAS_LIGER = all(importlib.util.find_spec(name) for name in ("liger_kernel", "triton"))


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIGER, reason="liger-kernel and triton are not installed")
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_interpreted_kernels_give_states_and_gradients_of_the_model(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "story.json"
    # triton asks when it is imported whether it is to interpret
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "interpreted_liger", kind, "float32", str(file)]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    story = json.loads(file.read_text())
    assert 0 < story["states"] < 1e-5
    assert 0 < story["gradients"] < 1e-4
    assert story["replaced"] >= 3, "two norms and an MLP"
    assert story["same_parameters"]
    assert story["same_names"]
    assert story["undone"]


@pytest.mark.parametrize(
    ("family", "device", "reason"),
    [("llama", CPU, "Liger's kernels run on GPUs, and this is a CPU"), ("gpt2", CUDA, "Liger has no kernels for gpt2")],
)
def test_kernels_that_cannot_be_had_are_refused(
    family: str, device: torch.device, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(kernels, "_families", lambda: {"llama": None})
    with pytest.raises(UserError, match=f"^distill.trainer.use_liger_kernel: {reason}; or set it to false$"):
        require_liger(family, device)
    require_liger("llama", CUDA)
