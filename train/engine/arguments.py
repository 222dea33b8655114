"""TrainingArguments and the DeepSpeed configuration that a recipe means, checked before any weight is loaded."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import TrainingArguments, get_scheduler
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from shoal.errors import UserError
from shoal.machine import fast_dtype
from shoal.ranks import forget_launchers, world_size
from shoal.recipe import trainer_arguments
from shoal.recipe.distill import Distill
from shoal.recipe.messages import demand
from shoal.recipe.section import as_dict
from shoal.recipe.trainer_arguments import DEEPSPEED_BATCH, batch_split
from shoal.runtime import device

from .distillation_config import SAME_AS_IN_RECIPE, DistillationConfig

log = logging.getLogger(__name__)


def rows_per_step(settings: Distill) -> int:
    """Rows of one optimizer step over all ranks."""
    rows, accumulation = batch_split(settings)
    return rows * accumulation * world_size()


def num_rows(settings: Distill) -> int:
    """Rows of the token budget, rounded up to whole optimizer steps of all ranks.

    A last step of another size would be padded with repeated rows, differently for every number of ranks.
    """
    per_step = rows_per_step(settings)
    return math.ceil(settings.budget / settings.sequence_length / per_step) * per_step


def kept_checkpoints(settings: Distill) -> int:
    """How many complete checkpoints stay on the disk: never one alone, which could turn out to be damaged."""
    return max(2, settings.trainer.get("save_total_limit") or 2)


def most_checkpoints(settings: Distill) -> int:
    """Complete checkpoints and one that is written, at most: one is removed after the next is complete. Where
    `save_strategy: no` asks for none, that which a stop writes."""
    if settings.trainer.get("save_strategy") == "no":
        return 1
    return kept_checkpoints(settings) + 1


def training_arguments(
    settings: Distill, deepspeed: DeepSpeed | None, *, output_dir: Path, seed: int, load_universal: bool = False
) -> DistillationConfig:
    """The Trainer's arguments; ``deepspeed`` None = it works without, and casts itself to distill.precision.

    ``load_universal`` = training goes on from a checkpoint that was made to fit any number of ranks.

    Raises:
        UserError: unknown or contradictory arguments.
    """
    check_names(settings)
    values: dict[str, Any] = settings.trainer | dict(
        zip(trainer_arguments.BATCH_SPLIT, batch_split(settings), strict=True)
    )
    if deepspeed is None:
        values |= {"bf16": settings.precision == "bf16-mixed", "fp16": settings.precision == "fp16-mixed"}
    else:
        values["deepspeed"] = dict(deepspeed.config)
        # transformers compares them with the sections of the configuration, and casts nothing itself
        values |= {name: deepspeed.config.get(name, {}).get("enabled", False) for name in ("bf16", "fp16")}
        if load_universal:
            values["deepspeed"]["checkpoint"] = {**deepspeed.config.get("checkpoint", {}), "load_universal": True}
    if torch.accelerator.is_available():  # rows are pinned there, and the host need not wait for their copies
        values.setdefault("accelerator_config", {"non_blocking": True})
    own = {name: values.pop(name) for name in trainer_arguments.OURS if name in values}
    # rotation deletes before the new checkpoint is complete; ours runs after the commit instead
    values.pop("save_total_limit", None)
    forget_launchers()
    args = DistillationConfig(
        output_dir=str(output_dir),
        seed=seed,
        use_cpu=not torch.accelerator.is_available(),
        remove_unused_columns=False,
        report_to=[],
        label_names=["labels"],
        losses=as_dict(settings)["losses"],
        trainable=settings.trainable,
        **{name: as_dict(settings)[name] for name in SAME_AS_IN_RECIPE},
        **values,
    )
    vars(args).update(own)  # only now: transformers would let all of torch compute in TF32 as it reads torch_compile
    return args


def resolved_deepspeed(args: TrainingArguments) -> dict[str, Any] | None:
    """The DeepSpeed configuration of these arguments, its `auto` filled in; None = they work without."""
    resolved: Any = getattr(args, "hf_deepspeed_config", None)
    return None if resolved is None else resolved.config


def check_names(settings: Distill, *, ranks: int | None = None) -> None:
    """Refuse a value that is none of its training argument, what its schedule or optimizer lacks, or another number
    than in the DeepSpeed configuration, before anything is built. Those of a batch are compared where it is known how
    many ``ranks`` there are."""
    trainer, known = settings.trainer, inspect.signature(TrainingArguments.__init__).parameters
    hints = get_type_hints(TrainingArguments)
    for name, value in trainer.items():
        # transformers would pass them on or refuse them only when the training begins
        if (problem := _problem(name, value, hints[name])) is not None:
            raise UserError(f"distill.trainer.{name}: {problem} (got {value!r})")
    given = {name: parameter.default for name, parameter in known.items()} | trainer_arguments.DEFAULTS | trainer
    trainer_arguments.refuse_training(settings, ranks=ranks)
    _check_schedule(given)
    config = trainer_arguments.read_deepspeed(settings.deepspeed)
    if ranks is None:
        config = {key: value for key, value in config.items() if key not in DEEPSPEED_BATCH}
    else:
        given |= dict(zip(trainer_arguments.BATCH_SPLIT, batch_split(settings, ranks=ranks), strict=True))
    given |= {name: config.get(name, {}).get("enabled", False) for name in ("bf16", "fp16")}
    asked = HfTrainerDeepSpeedConfig(config)  # which transformers would look at when all is prepared
    asked.trainer_config_process(SimpleNamespace(**given, world_size=ranks or 1))
    refuse_mismatches(asked, "distill.deepspeed")


def refuse_mismatches(asked: HfTrainerDeepSpeedConfig, place: str) -> None:
    """Refuse numbers of a DeepSpeed configuration, named by ``place``, that are others than the training arguments'."""
    if asked.mismatches:
        told = "; ".join(mismatch.removeprefix("- ") for mismatch in asked.mismatches)
        raise UserError(f'{place}: {told}; set the first to "auto", or change the second')


