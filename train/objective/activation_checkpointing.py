"""Which activations of the student are kept until its backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel, TrainingArguments

from shoal.errors import UserError

SELECTIVE = "selective"
"""Key of `gradient_checkpointing_kwargs` that transformers does not know."""
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm")
ATTENTION = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")

FLASH = "flash_attn"
"""In the name of what the packages of flash attention register with torch."""


def recompute_selectively(student: PreTrainedModel, arguments: TrainingArguments) -> None:
    """With ``selective: true`` beside gradient checkpointing, keep what matrix products and attention have given.

    All else of a layer, norms, activation functions, casts and sums, is computed again in the backward pass. That is
    more than half of what a layer keeps and a few per cent of a step's work; whole layers are a forward more. The
    numbers are those without checkpointing, to the bit.

    Raises:
        UserError: with reentrant checkpointing, which cannot keep anything.
    """
    settings: Any = arguments.activation_checkpointing_kwargs
    options: dict[str, Any] = dict(settings or {})
    if not options.pop(SELECTIVE, False):
        return
    if options.get("use_reentrant"):
        raise UserError(
            "distill.trainer.gradient_checkpointing_kwargs: selective works with use_reentrant: false only; set that"
        )
    arguments.activation_checkpointing_kwargs = arguments.gradient_checkpointing_kwargs = options
    enable: Any = student.activation_checkpointing_enable
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, _kept()))

    def enable_selectively(activation_checkpointing_kwargs: dict[str, Any] | None = None, **more: Any) -> None:
        chosen = {**(activation_checkpointing_kwargs or {}), "use_reentrant": False, "context_fn": contexts}
        enable(activation_checkpointing_kwargs=chosen, **more)

    # on the instance: whoever turns checkpointing on, also after sampling, gets this; arguments stay plain values
    student.activation_checkpointing_enable = enable_selectively  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def checkpointing_kept(student: PreTrainedModel) -> Iterator[None]:
    """Who turns checkpointing off inside and on again, as TRL does where text is written, leaves it as it was.

    TRL turns it on for every layer, and does not know `every_n_layers` and `offload`, which transformers takes out of
    `gradient_checkpointing_kwargs`.
    """
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    before = [
        (module, name, getattr(module, name)) for module in student.modules() for name in names if hasattr(module, name)
    ]
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def _kept() -> frozenset[Any]:
    """The operations whose results stay; not every build of torch has all."""
    names = (*PRODUCTS, *(f"_scaled_dot_product_{name}" for name in ATTENTION))
    return frozenset(getattr(torch.ops.aten, name).default for name in names if hasattr(torch.ops.aten, name))


def _policy(kept: frozenset[Any], _context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    is_kept = operation in kept or FLASH in str(operation)
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
