"""The Trainer's curves in the W&B run of the run directory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers.integrations.integration_utils import WandbCallback

from shoal.redaction import redacted
from shoal.tracking.wandb_run import attempt, is_tracking


class Curves(WandbCallback):
    """transformers' own callback; but where that fails, it is said once, and training goes on."""

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
