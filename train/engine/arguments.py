"""TrainingArguments and the DeepSpeed configuration that a recipe means, checked before any weight is loaded."""

from __future__ import annotations

import difflib
import inspect
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import NoneType, SimpleNamespace
from typing import Any, get_args, get_origin, get_type_hints

import torch
from transformers import Trainer, TrainingArguments, get_scheduler

from shoal.errors import UserError
from shoal.numerics import fast_dtype
from shoal.recipe.deepspeed_file import precisions_named, read_deepspeed, trained_in
from shoal.recipe.distill import Distill
from shoal.runtime import device, world_size

log = logging.getLogger(__name__)

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
MOST = 1e12
"""No training argument is as large."""
RANGES: dict[str, tuple[float, float]] = {
    "learning_rate": (0, 100),
    "weight_decay": (0, 100),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, 1),
    "max_grad_norm": (0, MOST),
    "warmup_steps": (0, MOST),
    "max_steps": (-1, MOST),
    "num_train_epochs": (1e-9, MOST),
    "logging_steps": (1e-9, MOST),
    "save_steps": (1e-9, MOST),
    "save_total_limit": (1, MOST),
    "dataloader_num_workers": (0, MOST),
}
"""Training arguments that are at least the first and below the second number; transformers looks at few of them."""
SAME_IN_DEEPSPEED = {
    "gradient_clipping": ("max_grad_norm",),
    "optimizer.params.lr": ("learning_rate",),
    "optimizer.params.betas": ("adam_beta1", "adam_beta2"),
    "optimizer.params.eps": ("adam_epsilon",),
    "optimizer.params.weight_decay": ("weight_decay",),
}
"""What a DeepSpeed configuration may say too, by its path there, and the training arguments that say the same."""
BATCH_SPLIT = ("per_device_train_batch_size", "gradient_accumulation_steps")
"""How ranks and micro-batches share the rows of one optimizer step."""


def batch_split(settings: Distill, *, ranks: int | None = None) -> tuple[int, int]:
    """Rows of a micro-batch on one rank, and micro-batches of an optimizer step; ``ranks`` None = those of this run.

    Rows are handed out in order, micro-batch by micro-batch and within one rank by rank, so an optimizer step holds the
    same rows however it is split.

    Raises:
        UserError: `distill.batch_size` does not come out even over these ranks.
    """
    micro_batch = settings.trainer.get("per_device_train_batch_size")
    default = int(DEFAULTS["per_device_train_batch_size"])
    if settings.batch_size is None:
        return int(micro_batch or default), int(settings.trainer.get("gradient_accumulation_steps", 1))
    ranks = ranks or world_size()
    per_rank, rest = divmod(settings.batch_size, ranks)
    if rest:
        raise UserError(
            f"distill.batch_size: {settings.batch_size} rows do not divide over {ranks} ranks; "
            f"choose a multiple of {ranks}, or another number of ranks"
        )
    rows = int(micro_batch or max(n for n in range(1, default + 1) if per_rank % n == 0))
    if per_rank % rows:
        raise UserError(
            f"distill.batch_size: {settings.batch_size} rows over {ranks} ranks are {per_rank} each, no "
            f"multiple of distill.trainer.per_device_train_batch_size {rows}; change one, or leave the latter out"
        )
    return rows, per_rank // rows


def rows_per_step(settings: Distill) -> int:
    """Rows of one optimizer step over all ranks."""
    rows, accumulation = batch_split(settings)
    return rows * accumulation * world_size()


def num_rows(settings: Distill) -> int:
    """Rows of the token budget, rounded up to whole optimizer steps of all ranks.

    A last step of another size would be padded with repeated rows, differently for every number of ranks.
    """
    per_step = rows_per_step(settings)
    return math.ceil(settings.num_tokens / settings.sequence_length / per_step) * per_step


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
) -> TrainingArguments:
    """The Trainer's arguments; ``deepspeed`` None = it works without, and casts itself to distill.precision.

    ``load_universal`` = training goes on from a checkpoint that was made to fit any number of ranks.

    Raises:
        UserError: unknown or contradictory arguments, or a precision that is known to train wrongly.
    """
    check_names(settings)
    values: dict[str, Any] = DEFAULTS | settings.trainer | dict(zip(BATCH_SPLIT, batch_split(settings), strict=True))
    if deepspeed is None:
        values |= {"bf16": settings.precision == "bfloat16", "fp16": settings.precision == "float16"}
    else:
        values["deepspeed"] = dict(deepspeed.config)
        # transformers compares them with the sections of the configuration, and casts nothing itself
        values |= {name: deepspeed.config.get(name, {}).get("enabled", False) for name in ("bf16", "fp16")}
        if load_universal:
            values["deepspeed"]["checkpoint"] = {**deepspeed.config.get("checkpoint", {}), "load_universal": True}
    if torch.accelerator.is_available():  # rows are pinned there, and the host need not wait for their copies
        values.setdefault("accelerator_config", {"non_blocking": True})
    # rotation deletes before the new checkpoint is complete; ours runs after the commit instead
    values.pop("save_total_limit", None)
    try:
        return TrainingArguments(
            output_dir=str(output_dir),
            seed=seed,
            use_cpu=not torch.accelerator.is_available(),
            remove_unused_columns=False,
            report_to=[],
            label_names=["labels"],
            **values,
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"distill.trainer: {str(error).strip()}") from error


