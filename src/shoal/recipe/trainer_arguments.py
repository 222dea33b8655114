"""Arguments of transformers.TrainingArguments that `distill.trainer` may say, without loading the library."""

from __future__ import annotations

from typing import Any

DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "adam_beta2": 0.95,
    "max_grad_norm": 1.0,
    "num_train_epochs": 1,
    "logging_steps": 1,
    "logging_nan_inf_filter": False,  # asks the device in every micro-batch; a loss that is no number ends the training
    "save_steps": 0.25,
    "disable_tqdm": True,
}
"""What differs from transformers' own defaults; `distill.trainer` overrides each."""
OURS = ("use_liger_kernel", "torch_compile")
"""Arguments by which shoal does the work itself: its loss takes the place of a model's forward."""
