"""Which kernels compute attention: chosen by device, family, precision and what is installed.

A recipe says auto, flash, sdpa or eager; transformers knows flash by the names of its kernels. They take packed rows
with the borders of their documents and never make a mask of (B, 1, S, S) numbers. Torch's own (packed_attention.py)
need no package, and stand in where others are not installed or cannot be used.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_FALLBACK, lazy_import_flash_attention
from transformers.utils.import_utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_flash_attn_4_available,
    is_kernels_available,
    is_torch_greater_or_equal,
)

from shoal import machine
from shoal.errors import UserError
from shoal.models.anatomy import text_config
from shoal.models.families import family
from shoal.models.packed_attention import VARLEN
from shoal.ranks import local_rank

DENSE = 1.8
"""Times that a training step with masks takes against one with flash kernels: computed for 8 billion weights and rows
of 4,096 tokens (docs/explanation/resources.md), not measured."""
HALVES = ("bfloat16", "float16")
"""Precisions that flash kernels compute in."""
AMPERE, HOPPER = 8, 9
"""Major compute capabilities: the least that flash kernels need, and the one that those of version 3 are made for."""
LARGEST_HEAD = 256
"""Numbers of a head that flash kernels take at most, in steps of 8."""
HEAD_SIZES = ("head_dim", "global_head_dim", "swa_head_dim", "qk_head_dim")
"""Names under which configurations keep the size of a head, some of them several."""
NO_BACKWARD = range(193, 225)
"""Sizes of a head whose gradients torch's own kernels compute on ABLE_GPUS alone."""
ABLE_GPUS = ((8, 0), (9, 0))
"""Compute capabilities of data centres' GPUs, which have the shared memory for it."""
NOT_EVERYWHERE = {"attention_dropout": "dropout_p", "attn_logit_softcapping": "softcap"}
"""Setting of a configuration -> parameter that only some flash kernels have for it. Dropout that they have not,
transformers leaves out."""
INSTALL_FLASH = "install flash-attn, or set hub_kernels: true, which downloads it"


@dataclass(frozen=True)
class Chosen:
    """What attention is computed with."""

    attention: str
    """flash, sdpa or eager."""
    reason: str
    """Reason for it, in a sentence."""


def choose_attention(
    wanted: str,
    config: PreTrainedConfig,
    device: torch.device,
    precisions: Mapping[str, str],
    *,
    hub_kernels: bool = False,
) -> Chosen:
    """What auto or flash mean for a model of ``config`` on ``device``. auto is flash where that is possible, else SDPA,
    and eager attention for families that have neither.

    ``precisions`` are the names of dtypes that attention runs in, by setting. ``hub_kernels``: whether kernels may be
    downloaded from the Hub.

    Raises:
        UserError: flash is asked for and not possible.
    """
    other = without_kernels("flash", config)
    obstacles = _in_the_way(config, precisions, hub_kernels)
    why_not = f"needs a CUDA GPU, and this device is {device.type}" if device.type != "cuda" else next(obstacles, "")
    if not why_not:
        found = flash_kernels(config, hub_kernels=hub_kernels)
        told = "torch has its own kernels" if found == VARLEN else f"{found} is installed"
        told += f", and {config.model_type} can use {'them' if found == VARLEN else 'it'}"
        return Chosen("flash", told if wanted == "auto" else "the recipe names it")
    if wanted != "auto":
        raise UserError(f"attn_implementation: flash {why_not}; set it to {other}, or to auto")
    lacks = "" if other == "sdpa" else f", and {config.model_type} has no SDPA"
    return Chosen(other, f"flash {why_not}{lacks}")


def implementation(attention: str | None, config: PreTrainedConfig, *, hub_kernels: bool = False) -> str | None:
    """transformers' name of ``attention`` for a model of ``config``; what is no value of the setting stays as it is.

    Raises:
        UserError: no flash kernels are installed.
    """
    if attention != "flash":
        return attention
    if (kernels := flash_kernels(config, hub_kernels=hub_kernels)) is None:
        raise UserError(f"attn_implementation: flash has no kernels here; {INSTALL_FLASH}, or set it to sdpa")
    return kernels


def named(implementation: str) -> str:
    """What a recipe calls transformers' ``implementation``."""
    return "flash" if "flash" in implementation or implementation == VARLEN else implementation


def without_kernels(attention: str, config: PreTrainedConfig) -> str:
    """An implementation that runs on any device and without data, and keeps for the backward pass what ``attention``
    keeps where a row is one document: queries, keys, values, output and the normalisers of rows."""
    if attention != "flash":
        return attention
    kind = _model_class(config)
    return "sdpa" if kind is None or kind._supports_sdpa else "eager"


def flash_kernels(config: PreTrainedConfig, *, hub_kernels: bool = False) -> str | None:
    """transformers' name of the flash kernels that a model of ``config`` would run with here: the first of those
    installed that can compute its attention, torch's own last; None = none."""
    return next((name for name in _installed(config, hub_kernels) if not _lacks(name, config)), None)


