"""The Trainer's curves in the W&B run of the run directory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import WandbCallback

from shoal.redaction import redacted
from shoal.tracking.wandb_run import attempt, is_tracking


class Curves(TrainerCallback):
    """What transformers' own callback logs; but where that fails, it is said once, and training goes on.

    Its other hooks upload checkpoints where an environment variable says so, which only the recipe may.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._callback = WandbCallback()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if is_tracking():
            with attempt("curves could not be begun", self._run_dir):
                public: Any = copy.copy(args)
                public.to_dict = lambda: redacted(args.to_dict())
                self._callback.on_train_begin(public, state, control, **kwargs)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if is_tracking():
            with attempt("curves could not be logged", self._run_dir):
                self._callback.on_log(args, state, control, **kwargs)