def resolved_deepspeed(args: TrainingArguments) -> dict[str, Any] | None:
    """The DeepSpeed configuration of these arguments, its `auto` filled in; None = they work without."""
    resolved: Any = getattr(args, "hf_deepspeed_config", None)
    return None if resolved is None else resolved.config


def check_names(settings: Distill) -> None:
    """Refuse a training argument that transformers does not have, a value that is none, what its schedule or optimizer
    lacks, or another number than in the DeepSpeed configuration, before anything is built.

    Raises:
        UserError: naming it and the closest one there is, or the value.
    """
    known = inspect.signature(TrainingArguments.__init__).parameters
    unknown = [name for name in settings.trainer if name not in known]
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "see transformers.TrainingArguments"
        raise UserError(f"distill.trainer.{unknown[0]}: no such training argument; {hint}")
    if settings.batch_size is not None and "gradient_accumulation_steps" in settings.trainer:
        raise UserError(
            f"distill.trainer.gradient_accumulation_steps: follows from distill.batch_size ({settings.batch_size}); "
            "leave one of them out"
        )
    for name in BATCH_SPLIT:
        value = settings.trainer.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"distill.trainer.{name}: must be a whole number of at least 1 (got {value!r})")
    _check_values(settings.trainer)
    given = {name: parameter.default for name, parameter in known.items()} | DEFAULTS | settings.trainer
    _check_schedule(given)
    _check_optimizer(given)
    refuse_other_numbers(
        read_deepspeed(settings.deepspeed), given, place="distill.deepspeed", setting="distill.trainer"
    )


def refuse_other_numbers(config: Mapping[str, Any], given: Mapping[str, Any], *, place: str, setting: str) -> None:
    """Refuse a number of the DeepSpeed configuration, named by ``place``, that is another one in the training arguments
    ``given``, named by ``setting``.

    Raises:
        UserError: there is one.
    """
    for key, names in SAME_IN_DEEPSPEED.items():
        values = [given[name] for name in names]
        wanted = values if len(values) > 1 else values[0]
        _refuse_other_number(config, key, wanted, setting=f"{setting}.{' and '.join(names)}", place=place)


def _check_values(trainer: Mapping[str, Any]) -> None:
    """Refuse numbers, booleans and mappings that are none, and choices that there are not (`optim`): transformers would
    pass them on or refuse them only when the training begins.
    """
    hints = get_type_hints(TrainingArguments)
    for name, value in trainer.items():
        hint = hints[name]
        kinds = {get_origin(kind) or kind for kind in get_args(hint) or (hint,)}
        if value is None and NoneType in kinds:
            continue
        least, end = RANGES.get(name, (-MOST, MOST))
        for choices in (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)):
            names = [str(choice.value) for choice in choices]
            if value not in names:
                close = difflib.get_close_matches(str(value), names, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(names)}"
                raise UserError(f"distill.trainer.{name}: there is no {value!r}; {hint}")
        if kinds <= {bool, NoneType}:
            right, expected = isinstance(value, bool), "true or false"
        elif dict in kinds:
            right, expected = isinstance(value, dict), "a mapping of settings"
        elif kinds <= {int, float, NoneType}:
            number: Any = value if isinstance(value, int if float not in kinds else int | float) else math.nan
            right = not isinstance(value, bool) and least <= number < end
            expected = f"a {'' if float in kinds else 'whole '}number from {least:g} to below {end:g}"
        else:
            continue
        if not right:
            raise UserError(f"distill.trainer.{name}: must be {expected} (got {value!r})")


