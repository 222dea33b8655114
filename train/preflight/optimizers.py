"""The optimizer that a recipe names: what its state takes, and one of its kind to be timed."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from shoal.recipe.distill import Distill

from ..engine.arguments import DEFAULTS, DeepSpeed

log = logging.getLogger(__name__)

DEFAULT = str(TrainingArguments.__dataclass_fields__["optim"].default)
"""The Trainer's, a kind of AdamW."""
MOMENTS = {
    **dict.fromkeys(
        ("adam", "adamw", "muadam", "muadamw", "nadam", "radam", "stable", "adamax", "adadelta", "lamb"), 2
    ),
    **dict.fromkeys(("lion", "adagrad", "rmsprop", "adafactor"), 1),
    **dict.fromkeys(("sgd", "musgd"), 0),
    "ademamix": 3,
}
"""Moments of every weight, by the first word of an optimizer's name; `momentum` in its options is one more."""
BLOCK = {8: 256, 4: 128}
"""Weights that share a scale of four bytes, by the bits of a moment, in bitsandbytes and torchao. The paper of
block-wise moments (Dettmers et al. 2021, arXiv:2110.02861) has 2048."""
ADAM_BYTES = 8.0


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer keeps beside the weights that it steps."""

    bytes_per_weight: float = ADAM_BYTES
    """Bytes of the moments of one trained weight."""
    factored: bool = False
    """Matrices have one moment per row and column only (Adafactor); ZeRO hands over flat pieces, which have all."""
    paged: bool = False
    """Moments lie in memory that moves to the host where the device has too little."""

    def num_bytes(self, trained: int, *, stage: int) -> int:
        """Bytes of the moments of ``trained`` weights under a ZeRO stage, over all ranks."""
        return 0 if self.factored and stage == 0 else int(self.bytes_per_weight * trained)


ADAM = OptimizerState()


def named_optimizer(settings: Distill, deepspeed: DeepSpeed) -> tuple[str, Mapping[str, Any]]:
    """The optimizer's name in lower case and its options: the DeepSpeed configuration's, else distill.trainer.optim."""
    if (entry := deepspeed.config.get("optimizer")) is not None:
        return str(entry.get("type", DEFAULT)).lower(), entry.get("params") or {}
    pairs = (str(settings.trainer.get("optim_args") or "")).replace(" ", "").split(",")
    options = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    return str(settings.trainer.get("optim") or DEFAULT).lower(), options


def optimizer_state(settings: Distill, deepspeed: DeepSpeed) -> OptimizerState:
    """What the optimizer of the recipe keeps; AdamW's of one that is not known, which the log then says."""
    name, options = named_optimizer(settings, deepspeed)
    kind = name.removeprefix("paged_").split("_")[0]
    if kind not in MOMENTS:
        log.warning(
            "optimizer %s: what its state takes is not known; AdamW's %d bytes a trained weight are assumed",
            name,
            ADAM_BYTES,
        )
        return ADAM
    count = MOMENTS[kind] + (float(options.get("momentum", 0)) > 0)
    width = next((bits / 8 + 4 / block for bits, block in BLOCK.items() if name.endswith(f"_{bits}bit")), 4.0)
    return OptimizerState(count * width, factored=kind == "adafactor", paged=name.startswith("paged_"))


def timed_optimizer(weights: Iterable[nn.Parameter], settings: Distill, deepspeed: DeepSpeed) -> torch.optim.Optimizer:
    """An optimizer over ``weights`` that takes as long to step as the recipe's: the one that the Trainer would make, or
    torch's of the name that the DeepSpeed configuration has. AdamW where there is none here, which the log then says.
    """
    name, options = named_optimizer(settings, deepspeed)
    weights = list(weights)
    if "optimizer" in deepspeed.config:
        in_torch = {each.lower(): each for each in torch.optim.__all__ if each.lower() in MOMENTS}
        if name in in_torch:
            momentum = {"momentum": float(options["momentum"])} if "momentum" in options else {}
            return getattr(torch.optim, in_torch[name])(weights, lr=1e-6, **momentum)
        reason = "is DeepSpeed's own"
    else:
        from transformers import Trainer
        from transformers.training_args import OptimizerNames

        keys = ("learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "optim_target_modules")
        unset = {"adam_beta1": 0.9, "adam_epsilon": 1e-8}
        values = {key: (unset | DEFAULTS | dict(settings.trainer)).get(key) for key in keys}
        try:
            arguments: Any = SimpleNamespace(**values, optim=OptimizerNames(name))
            maker, made_with = Trainer.get_optimizer_cls_and_kwargs(arguments)
            if weights[0].device.type != "cpu" or not name.endswith("bit"):
                return maker(weights, **made_with)
            reason = "needs a GPU"
        except (ImportError, ValueError) as error:
            reason = str(error).split("\n")[0]
    log.warning("optimizer %s: AdamW is timed in its place (%s)", name, reason)
    return torch.optim.AdamW(weights, lr=1e-6)
