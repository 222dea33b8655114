"""One line per logged step on rank 0: loss, rate, time left."""

from __future__ import annotations

import logging
import time
from typing import Any

from transformers import TrainerCallback

from shoal.runtime import is_main

log = logging.getLogger(__name__)

EVERY_S = 10.0
"""Least time between two lines, so that a fast run does not scroll away what came before it."""


class Progress(TrainerCallback):
    """Logs loss, tokens per second over all ranks and the time left.

    The rate is that of the report: from the beginning, without the time for scoring and saving. What is left of this
    training includes such time, as far as it took any until now.
    """

    def __init__(self, *, tokens_per_step: int) -> None:
        self._tokens_per_step = tokens_per_step
        self._started = (0, time.monotonic())
        self._last_line = float("-inf")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = (state.global_step, time.monotonic())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not is_main() or not logs or "seconds" not in logs:
            return
        now = time.monotonic()
        if now - self._last_line < EVERY_S and state.global_step < state.max_steps:
            return
        self._last_line = now
        steps = state.global_step - self._started[0]
        seconds_per_step = (now - self._started[1]) / max(steps, 1)
        left = seconds_per_step * (state.max_steps - state.global_step)
        log.info(
            "step %d/%d  loss %.4f  %.0f tokens/s  %d:%02d left",
            state.global_step,
            state.max_steps,
            logs["loss"],
            state.global_step * self._tokens_per_step / max(logs["seconds"], 1e-9),
            *divmod(int(left), 60),
        )
