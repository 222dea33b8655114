"""Whole trainings, through the distill verb, with what makes them faster, and one that runs out of memory."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import Trial, compile_graphs_only, finished, recipe, run, run_out_of_memory, unfinished

pytestmark = pytest.mark.slow

SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 2}
LOSSES = [{"kind": "forward_kl"}, {"kind": "hidden_states", "weight": 0.5}]
CUDA_FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB"
BLAS_FULL = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
HOST_FULL = (
    "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
)


def settings(**more: Any) -> dict[str, Any]:
    return {"losses": LOSSES, "trainable": "from_first_cut", "deepspeed": "zero2", **more}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, teacher: Path, cut: Path) -> Trial:
    return finished(run(recipe(tmp_path_factory.mktemp("plain"), teacher, cut, **settings(trainer=SAVED))))


@pytest.mark.prove
def test_a_compiled_training_is_the_plain_one_and_goes_on_bit_for_bit(
    plain: Trial, teacher: Path, cut: Path, tmp_path: Path
) -> None:
    checkpointed = {**SAVED, "gradient_checkpointing": True}
    path = recipe(tmp_path / "whole", teacher, cut, **settings(trainer={**checkpointed, "torch_compile": True}))
    whole = finished(run(path, before=compile_graphs_only))
    assert "compile: 2 layers of the student, 6 of the teacher and the loss at the head" in whole.log
    assert "cannot be compiled" not in whole.log
    assert whole.curve() == pytest.approx(plain.curve(), abs=1e-6), "graphs add up in another order"
    assert whole.training.provenance.inputs["distill.trainer.torch_compile"] is True
    assert "distill.trainer.torch_compile" not in plain.training.provenance.inputs
    on = finished(run(unfinished(whole, tmp_path / "on", step=4), before=compile_graphs_only))
    for name, weight in whole.weights().items():
        assert torch.equal(weight, on.weights()[name]), name


@pytest.mark.prove
@pytest.mark.parametrize(
    ("full", "step"), [(CUDA_FULL, 6), (BLAS_FULL, 6), (HOST_FULL, 5)], ids=["device", "BLAS", "host, while it saves"]
)
def test_memory_that_runs_out_says_what_to_change_and_what_is_kept(
    teacher: Path, cut: Path, tmp_path: Path, full: str, step: int, plain: Trial
) -> None:
    path = recipe(tmp_path, teacher, cut, **settings(trainer=SAVED))
    refused = run(path, before=partial(run_out_of_memory, step, full))
    assert refused.result is not None
    assert refused.result.returncode == 2, refused.log[-3000:]
    assert f"out of memory while training: {full[:60]}" in refused.log
    assert "the same command resumes from the last checkpoint" in refused.log
    assert "Traceback" not in refused.log
    kept = [*(path.parent / "run/checkpoints").glob("checkpoint-*")]
    assert len(kept) == (step == 6), "what was being written is no checkpoint"
    added = "distill.trainer.per_device_train_batch_size=2"
    assert f"To use less, add {added}" in refused.log
    assert finished(run(path, added)).curve() == pytest.approx(plain.curve(), abs=1e-5)


@pytest.mark.prove
def test_kernels_that_are_not_here_are_refused_before_training(teacher: Path, cut: Path, tmp_path: Path) -> None:
    refused = run(recipe(tmp_path, teacher, cut, **settings(trainer={"use_liger_kernel": True})))
    assert refused.result is not None
    assert refused.result.returncode == 2, refused.log[-3000:]
    assert "distill.trainer.use_liger_kernel: " in refused.log