def _check_schedule(given: Mapping[str, Any]) -> None:
    """Refuse settings of a schedule that it does not take, or lacks: transformers looks when the training begins."""
    name, settings = given["lr_scheduler_type"], given["lr_scheduler_kwargs"] or {}
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    try:
        get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=10, scheduler_specific_kwargs=settings)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"distill.trainer.lr_scheduler_kwargs: {settings} do not go with lr_scheduler_type {name} ({error}); mend "
            "them, or choose another"
        ) from error


def _check_optimizer(given: Mapping[str, Any]) -> None:
    """Refuse an optimizer whose package is not installed. What else it needs, a model for one, is not there yet."""
    try:
        Trainer.get_optimizer_cls_and_kwargs(SimpleNamespace(**given))  # pyright: ignore[reportArgumentType]
    except (ImportError, ValueError) as error:
        if isinstance(error, ImportError) or "install" in str(error):
            raise UserError(
                f"distill.trainer.optim: {given['optim']} needs what is not installed ({error}); install it, or choose "
                "another, such as adamw_torch"
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
                "distill.trainer.optim: %s has no effect, the DeepSpeed configuration names %s; leave one of them out",
                trainer["optim"],
                entry["type"],
            )
        torch_adam = (entry.get("params") or {}).get("torch_adam")
        forced = self.config.get("zero_force_ds_cpu_optimizer", True)
        if self.offloads("offload_optimizer") and forced and not torch_adam:
            log.warning(
                "distill.deepspeed: the offloaded optimizer is DeepSpeed's own CPU Adam, which does not resume bit by "
                "bit; leave `optimizer` and zero_force_ds_cpu_optimizer out where that matters"
            )


def deepspeed_config(settings: Distill, *, ranks: int | None = None) -> dict[str, Any]:
    """The DeepSpeed configuration with what the recipe decides filled in.

    Its numbers of a batch are compared with those of the recipe on so many ``ranks``; None = how many is not known yet.
    The other numbers that both could say are compared by check_names.

    Raises:
        UserError: a file that is missing or no JSON, or settings that shoal knows to be wrong.
    """
    config = read_deepspeed(settings.deepspeed)
    zero = config.setdefault("zero_optimization", {})
    stage, named = zero.setdefault("stage", 0), precisions_named(config)
    # a stage knows what `auto` is in its run directory and has put it in; settings on their own ask the device
    precision = settings.precision
    if precision == "auto" and not named:
        precision = trained_in(config, fast_dtype(device()).dtype)
    _refuse_wrong(config, named, settings.precision, computed_in=precision)
    if ranks is not None:
        _refuse_other_batch(config, settings, ranks=ranks)
    if settings.compile and stage == 3:
        raise UserError(
            "distill.compile: ZeRO 3 brings weights together inside of layers, which a compiled layer cannot wait for; "
            "set distill.deepspeed: deepspeed/zero2.json, or compile: false"
        )
    if settings.weights != "auto":
        _refuse_other_weights(config, named, settings.weights)
    if settings.weights == "bfloat16":
        # DeepSpeed steps fp32 copies: a plain bf16 weight does not move at usual learning rates, its rounding is
        # coarser than a step. Left alone it would add micro-batches' gradients up in bf16
        config["bf16"] = {**config.get("bf16", {}), "enabled": True}
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    elif precision in ("bfloat16", "float16"):
        config["torch_autocast"] = {"enabled": True, "dtype": precision}
    offload = zero.get("offload_optimizer", {}).get("device", "none")
    if offload != "none" and "optimizer" not in config:
        # torch's own AdamW runs on a CPU as well; DeepSpeed's has to be compiled and does not resume bit by bit
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ):
        config.setdefault(key, "auto")
    return config