def _problem(name: str, value: Any, hint: Any) -> str | None:
    choices = [kind for kind in get_args(hint) or (hint,) if isinstance(kind, type) and issubclass(kind, Enum)]
    if (problem := trainer_arguments.wrong_value(name, value)) is not None:
        return problem
    try:
        TypeAdapter(choices[0] if choices else hint).validate_python(value, strict=not choices)
    except ValidationError as error:
        return demand(error.errors()[0])
    return None


def _check_schedule(given: Mapping[str, Any]) -> None:
    """Refuse a schedule that cannot be made."""
    name, settings = given["lr_scheduler_type"], given["lr_scheduler_kwargs"] or {}
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    try:
        get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=10, scheduler_specific_kwargs=settings)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"distill.trainer.lr_scheduler_kwargs: {settings} do not fit lr_scheduler_type {name} ({error}); fix "
            "them, or choose another type"
        ) from error


@dataclass(frozen=True)
class DeepSpeed:
    """The DeepSpeed configuration of a training, read once, and what follows from it."""

    config: Mapping[str, Any]
    """Configuration as `deepspeed_config` gives it."""

    @property
    def zero(self) -> Mapping[str, Any]:
        """Section zero_optimization."""
        return self.config["zero_optimization"]

    @property
    def stage(self) -> int:
        """ZeRO stage, 0 to 3."""
        return self.zero["stage"]

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Precision that autocast casts to in training; None = it is off."""
        wanted = self.config.get("torch_autocast", {})
        return getattr(torch, str(wanted["dtype"]).removeprefix("torch.")) if wanted.get("enabled") else None

    @property
    def weight_dtype(self) -> torch.dtype:
        """Precision of the trained weights in forward and backward passes."""
        halves = {"bf16": torch.bfloat16, "fp16": torch.float16}
        enabled = (dtype for section, dtype in halves.items() if self.config.get(section, {}).get("enabled"))
        return next(enabled, torch.float32)

    @property
    def product_dtype(self) -> torch.dtype:
        """Precision of most matrix products of a step: autocast's, else that of the weights."""
        return self.autocast_dtype or self.weight_dtype

    def offloads(self, section: str) -> bool:
        """Whether `offload_optimizer` or `offload_param` puts something elsewhere than on the device."""
        return (self.zero.get(section) or {}).get("device", "none") != "none"

    def warn_of_optimizer(self, trainer: Mapping[str, Any]) -> None:
        """Log, where it is so, that the optimizer is not the one that distill.trainer, ``trainer``, names, and that it
        does not resume bit by bit."""
        entry = self.config.get("optimizer", {})
        if entry and "optim" in trainer:
            log.warning(
                "distill.trainer.optim: %s has no effect, because the DeepSpeed configuration names %s; remove one "
                "of them",
                trainer["optim"],
                entry["type"],
            )
        torch_adam = (entry.get("params") or {}).get("torch_adam")
        forced = self.config.get("zero_force_ds_cpu_optimizer", True)
        if self.offloads("offload_optimizer") and forced and not torch_adam:
            log.warning(
                "distill.deepspeed: the offloaded optimizer is DeepSpeed's own CPU Adam, which does not resume bit "
                "by bit; for exact resuming, remove `optimizer` and zero_force_ds_cpu_optimizer"
            )


def deepspeed_config(settings: Distill) -> dict[str, Any]:
    """The DeepSpeed configuration with what the recipe decides filled in.

    Raises:
        UserError: a file that is missing or no JSON, or settings that shoal knows to be wrong.
    """
    config = trainer_arguments.read_deepspeed(settings.deepspeed)
    zero = config.setdefault("zero_optimization", {})
    stage, said = zero.setdefault("stage", 0), trainer_arguments.precisions_said(config)
    # a stage knows what `auto` is in its run directory and has put it in; settings on their own ask the device
    precision = said[0] if said else settings.precision
    if precision == "auto":
        precision = trainer_arguments.trained_in(config, fast_dtype(device()).dtype)
    trainer_arguments.refuse_deepspeed(config, settings, precision, on_cpu=not torch.accelerator.is_available())
    if precision == "bf16-true":
        # DeepSpeed steps fp32 copies: a plain bf16 weight does not move at usual learning rates, its rounding is
        # coarser than a step. Left alone it would add micro-batches' gradients up in bf16
        config["bf16"] = {**config.get("bf16", {}), "enabled": True}
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    elif precision == "fp16-true":
        config["fp16"] = {**config.get("fp16", {}), "enabled": True}
    elif precision != "float32" and not said:
        config["torch_autocast"] = {"enabled": True, "dtype": trainer_arguments.computed_in(precision)}
    offload = zero.get("offload_optimizer", {}).get("device", "none")
    if offload != "none" and "optimizer" not in config:
        # torch's own AdamW runs on a CPU as well; DeepSpeed's has to be compiled and does not resume bit by bit
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    for key in (*DEEPSPEED_BATCH, "gradient_clipping"):
        config.setdefault(key, "auto")
    return config
