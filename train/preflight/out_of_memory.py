"""Memory that runs out all the same while models train: what to change, and that nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from shoal.errors import UserError

from ..engine.checkpoint import MANIFEST
from ..student.spec import TrainSpec

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
    lost = "nothing is lost but the steps of this start, of which none was saved yet"
    if saved:
        newest = max(saved, key=lambda name: int(name.removeprefix("checkpoint-")))
        lost = f"nothing is lost, the same command goes on from {newest}"
    rows, accumulation = spec.batch_split
    less = "use more ranks or a larger device"
    if rows > 1:
        micro = max(n for n in range(1, rows) if rows % n == 0)
        less = f"add distill.trainer.per_device_train_batch_size={micro}"
        if spec.settings.batch_size is None:  # else it follows
            less += f" distill.trainer.gradient_accumulation_steps={accumulation * rows // micro}"
    return f"{lost}. To take less, {less}; `shoal distill --dry-run` shows where memory goes and what fits"
