"""The curves of a training, step by step, and when they end it: a loss that is no number, or jumps, with the step's
batch kept for a look at it."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from shoal.errors import UserError, explained_disk_errors
from shoal.ranks import rank

REMEMBERED_STEPS = 32
"""A jump is one from the median of so many steps before it; fewer than half of them say nothing yet."""
FLOOR = 1e-3
"""A usual loss below this is rounding, of which any multiple may come."""
LEAST_FIRST = 1.0
"""Nats; a lower loss of the first step counts as this: its batch may be of a source that is easy, or have other losses
than the next. Guessing among all tokens costs about 12."""


class LossGuard:
    """Tells a healthy step from one after which nothing that is learnt can be trusted.

    A NaN never heals: later steps only spread it into every weight and every checkpoint. A spike may heal, but what
    it has undone is paid for twice, and its batch is the first thing to look at.
    """

    def __init__(self, spike: float | None) -> None:
        self._spike = spike
        self.recent: deque[float] = deque(maxlen=REMEMBERED_STEPS)
        """Losses of the last steps, which the next life of this training goes on with."""
        self.first: float | None = None
        """Loss of the first step, which nothing has been learnt for; kept like those."""

    def problem(self, values: dict[str, float]) -> str | None:
        """What is wrong with a step whose means are ``values``; its loss is remembered if nothing is."""
        for name, value in values.items():
            if not math.isfinite(value):
                return f"{name} is {value}"
        loss = values["loss"]
        if self.first is None:
            self.first = loss
        if self._spike is not None and len(self.recent) >= REMEMBERED_STEPS // 2:
            usual = statistics.median(self.recent)
            if abs(loss) > self._spike * max(abs(usual), FLOOR):
                return (
                    f"the loss is {loss:.4g}, more than distill.stop_on_spike ({self._spike:g}) times {usual:.4g}, "
                    f"the median of the {len(self.recent)} steps before"
                )
        # the median would follow a training that diverges from its first steps on
        usual = max(abs(self.first), LEAST_FIRST)
        if self._spike is not None and abs(loss) > self._spike * usual:
            return (
                f"the loss is {loss:.4g}, more than distill.stop_on_spike ({self._spike:g}) times {usual:.4g}, and was "
                f"{self.first:.4g} before training"
            )
        self.recent.append(loss)
        return None


class CurveRow:
    """Sums of the curves over the steps since their last row, and the seconds that steps took, without the time for
    scoring and saving between them.

    A checkpoint has it, so that a row inside of which training stopped is the mean over the same steps as without the
    stop, and the guard has the same losses to compare the next one with.
    """

    def __init__(self, num_sums: int, guard: LossGuard) -> None:
        self._guard = guard
        self.sums, self.num_steps = [0.0] * num_sums, 0
        self.seconds = self.row_seconds = 0.0
        """Of all steps, those of earlier lives included, and of those since the last row."""
        self._began = 0.0

    def step_begins(self) -> None:
        """Its batch is asked for now."""
        self._began = time.monotonic()

    def add(self, of_step: Sequence[float]) -> None:
        """Count one more step, which ends now."""
        self.sums = [before + added for before, added in zip(self.sums, of_step, strict=True)]
        self.num_steps += 1
        took = time.monotonic() - self._began
        self.seconds, self.row_seconds = self.seconds + took, self.row_seconds + took

    def begin(self) -> None:
        """Begin the next row."""
        self.sums, self.num_steps, self.row_seconds = [0.0] * len(self.sums), 0, 0.0

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        times = {"seconds": self.seconds, "row seconds": self.row_seconds}
        losses = {"recent losses": list(self._guard.recent), "first loss": self._guard.first}
        return {"sums": self.sums, "num_steps": self.num_steps, **losses, **times}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.sums, self.num_steps = list(state["sums"]), state["num_steps"]
        self._guard.recent.clear()
        self._guard.recent.extend(state["recent losses"])
        self._guard.first = state.get("first loss")  # checkpoints before 0.2 have none
        self.seconds, self.row_seconds = state["seconds"], state["row seconds"]


def judged_norm(norm: float, scaler: torch.amp.GradScaler | None) -> float | None:
    """The norm of a step's gradient, NaN where it is no number; None = the step overflowed and was left out, by which
    ``scaler`` finds its scale: it is lower now, and below 1 no scale is the reason any more."""
    if 0 <= norm < math.inf:
        return norm
    # DeepSpeed calls one that is no number -1 or infinite, depending on the stage, and goes on
    return math.nan if scaler is None or scaler.get_scale() < 1 else None


def refuse_step(problem: str, step: int, batches: Sequence[dict[str, Tensor]], folder: Path | None) -> UserError:
    """The error that ends the training; every rank calls this and writes its micro-batches to ``folder``, if any."""
    if folder is None:
        return UserError(f"step {step}: {problem}; lower the learning rate, or remove that text")
    where = folder / f"step-{step}"
    with explained_disk_errors(where):
        where.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{index}.{name}": value.detach().cpu().contiguous()
            for index, batch in enumerate(batches)
            for name, value in batch.items()
            if isinstance(value, Tensor)
        }
        save_file(tensors, where / f"rank-{rank()}.safetensors", metadata={"shoal": json.dumps({"step": step})})
    return UserError(
        f"step {step}: {problem}. The batch is saved in {where}. Lower distill.trainer.learning_rate or "
        "max_grad_norm, or remove that text from its source, and start again in another run_dir"
    )


def numbers(values: Tensor, *more: Tensor | float) -> list[float]:
    """All of them as numbers, for which the host waits once."""
    on_device = (
        value.to(values.device, values.dtype, non_blocking=True)
        if isinstance(value, Tensor)
        else values.new_full((), value)
        for value in more
    )
    return torch.cat([values, *(value.reshape(1) for value in on_device)]).tolist()