def _refuse_wrong(config: Mapping[str, Any], named: Sequence[str], precision: str, *, computed_in: str) -> None:
    """Refuse what shoal knows to be wrong of a configuration. ``named`` are the precisions that it names itself,
    ``precision`` is what the recipe says, ``computed_in`` what comes of both.

    Raises:
        UserError: it is.
    """
    zero = config["zero_optimization"]
    if zero["stage"] not in (0, 1, 2, 3):
        raise UserError(f"distill.deepspeed: zero_optimization.stage must be 0, 1, 2 or 3 (got {zero['stage']!r})")
    if "scheduler" in config:
        raise UserError("distill.deepspeed: leave `scheduler` out; set lr_scheduler_type under distill.trainer")
    if "optimizer" in config:
        _refuse_unknown_optimizer(config["optimizer"])
    if precision != "auto" and named:
        raise UserError(
            f"distill.precision: {precision} contradicts `{named[0]}` in the DeepSpeed configuration; "
            "leave one of them out"
        )
    if "bf16" in named and zero["stage"] == 0:
        raise UserError(
            "distill.deepspeed: bf16 with ZeRO stage 0 starts Adam one step late; use stage 1 to 3, or "
            "distill.precision: bfloat16 (autocast), which is exact at every stage"
        )
    if ("fp16" in named or computed_in == "float16") and not torch.accelerator.is_available():
        key = "precision" if computed_in == "float16" else "deepspeed"
        raise UserError(
            f"distill.{key}: fp16 does not train on a CPU; use distill.precision: auto, and no fp16 section"
        )
    cast = config.get("torch_autocast", {})
    cast_to = str(cast["dtype"]).removeprefix("torch.") if cast.get("enabled") else computed_in
    if cast_to == "float16" and zero["stage"]:
        raise UserError(
            f"distill.precision: float16 is autocast with scaled losses, by which ZeRO {zero['stage']} clips gradients "
            "wrongly; set distill.deepspeed: deepspeed/zero0.json, precision: float32, or an fp16 section in your own "
            "DeepSpeed configuration"
        )
    for part in ("offload_optimizer", "offload_param"):
        place = zero.get(part) or {}
        folder = place.get("nvme_path")
        if place.get("device") == "nvme" and (folder is None or not Path(folder).expanduser().is_dir()):
            raise UserError(
                f"distill.deepspeed: {part} is on nvme, and its nvme_path is no folder (got {folder!r}); name one on a "
                "local disk, or set device: cpu"
            )


def _refuse_other_batch(config: Mapping[str, Any], settings: Distill, *, ranks: int) -> None:
    rows, accumulation = batch_split(settings, ranks=ranks)
    steps = "trainer.gradient_accumulation_steps" if settings.batch_size is None else "batch_size"
    for key, wanted, setting in (
        ("train_micro_batch_size_per_gpu", rows, "trainer.per_device_train_batch_size"),
        ("gradient_accumulation_steps", accumulation, steps),
        ("train_batch_size", rows * accumulation * ranks, "batch_size"),
    ):
        _refuse_other_number(config, key, wanted, setting=f"distill.{setting}")


def _refuse_other_number(
    config: Mapping[str, Any], key: str, wanted: Any, *, setting: str, place: str = "distill.deepspeed"
) -> None:
    """Refuse that a DeepSpeed configuration has another number at ``key`` than ``setting``: transformers would, when
    all is prepared and the training begins.

    Raises:
        UserError: it has.
    """
    number: Any = config
    for part in key.split("."):
        number = number.get(part) if isinstance(number, Mapping) else None
    if number not in (None, "auto", wanted):
        raise UserError(
            f'{place}: {key} is {number!r}, but {wanted!r} by {setting}; set the former to "auto", or change the latter'
        )


def _refuse_other_weights(config: Mapping[str, Any], named: Sequence[str], weights: str) -> None:
    """Refuse a DeepSpeed configuration that holds weights in another precision than distill.weights, ``weights``.

    Raises:
        UserError: it does, or its ZeRO stage has no float32 copies of weights.
    """
    if others := set(named) & ({"fp16", "torch_autocast"} if weights == "bfloat16" else {"fp16", "bf16"}):
        raise UserError(
            f"distill.weights: {weights} contradicts `{min(others)}` in the DeepSpeed configuration; leave one of them "
            "out"
        )
    if weights == "bfloat16" and config["zero_optimization"]["stage"] == 0:
        raise UserError(
            "distill.weights: bfloat16 needs the float32 copies of ZeRO stage 1 to 3, and the stage is 0, which starts "
            "Adam one step late; set distill.deepspeed: deepspeed/zero1.json or higher, or weights: float32"
        )


def _refuse_unknown_optimizer(entry: Any) -> None:
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    name = entry.get("type") if isinstance(entry, Mapping) else None
    if not isinstance(name, str) or (name.lower() not in DEEPSPEED_OPTIMIZERS and not hasattr(torch.optim, name)):
        raise UserError(
            f"distill.deepspeed: optimizer.type must be one of {', '.join(DEEPSPEED_OPTIMIZERS)}, or a class of "
            f"torch.optim (got {name!r})"
        )
