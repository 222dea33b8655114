"""Liger's kernels in the place of a model's own norms, MLPs and rotary embedding: interpreted, or stood in for."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers
from shoal.train.engine import fused
from shoal.train.engine.fused import Fused, is_fused, why_not_fused

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HAS_LIGER = all(importlib.util.find_spec(name) for name in ("liger_kernel", "triton"))


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIGER, reason="liger-kernel and triton are not installed")
@pytest.mark.parametrize(
    ("kind", "dtype", "states", "gradients"),
    [("llama", "float32", 1e-5, 1e-4), ("qwen3", "float32", 1e-5, 1e-4), ("gemma3", "float32", 1e-5, 1e-4)],
)
def test_interpreted_kernels_give_states_and_gradients_of_the_model(
    kind: str, dtype: str, states: float, gradients: float, tmp_path: Path
) -> None:
    file = tmp_path / "story.json"
    # triton asks when it is imported whether it is to interpret
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "interpreted_liger", kind, dtype, str(file)]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    story = json.loads(file.read_text())
    assert 0 < story["states"] < states
    assert 0 < story["gradients"] < gradients
    assert story["replaced"] >= 3, "two norms and an MLP"
    assert story["same_parameters"]
    assert story["same_names"]
    assert story["undone"]
    assert story["differing"] is None


def stand_in(factor: float) -> Callable[..., None]:
    """What Liger does to a Llama, with norms that are ``factor`` times as large."""

    def norm(self: Any, states: Tensor) -> Tensor:
        return factor * type(self).forward(self, states)

    def apply(
        rope: bool = True,
        cross_entropy: bool = True,
        fused_linear_cross_entropy: bool = True,
        rms_norm: bool = True,
        *,
        model: PreTrainedModel,
    ) -> None:
        assert not cross_entropy
        assert not fused_linear_cross_entropy
        assert rope
        assert rms_norm
        rotate = modeling_llama.apply_rotary_pos_emb
        modeling_llama.apply_rotary_pos_emb = lambda *args, **kwargs: rotate(*args, **kwargs)
        modeling_llama.LlamaMLP = nn.Identity  # pyright: ignore[reportAttributeAccessIssue]
        for layer in decoder_layers(model):
            norms: Any = layer.input_layernorm
            norms.offset = 0.0
            vars(norms)["forward"] = norm.__get__(norms)

    return apply


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Have kernels for Llama whose norms are so many times too large."""
    monkeypatch.setattr(fused.importlib.util, "find_spec", lambda name: name)
    return lambda factor: monkeypatch.setattr(fused, "_families", lambda: {"llama": stand_in(factor)})


def test_kernels_that_compute_something_else_are_found_before_training(liger: Callable[[float], None]) -> None:
    model = tiny_model("llama")
    liger(1.0)
    assert Fused([model]).differing(CPU, autocast_dtype=None) is None
    liger(1.05)
    problem = Fused([model]).differing(CPU, autocast_dtype=torch.bfloat16)
    assert problem is not None
    assert problem.endswith("of their norm apart, 0.02 may be rounding")
    assert "forward" not in vars(decoder_layers(model)[0].input_layernorm)


@pytest.mark.parametrize(
    ("family", "device", "reason"),
    [
        ("llama", CPU, "Liger's kernels run on GPUs, and this is a CPU"),
        ("gpt2", CUDA, "Liger has no kernels for gpt2"),
    ],
)
def test_kernels_that_cannot_be_had_are_refused_or_done_without(
    family: str, device: torch.device, reason: str, liger: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    liger(1.0)
    assert why_not_fused(family, device) == reason
    assert not is_fused("auto", family, device)
    assert not is_fused(False, family, device)
    with pytest.raises(UserError, match=f"^distill.fused: {reason}; or set fused: false$"):
        is_fused(True, family, device)
    assert is_fused(True, "llama", CUDA)
