"""LoRA: adapters beside the student's linear modules, and the plain weights they become.

They are injected into the model's modules instead of wrapping the model, so that its class, its forward and the names
of all other parameters stay those that the objective, the Trainer, DeepSpeed and save_pretrained know.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Set
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shoal import runtime
from shoal.errors import UserError
from shoal.models.anatomy import anatomy
from shoal.recipe.distill import Lora

from .trainable import Trained

LINEAR = (nn.Linear, Conv1D)
BASE = ".base_layer."
"""Part of a weight's name that peft puts there where it has an adapter."""
ADAPTER = "default"


def add_adapters(
    student: PreTrainedModel, lora: Lora, trained: Trained, *, seed: int, stored: Set[str] = frozenset()
) -> list[str]:
    """Put an adapter beside every linear module that ``lora`` means and freeze all else; the modules' names.

    Those are linear modules of the layers that ``trained`` names. An adapter adds nothing before its first step. Every
    rank draws the same numbers. ``stored`` are the names of the tensors in the student's files, where 4-bit weights
    come back from.

    Raises:
        UserError: a target that does not exist, or 4-bit weights that the files have under other names.
    """
    chosen = lora.chosen(linear_modules(student, trained.layers))
    if lora.load_in_4bit:
        _quantise(student, stored)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=lora.lora_dropout,
        target_modules=chosen,
        fan_in_fan_out=any(isinstance(student.get_submodule(name), Conv1D) for name in chosen),
    )
    # peft looks there for what to put around a module; left set, the Trainer would take the whole model for quantised
    setattr(student, "is_loaded_in_4bit", lora.load_in_4bit)  # noqa: B010
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out")
        torch.manual_seed(seed)
        inject_adapter_in_model(config, student, ADAPTER)
    del student.is_loaded_in_4bit
    return chosen


def linear_modules(student: PreTrainedModel, layers: Collection[int]) -> list[str]:
    """The names of the linear modules in ``layers``."""
    parts = anatomy(student)
    return [
        f"{parts.layers_name}.{layer}.{name}"
        for layer in sorted(layers)
        for name, module in parts.layers[layer].named_modules()
        if isinstance(module, LINEAR)
    ]


def _quantise(student: PreTrainedModel, stored: Set[str]) -> None:
    """Hold the linear modules of all layers in 4 bits, their scales quantised too, and put the model on the device of
    this rank: one linear module after the other, so that the whole one need never be there."""
    import bitsandbytes as bnb  # pyright: ignore[reportMissingImports]

    device = runtime.device()
    for name in linear_modules(student, range(len(anatomy(student).layers))):
        module = student.get_submodule(name)
        if type(module) is not nn.Linear:
            continue
        if f"{name}.weight" not in stored:
            raise UserError(
                f"distill.lora.load_in_4bit: {type(student).__name__} stores {name}.weight under another name, so "
                "its 4-bit copy could not be undone; set it to false"
            )
        quantised = bnb.nn.Linear4bit(
            module.in_features, module.out_features, bias=module.bias is not None, quant_type="nf4", device="meta"
        )
        weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4", module=quantised)
        quantised.weight = weight.to(device)  # where it becomes 4 bits
        quantised.bias = module.bias
        # a CPU would else repack the weight in the first forward of an evaluation, and training cannot read that
        quantised.support_avx512bf16_for_cpu = False
        student.set_submodule(name, quantised)
    student.to(device)  # pyright: ignore[reportArgumentType]


def adapted_modules(student: PreTrainedModel) -> dict[str, Any]:
    """The modules that have an adapter, by name."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in student.named_modules() if isinstance(module, LoraLayer)}


def weight_change(module: Any, state: Mapping[str, Tensor], name: str) -> Tensor:
    """What the adapter of ``module``, called ``name`` in ``state``, adds to its weight, in float32 and of its shape."""
    down, up = (state[f"{name}.{part}.{ADAPTER}.weight"].float() for part in ("lora_A", "lora_B"))
    change = (up @ down) * module.scaling[ADAPTER]
    return change.T if module.fan_in_fan_out else change


@torch.no_grad()
def merge_adapters(student: PreTrainedModel) -> None:
    """Add what adapters have learnt to the weights beside them, which are rounded once, and take the adapters out."""
    state = student.state_dict()
    for name, module in adapted_modules(student).items():
        weight = module.base_layer.weight
        weight.data = (weight.float() + weight_change(module, state, name)).to(weight.dtype)
    remove_adapters(student)


def remove_adapters(student: PreTrainedModel) -> None:
    """Put the modules that have adapters back as they were, so that the model is a plain one again."""
    for name, module in adapted_modules(student).items():
        student.set_submodule(name, module.base_layer)
