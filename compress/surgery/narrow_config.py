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
from shoal.models.anatomy import CHANNELS, text_config
from shoal.recipe.prune import Width

from .config_cut import cut_config
from .quantised import without_quantization

NARROW = "prune.changes.width"
"""Place in the recipe."""
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
    settings.refuse_more(text.to_dict())
    reason = "its layers have sizes of their own" if getattr(text, "is_heterogeneous", False) else ""
    width = KeptWidth(None if reason else _channels(text, settings.intermediate_size), settings.num_key_value_heads)
    if reason := reason or _refusal(config, width):
        raise UserError(f"{NARROW}: {text.model_type} does not allow {width.in_words()}: {reason}; remove it")
    return width


def student_config(teacher: PreTrainedConfig, keep: Sequence[int], width: KeptWidth | None = None) -> PreTrainedConfig:
    """The configuration of the student that keeps the layers ``keep``, as wide as ``width`` says, without settings of a
    quantisation."""
    return cut_config(narrowed_config(without_quantization(teacher)[0], width), keep)


def narrowed_config(config: PreTrainedConfig, width: KeptWidth | None) -> PreTrainedConfig:
    """A new configuration for layers as wide as ``width`` says; None = as they are."""
    narrow = copy.deepcopy(config)
    text, old = text_config(narrow), text_config(config)
    if width is not None and width.intermediate_size is not None:
        setattr(text, channels(old)[0], width.intermediate_size)
    if width is not None and width.num_key_value_heads is not None:
        num_heads, groups, head_dim = heads(old)
        text.head_dim = head_dim
        text.num_attention_heads = num_heads // groups * width.num_key_value_heads
        if getattr(old, "num_key_value_heads", None) is not None:
            text.num_key_value_heads = width.num_key_value_heads
    return narrow


def channels(text: Any) -> tuple[str, int]:
    """The field of a text configuration that says how many channels every MLP has, and their number."""
    return _number(text, CHANNELS, "intermediate_size")


def heads(text: Any) -> tuple[int, int, int]:
    """Query heads, key-value heads and the size of a head by a text configuration."""
    _, num_heads = _number(text, ("num_attention_heads",), "num_key_value_heads")
    groups = getattr(text, "num_key_value_heads", None) or num_heads
    return num_heads, groups, getattr(text, "head_dim", None) or text.hidden_size // num_heads


def _number(text: Any, fields: Sequence[str], setting: str) -> tuple[str, int]:
    for field in fields:
        if isinstance(value := getattr(text, field, None), int):
            return field, value
    raise UserError(
        f"{NARROW}.{setting}: config.{fields[0]} of {text.model_type} is {getattr(text, fields[0], None)!r}, not one "
        "number for all layers; remove it"
    )


def _channels(text: Any, asked: float | None) -> int | None:
    if asked is None:
        return None
    whole = channels(text)[1]
    multiple = math.gcd(MULTIPLE, whole)
    count = math.floor(asked * whole / multiple + 1e-9) * multiple if asked < 1 else int(asked)
    if not 0 < count <= whole or count % multiple:
        nearest = min(whole, max(multiple, round(asked * (whole if asked < 1 else 1) / multiple) * multiple))
        raise UserError(
            f"{NARROW}.intermediate_size: {asked} of {whole:,} channels would leave {count:,}, but kernels for this "
            f"model need a multiple of {multiple} up to {whole:,}; give {nearest}"
        )
    return count


def _refusal(config: PreTrainedConfig, width: KeptWidth) -> str:
    """Why a model of this configuration cannot be so wide; empty if it can."""
    if width.num_key_value_heads is not None and width.num_key_value_heads > (groups := heads(text_config(config))[1]):
        return f"it has {groups}"
    try:
        text = text_config(narrowed_config(config, width))
        type(text).from_dict(text.to_dict())  # the family's own rules; some fields follow from others, and are not set
    except (ValueError, StrictDataclassError, AttributeError) as error:
        return " ".join(str(error).split()).rstrip(".")
    return ""
