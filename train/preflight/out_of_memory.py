"""Memory that runs out all the same while models train: what to change, and that nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from shoal.errors import UserError
from shoal.formatting import bytes_text

from ..engine.checkpoint import MANIFEST
from ..student.spec import TrainSpec
from .fit import overrides, proposals
from .memory import Memory, Setting, memory
from .run_size import Job, job

LESS = 0.9
"""Share of what is expected now that a proposal may take: less of a difference would be within the estimate's error."""
IS_FULL = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""Words for memory that runs out of the host, and outside torch's own allocator of a device."""


@contextmanager
def explained_memory(spec: TrainSpec, run_dir: Path) -> Iterator[None]:
    """Turn memory that runs out while the training in ``run_dir`` goes on into a UserError.

    Raises:
        UserError: it did; with what to change and where the same command goes on.
    """
    try:
        yield
    except RuntimeError as error:  # as torch's for a GPU is, too
        if not isinstance(error, torch.OutOfMemoryError) and not any(words in str(error) for words in IS_FULL):
            raise
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"out of memory while training: {reason}; {_remedy(spec, run_dir)}") from error


def _remedy(spec: TrainSpec, run_dir: Path) -> str:
    saved = [file.parent.name for file in run_dir.glob(f"checkpoints/checkpoint-*/{MANIFEST}")]
    if saved:
        newest = max(saved, key=lambda name: int(name.removeprefix("checkpoint-")))
        lost = f"nothing is lost, the same command goes on from {newest}"
    else:
        lost = "nothing is lost but the steps of this start, of which none was saved yet"
    try:
        size = job(spec)
    except RuntimeError:  # a family that cannot be run without data: no figures
        size = None
    better = None if size is None else _lower(size, goes_on=bool(saved))
    if size is not None and better is not None:
        changes = " ".join(overrides(size, better))
        now, then = (
            bytes_text(_in_a_step(memory(size.student, size.teacher, each))) for each in (size.setting, better)
        )
        return f"{lost}. Add {changes}: about {then} instead of {now} for models, gradients and one step's work"
    return (
        f"{lost}. Lower distill.trainer.per_device_train_batch_size (with distill.batch_size set, which keeps the "
        "step), or use more ranks or a larger device; `shoal distill --dry-run` shows where memory goes"
    )


def _lower(size: Job, *, goes_on: bool) -> Setting | None:
    """The first proposal that takes clearly less; ``goes_on``: and with which checkpoints of now go on."""
    now = size.setting
    for setting in proposals(size):
        as_now = (setting.stage, setting.checkpointing) == (now.stage, now.checkpointing)
        offloads_as_now = setting.offload_optimizer == now.offload_optimizer and setting.teacher != "recorded"
        if goes_on and not (as_now and offloads_as_now and setting.offload_parameters == now.offload_parameters):
            continue
        if _in_a_step(memory(size.student, size.teacher, setting)) <= LESS * _in_a_step(size.memory):
            return setting
    return None


def _in_a_step(needed: Memory) -> int:
    """Bytes of all that is held in a step, at one moment of it or another: not of what happens beside steps, and not of
    the process, which no setting makes smaller."""
    states = needed.weights + needed.gradients + needed.optimizer + needed.teacher
    return states + needed.activations + needed.head + needed.buffers
