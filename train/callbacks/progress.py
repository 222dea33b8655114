"""Training as a piece of work that tells how far it is: steps, loss, rate, time left."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from transformers import TrainerCallback

from shoal.progress import doing, progress


class Progress(TrainerCallback):
    """Tells steps and the time left by the clock, scoring and saving included, and beside them loss and tokens per
    second over all ranks, which is the report's rate: from the beginning, without scoring and saving.

    Entered around the whole of Trainer.train, which sets up DeepSpeed and reads a checkpoint before the first step.
    """

    def __init__(self, *, tokens_per_step: int) -> None:
        self._tokens_per_step = tokens_per_step
        self._told = ExitStack()

    def __enter__(self) -> Progress:
        self._told.enter_context(doing("setting up DeepSpeed"))
        return self

    def __exit__(self, *failure: Any) -> None:
        self._told.__exit__(*failure)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._told.close()
        self._work = self._told.enter_context(progress("training", total=state.max_steps, unit="steps"))
        self._work.known(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._work(state.global_step - self._work.done)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "seconds" in logs:
            rate = state.global_step * self._tokens_per_step / max(logs["seconds"], 1e-9)
            self._work.note = f"loss {logs['loss']:.4f}, {rate:,.0f} tokens/s"
