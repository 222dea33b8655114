"""What training tells while it goes on: steps, loss, rate and time left on the terminal, its curves in W&B."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import WandbCallback

from shoal.progress import doing, progress
from shoal.redaction import redacted
from shoal.tracking.wandb_run import attempt, is_tracking


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


class Curves(WandbCallback):
    """transformers' own callback in the W&B run of the run directory; where that fails, it is said once, and training
    goes on."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self._run_dir = run_dir

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        public = copy.copy(args)
        public.to_dict = lambda: redacted(args.to_dict())
        if is_tracking():
            with attempt("curves could not be begun", self._run_dir):
                super().on_train_begin(public, state, control, model=model, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **kwargs: Any) -> None:
        if is_tracking():
            with attempt("curves could not be logged", self._run_dir):
                super().on_log(args, state, control, model=model, logs=logs, **kwargs)
