"""How wide a student's layers may be, and the configuration that says so.

transformers loads layers of one width only, so every number here holds for all of them. A kernel that took the model
takes the student: its MLPs have a multiple of 128 channels, which is what tensor cores tile by and what GPTQ, AWQ and
FP8 scale together, or, where the model's own number is none, of the power of two that this one is a multiple of.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from shoal.artifacts.plan import KeptWidth
from shoal.errors import UserError
from shoal.formatting import listed
from shoal.models.anatomy import CHANNELS, text_config
from shoal.recipe.prune import Width

from .config_cut import cut_config
from .quantised import without_quantization

MULTIPLE = 128
"""Channels that kernels work on at once."""
BLOCK = 256
"""Channels that llama.cpp's K-quants scale together."""


def kept_width(config: PreTrainedConfig, settings: Width) -> KeptWidth:
    """The numbers that ``settings`` ask for of a model with this configuration; which parts stay is not chosen yet.

    Raises:
        UserError: more than the model has, a number that kernels cannot use or that the family does not allow.
    """
    text = text_config(config)
    if getattr(text, "is_heterogeneous", False):
        raise UserError(
            f"prune.width: layers of this {text.model_type} have sizes of their own, and narrowing needs one size for "
            "all; leave it out"
        )
    width = KeptWidth(_channels(text, settings.intermediate_size), settings.kv_groups)
    if width.kv_groups is not None:
        groups = heads(text)[1]
        possible = [count for count in range(1, groups + 1) if not _refusal(config, KeptWidth(kv_groups=count))]
        if width.kv_groups not in possible:
            reason = "" if width.kv_groups > groups else f": {_refusal(config, KeptWidth(kv_groups=width.kv_groups))}"
            remedy = f"give {listed(map(str, possible), 'or')}" if possible else "leave it out"
            raise UserError(
                f"prune.width.kv_groups: {width.kv_groups} of {groups} cannot be kept by a {text.model_type} of this "
                f"size{reason}; {remedy}"
            )
    if reason := _refusal(config, width):
        raise UserError(f"prune.width: {text.model_type} does not allow {width.in_words()}: {reason}; leave it out")
    return width


def student_config(teacher: PreTrainedConfig, keep: Sequence[int], width: KeptWidth | None = None) -> PreTrainedConfig:
    """The configuration of the student that keeps the layers ``keep``, as wide as ``width`` says, without settings of a
    quantisation.

    Raises:
        UserError: as cut_config.
    """
    return cut_config(narrowed_config(without_quantization(teacher)[0], width), keep)


def narrowed_config(config: PreTrainedConfig, width: KeptWidth | None) -> PreTrainedConfig:
    """A new configuration for layers as wide as ``width`` says; None = as they are."""
    narrow = copy.deepcopy(config)
    text, old = text_config(narrow), text_config(config)
    if width is not None and width.intermediate_size is not None:
        setattr(text, channels(old)[0], width.intermediate_size)
    if width is not None and width.kv_groups is not None:
        num_heads, groups, head_dim = heads(old)
        text.head_dim = head_dim
        text.num_attention_heads = num_heads // groups * width.kv_groups
        if getattr(old, "num_key_value_heads", None) is not None:
            text.num_key_value_heads = width.kv_groups
    return narrow


def channels(text: Any) -> tuple[str, int]:
    """The field of a text configuration that says how many channels every MLP has, and their number.

    Raises:
        UserError: there is no such field with one number.
    """
    sizes = {name: value for name in CHANNELS if isinstance(value := getattr(text, name, None), int)}
    if not sizes:
        raise UserError(
            f"prune.width.intermediate_size: config.intermediate_size of {text.model_type} is "
            f"{getattr(text, 'intermediate_size', None)!r}, which is not one number for all layers; leave it out"
        )
    return next(iter(sizes.items()))


def heads(text: Any) -> tuple[int, int, int]:
    """Query heads, key-value heads and the size of a head by a text configuration.

    Raises:
        UserError: it has no heads.
    """
    num_heads = getattr(text, "num_attention_heads", None)
    if not isinstance(num_heads, int):
        raise UserError(
            f"prune.width.kv_groups: config.num_attention_heads of {text.model_type} is {num_heads!r}, which is not "
            "one number for all layers; leave it out"
        )
    groups = getattr(text, "num_key_value_heads", None) or num_heads
    return num_heads, groups, getattr(text, "head_dim", None) or text.hidden_size // num_heads


def _channels(text: Any, asked: float | None) -> int | None:
    if asked is None:
        return None
    whole = channels(text)[1]
    multiple = math.gcd(MULTIPLE, whole)
    count = math.floor(asked * whole / multiple + 1e-9) * multiple if asked < 1 else int(asked)
    if not 0 < count <= whole or count % multiple:
        nearest = min(whole, max(multiple, round(asked * (whole if asked < 1 else 1) / multiple) * multiple))
        raise UserError(
            f"prune.width.intermediate_size: {asked} of {whole:,} channels would leave {count:,}, and kernels that "
            f"take this model need a multiple of {multiple} up to {whole:,}; give {nearest}"
        )
    return count


def _refusal(config: PreTrainedConfig, width: KeptWidth) -> str:
    """Why the family's own rules refuse a configuration of this width; empty if they do not."""
    try:
        text = text_config(narrowed_config(config, width))
        type(text).from_dict(text.to_dict())
    except (
        ValueError,
        StrictDataclassError,
        AttributeError,
    ) as error:  # some fields follow from others, and are not set
        return " ".join(str(error).split()).rstrip(".")
    return ""
