"""The settings of a distillation as a Trainer script takes them, and what of peft's settings means the same here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from peft import LoraConfig
from transformers import SchedulerType, TrainingArguments

from shoal.errors import UserError
from shoal.recipe.distill import Distill, Lora, Packing, Trainable
from shoal.recipe.losses import LossTerm
from shoal.recipe.messages import checked
from shoal.recipe.section import plain_value
from shoal.recipe.trainer_arguments import DEFAULTS, OURS, RANGES

Losses = str | Mapping[str, Any] | LossTerm | Sequence[str | Mapping[str, Any] | LossTerm]
"""One loss term or several, each as its kind (`"forward_kl"`), as a mapping (`{"kind": "jsd", "beta": 0.1}`) or as a
dataclass of shoal.recipe.losses; `shoal list losses` prints all kinds."""
SAME_AS_IN_RECIPE = ("sequence_length", "packing", "on_policy", "stop_on_spike")
"""Keys of the recipe's section `distill` that mean the same here, with the same defaults."""


@dataclass
class DistillationConfig(TrainingArguments):
    """transformers' TrainingArguments with shoal's defaults, and the settings of losses and data.

    Recipes use the same class, so both train in the same way.

    Example:
        >>> shoal.DistillationConfig("distilled", losses="forward_kl", learning_rate=2e-4).sequence_length
        512
    """

    per_device_train_batch_size: int = DEFAULTS["per_device_train_batch_size"]
    learning_rate: float = DEFAULTS["learning_rate"]
    lr_scheduler_type: SchedulerType | str = DEFAULTS["lr_scheduler_type"]
    warmup_steps: float = DEFAULTS["warmup_steps"]
    """Number of steps; below 1, a share of all steps."""
    adam_beta2: float = DEFAULTS["adam_beta2"]
    num_train_epochs: float = DEFAULTS["num_train_epochs"]
    logging_steps: float = DEFAULTS["logging_steps"]
    logging_nan_inf_filter: bool = DEFAULTS["logging_nan_inf_filter"]
    save_steps: float = DEFAULTS["save_steps"]
    disable_tqdm: bool | None = DEFAULTS["disable_tqdm"]
    losses: Any = "forward_kl"
    """One or several terms: names (`"forward_kl"`) or mappings (`{"kind": "jsd", "beta": 0.1}`)."""
    trainable: Trainable | None = "all"
    """Weights to train, as in distill.trainable; None = those with requires_grad."""
    sequence_length: int = Distill.sequence_length
    """Tokens of one row."""
    packing: Packing = Distill.packing
    """Packing of documents into rows, as in distill.packing."""
    on_policy: dict[str, Any] | None = None
    """Training on the student's own samples, as in distill.on_policy; None = none."""
    loss_on: Literal["assistant", "all"] | None = None
    """Tokens of conversations to train on; None = those of the assistant."""
    stop_on_spike: float | None = Distill.stop_on_spike
    """Stop if the loss exceeds this multiple of the recent median; None = stop only on NaN or infinity."""
    teacher_model_init_kwargs: dict[str, Any] | None = None
    """Arguments of from_pretrained for a teacher given by name: `dtype`, `revision`, ..."""

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except (ValueError, TypeError) as error:
            raise UserError(f"shoal.DistillationConfig: {error}") from error
        section_of(self)


def section_of(args: TrainingArguments, lora: Any = None) -> Distill:
    """The section of a recipe that says the same as ``args`` of losses, data and numbers, which become Python's.

    Raises:
        UserError: it would be refused in a recipe.
    """
    vars(args).update(plain_value(vars(args)))
    other = ("label_smoothing_factor", "average_tokens_across_devices", "gradient_checkpointing_kwargs", "fsdp")
    other = [name for name in other if getattr(args, name) != getattr(TrainingArguments, name)]
    section = {
        "losses": setting(args, "losses"),
        "trainable": setting(args, "trainable") or "all",
        "lora": lora,
        "trainer": {name: getattr(args, name) for name in (*RANGES, *OURS, *other)},
        **{name: setting(args, name) for name in SAME_AS_IN_RECIPE},
    }
    for seed in (args.seed, args.data_seed or 0):
        if not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise UserError(f"shoal.DistillationConfig: seed: must be from 0 to below 2**32 (got {seed!r})")
    return checked(Distill, section, source="shoal.DistillationConfig")


def setting(args: TrainingArguments, name: str) -> Any:
    """What ``args`` say of a field of DistillationConfig; where they are plain TrainingArguments its default."""
    return getattr(args, name, getattr(DistillationConfig, name))


def as_lora(config: LoraConfig | Lora | None) -> Any:
    """What distill.lora would say.

    Raises:
        UserError: a setting of peft's that adapters of a cut model have no use for.
    """
    if not isinstance(config, LoraConfig):
        return config
    plain, told, known = LoraConfig(), vars(config), ("r", "lora_alpha", "lora_dropout", "target_modules")
    passed = (*known, "task_type", "inference_mode", "base_model_name_or_path", "revision")
    others = [name for name in told if name not in passed and told[name] != getattr(plain, name, None)]
    targets = None if told["target_modules"] == "all-linear" else told["target_modules"]
    others += ["target_modules"] if isinstance(targets, str) else []
    if others:
        raise UserError(
            f"peft_config.{others[0]}: is {told[others[0]]!r}; remove it, adapters here are {', '.join(known)}, the "
            "last of them a list of names"
        )
    return {**{name: told[name] for name in known}, "target_modules": sorted(targets) if targets else None}