def _installed(config: PreTrainedConfig, hub_kernels: bool) -> Iterator[str]:
    """Names of flash kernels that are here. Some families name those that they can use, such as kernels that know
    attention sinks."""
    own = getattr(_model_class(config), "_compatible_flash_implementations", None)
    names = own or ("flash_attention_3", "flash_attention_2", FLASH_ATTN_KERNEL_FALLBACK["flash_attention_2"])
    return (name for name in (*names, VARLEN) if _is_installed(name) and (hub_kernels or "/" not in name))


def _is_installed(name: str) -> bool:
    if name == VARLEN:  # built for NVIDIA's GPUs; older versions of torch have the function without a window
        has_kernels = torch.version.cuda is not None and torch.backends.cuda.is_flash_attention_available()
        return has_kernels and torch.cuda.is_available() and is_torch_greater_or_equal("2.13")
    if name == "flash_attention_3":
        return is_flash_attn_3_available() and machine.card(local_rank()).capability[0] == HOPPER
    packages: dict[str, Callable[[], bool]] = {
        "flash_attention_2": is_flash_attn_2_available,
        "flash_attention_4": is_flash_attn_4_available,
    }
    return packages.get(name, is_kernels_available)()


def _lacks(name: str, config: PreTrainedConfig) -> str:
    """Why the installed kernels ``name`` cannot compute the attention of ``config``; empty = they can."""
    kind, called = _model_class(config), config.model_type
    if kind is None or not kind._supports_flash_attn:
        return f"does not exist in transformers for {called}"
    if name == VARLEN:
        if not kind._supports_sdpa:
            return f"by torch's own kernels is not possible for {called}, which has no SDPA; {INSTALL_FLASH}"
        if '_attn_implementation == "sdpa"' in inspect.getsource(sys.modules[kind.__module__]):
            return (
                f"by torch's own kernels is not possible for {called}, which computes something else under the name "
                "SDPA"
            )
        small = machine.card(local_rank()).capability not in ABLE_GPUS
        if small and (wrong := [size for size in _head_sizes(config) if size in NO_BACKWARD]):
            return (
                f"by torch's own kernels has no gradients for heads of {wrong[0]} numbers on this GPU; {INSTALL_FLASH}"
            )
        known = ()
    else:
        if exception := family(text_config(config).model_type).no_flash:
            return f"is not possible for {called}, which {exception}"
        try:
            (_, varlen, *_), _ = lazy_import_flash_attention(name)
        except (ImportError, ValueError, OSError, RuntimeError) as error:  # a build for another torch, no network
            return f"cannot load its kernels {name} ({str(error).strip().splitlines()[0]})"
        known = inspect.signature(varlen).parameters
    for key, parameter in NOT_EVERYWHERE.items():
        if parameter not in known and (value := getattr(text_config(config), key, None)):
            return f"has no {parameter} in {name}, but config.json has {key}: {value}"
    return ""


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class of transformers for ``config``; None where the code comes with the checkpoint, or where the class holds
    other models beside the text's, for images or sound, which need not have the same kernels."""
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    model_class = model_class[0] if isinstance(model_class, tuple | list) else model_class
    has_others = model_class is not None and model_class.config_class is type(config) and bool(config.sub_configs)
    return None if has_others else model_class


def _head_sizes(config: PreTrainedConfig) -> set[int]:
    text: Any = text_config(config)
    layers = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text]
    sizes = {size for own in layers for name in HEAD_SIZES if isinstance(size := getattr(own, name, None), int)}
    if not sizes and (heads := getattr(text, "num_attention_heads", None)):
        sizes = {text.hidden_size // heads}
    return sizes


def _in_the_way(config: PreTrainedConfig, precisions: Mapping[str, str], hub_kernels: bool) -> Iterator[str]:
    """Why flash kernels cannot be used on a CUDA GPU. What is quick to find out comes first."""
    if not torch.cuda.is_available():
        yield "needs a CUDA GPU, and torch finds none here"
    if (capability := machine.card(local_rank()).capability)[0] < AMPERE:
        yield f"needs a GPU of compute capability {AMPERE}.0, and this one has {capability[0]}.{capability[1]}"
    if _model_class(config) is None:
        yield f"is not known to work for {config.model_type or type(config).__name__}"
    if key := min((key for key, name in precisions.items() if name not in HALVES), default=None):
        yield f"computes in {' or '.join(HALVES)}, but {key} is {precisions[key]}"
    if wrong := [size for size in _head_sizes(config) if size > LARGEST_HEAD or size % 8]:
        yield (f"takes head sizes of a multiple of 8 up to {LARGEST_HEAD}, but {config.model_type} has {max(wrong)}")
    lacking = [_lacks(name, config) for name in _installed(config, hub_kernels)]
    if all(lacking):
        yield lacking[0] if lacking else f"has no kernels here: {INSTALL_FLASH}"
