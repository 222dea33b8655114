"""Arguments of transformers.TrainingArguments that `distill.trainer` may say, without loading the library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from shoal.formatting import meant
from shoal.recipe.field_words import TRAINING_ARGUMENTS, field_word

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
"""What differs from transformers' own defaults, in a recipe and in Python."""
HALVES = {"bf16": "bf16-mixed", "fp16": "fp16-mixed"}
"""Arguments that are distill.precision here."""
OURS = ("use_liger_kernel", "torch_compile")
"""Arguments by which shoal does the work itself: its loss takes the place of a model's forward."""
_REASONS: dict[str, str] = {
    "output_dir run_name": "is set by shoal; use run_dir instead",
    "deepspeed": "is set by shoal; use distill.deepspeed instead",
    "seed": "is set by shoal; use seed instead",
    "resume_from_checkpoint": "is set by shoal; use the same command again instead",
    "report_to": "is set by shoal; use track.wandb instead",
    "use_cpu remove_unused_columns label_names": "is set by shoal; leave it out",
    "average_tokens_across_devices": "the loss is always averaged over the tokens of all ranks; leave it out",
    "neftune_noise_alpha label_smoothing_factor": "would have no effect on the loss here; leave it out",
    "ignore_data_skip": "would train the same text again after a resume; leave it out",
    "auto_find_batch_size": "would change the batch, and with it the curve, in the middle of a run; leave it out",
    "save_only_model": "would make checkpoints that cannot be resumed; leave it out",
    "load_best_model_at_end": "is done by distill.watch.metric_for_best_model; use that",
    "eval_strategy do_eval eval_on_start": "is done by distill.watch; use that",
    "train_sampling_strategy data_seed": "would have no effect, packing has drawn the order; use seed",
    "push_to_hub": "is done by export.hub_repo; use that",
    "hub_token": "secrets do not belong in a recipe; run `hf auth login`",
    "torch_compile_backend torch_compile_mode": "would have no effect, layers are compiled by inductor; leave it out",
}
REFUSED_ARGUMENTS = {name: reason for names, reason in _REASONS.items() for name in names.split()}
"""Training arguments that would be wrong, ignored or leaked here."""
REFUSED_VALUES: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("lr_scheduler_type", ("reduce_lr_on_plateau", "greedy"), "needs an eval set; choose another, such as cosine"),
    ("save_strategy", ("best",), "needs an eval set; choose steps, and set distill.watch.metric_for_best_model"),
    ("accelerator_config.split_batches", (True,), "would share one rank's rows out to all; set distill.batch_size"),
    ("gradient_checkpointing_kwargs.use_reentrant", (True,), "loses gradients above frozen layers; set it to false"),
    ("activation_checkpointing_kwargs.use_reentrant", (True,), "loses gradients above frozen layers; set it to false"),
)
"""Values of training arguments, or of a key of one, that a training here cannot have."""
NEUTRAL = {
    *("save_steps", "save_strategy", "save_total_limit"),
    *("logging_steps", "disable_tqdm", "dataloader_num_workers", "ddp_timeout"),
}
"""Training arguments that change how the work is done and not its result: a run may go on with others."""


def wrong_arguments(trainer: Mapping[str, Any]) -> Iterator[str]:
    """`place: what is wrong`, for what ``trainer`` must not say; the values of most are looked at with transformers."""
    for name in trainer:
        known = f"here it is {word}" if (word := field_word(name)) else "see transformers.TrainingArguments"
        if name in REFUSED_ARGUMENTS:
            yield f"distill.trainer.{name}: {REFUSED_ARGUMENTS[name]}"
        elif name not in TRAINING_ARGUMENTS:
            hint = meant(name, TRAINING_ARGUMENTS, known, cutoff=0.7)
            yield f"distill.trainer.{name}: no such training argument; {hint}"
    seconds = trainer.get("ddp_timeout", 1)
    if not isinstance(seconds, int) or isinstance(seconds, bool) or seconds < 1:
        yield f"distill.trainer.ddp_timeout: must be a whole number of seconds above 0 (got {seconds!r})"
    for place, values, reason in REFUSED_VALUES:
        name, _, inner = place.partition(".")
        value = trainer.get(name)
        if inner:
            value = value.get(inner) if isinstance(value, dict) else None
        if value in values:
            yield f"distill.trainer.{place}: {value} {reason}"
