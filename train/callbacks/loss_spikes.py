"""A loss that is no number, or jumps, ends the training with the step's batch kept for a look at it."""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from shoal.errors import UserError, explained_disk_errors
from shoal.ranks import rank

REMEMBERED_STEPS = 32
"""A jump is one from the median of so many steps before it; fewer than half of them say nothing yet."""


FLOOR = 1e-3
"""A usual loss below this is rounding, of which any multiple may come."""


class LossGuard:
    """Tells a healthy step from one after which nothing that is learnt can be trusted.

    A NaN never heals: later steps only spread it into every weight and every checkpoint. A spike may heal, but what
    it has undone is paid for twice, and its batch is the first thing to look at.
    """

    def __init__(self, spike: float | None) -> None:
        self._spike = spike
        self._recent: deque[float] = deque(maxlen=REMEMBERED_STEPS)

    def problem(self, values: dict[str, float]) -> str | None:
        """What is wrong with a step whose means are ``values``; its loss is remembered if nothing is."""
        for name, value in values.items():
            if not math.isfinite(value):
                return f"{name} is {value}"
        loss = values["loss"]
        if self._spike is not None and len(self._recent) >= REMEMBERED_STEPS // 2:
            usual = statistics.median(self._recent)
            if abs(loss) > self._spike * max(abs(usual), FLOOR):
                return (
                    f"the loss is {loss:.4g}, more than distill.stop_on_spike: {self._spike:g} times {usual:.4g}, "
                    f"the median of the {len(self._recent)} steps before"
                )
        self._recent.append(loss)
        return None

    @property
    def recent(self) -> list[float]:
        """Losses of the last steps, to be remembered by the next life of this training."""
        return list(self._recent)

    def remember(self, losses: Sequence[float]) -> None:
        """Losses of an earlier life of this training, and of no other one."""
        self._recent.clear()
        self._recent.extend(losses)


def refuse_step(problem: str, step: int, batches: Sequence[dict[str, Tensor]], folder: Path | None) -> UserError:
    """The error that ends the training; every rank calls this and writes its micro-batches to ``folder``, if any."""
    if folder is None:
        return UserError(f"step {step}: {problem}; lower the learning rate, or take the text out")
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
        f"step {step}: {problem}; the step's batch is in {where} (shoal.train.callbacks.loss_spikes.load_batches). "
        "Lower distill.trainer.learning_rate or max_grad_norm, or take the text out, and start again in another run_dir"
    )


def load_batches(folder: Path) -> list[dict[str, Tensor]]:
    """The micro-batches of a step that was refused, rank after rank, as the training saw them."""
    micro_batches = []
    for file in sorted(folder.glob("rank-*.safetensors"), key=lambda path: int(path.stem.removeprefix("rank-"))):
        batches: dict[int, dict[str, Tensor]] = {}
        for key, value in load_file(file).items():
            index, name = key.split(".", 1)
            batches.setdefault(int(index), {})[name] = value
        micro_batches += [batches[index] for index in sorted(batches)]
    return micro_batches
