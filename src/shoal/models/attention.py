"""Which kernels compute attention: chosen by device, family, precision and what is installed; flex attention's own way.

A recipe says auto, flash, flex, sdpa or eager; transformers knows each of them by another name. flash and flex take
packed rows with the borders of their documents and never make a mask of (B, 1, S, S) numbers.

B batch, S sequence, H query heads, G key-value heads, d size of a head.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import (
    AttentionMaskInterface,
    add_offsets_to_mask_function,
    and_masks,
    causal_mask_function,
    padding_mask_function,
    prepare_padding_mask,
)
from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_FALLBACK, lazy_import_flash_attention
from transformers.modeling_utils import AttentionInterface
from transformers.utils.import_utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_flash_attn_4_available,
    is_kernels_available,
)

from shoal.errors import UserError
from shoal.models.anatomy import text_config
from shoal.models.families import family

MASKLESS = ("flash", "flex")
"""Kernels that make no mask of numbers."""
FLEX = "flex_attention"
"""transformers' name of flex attention, by which the code of some families asks for it."""
HALVES = ("bfloat16", "float16")
"""Precisions that flash kernels compute in."""
AMPERE, HOPPER = 8, 9
"""Major compute capabilities: the least that flash kernels need, and the one that those of version 3 are made for."""
LARGEST_HEAD = 256
"""Numbers of a head that flash kernels take at most, in steps of 8; flex takes SMALLEST_HEAD and more."""
SMALLEST_HEAD = 16
HEAD_SIZES = ("head_dim", "global_head_dim", "swa_head_dim", "qk_head_dim")
"""Names under which configurations keep the size of a head, some of them several."""
FLEX_VARIANTS = 64
"""Times that flex attention may be compiled in a process."""
NOT_EVERYWHERE = {"attention_dropout": "dropout_p", "attn_logit_softcapping": "softcap"}
"""Setting of a configuration -> parameter that only some flash kernels have for it. Dropout that they have not,
transformers leaves out."""
INSTALL_FLASH = "install flash-attn, or the package kernels, which downloads it"


@dataclass(frozen=True)
class Chosen:
    """What attention is computed with."""

    attention: str
    """flash, flex, sdpa or eager."""
    reason: str
    """Reason for it, in a sentence."""


def choose_attention(
    wanted: str, config: PreTrainedConfig, device: torch.device, precisions: Mapping[str, str]
) -> Chosen:
    """What auto, flash or flex mean for a model of ``config`` on ``device``. auto is flash where that is possible, else
    SDPA, and eager attention for families that have neither.

    flex is only taken by name. ``precisions`` are the names of dtypes that attention runs in, by setting.

    Raises:
        UserError: flash or flex is asked for and not possible.
    """
    kind, other = _model_class(config), without_kernels("flash", config)
    obstacles = (
        _in_the_way_of_flex(config, kind) if wanted == "flex" else _in_the_way_of_flash(config, kind, precisions)
    )
    why_not = f"needs a CUDA GPU, and this device is {device.type}" if device.type != "cuda" else next(obstacles, "")
    if wanted == "auto" and why_not:
        lacks = "" if other == "sdpa" else f", and {config.model_type} has no SDPA"
        return Chosen(other, f"flash {why_not}{lacks}")
    if why_not:
        raise UserError(f"attention: {wanted} {why_not}; set attention: {other}, or auto, which takes what is possible")
    if wanted == "auto":
        return Chosen("flash", f"{flash_kernels(config)} is installed, and {config.model_type} can use it")
    return Chosen(wanted, "the recipe names it")


def implementation(attention: str | None, config: PreTrainedConfig) -> str | None:
    """transformers' name of ``attention`` for a model of ``config``; what is no value of the setting stays as it is.

    Of flex it finds flex_attention_forward from then on.

    Raises:
        UserError: no flash kernels are installed.
    """
    if attention == "flex":
        AttentionInterface.register(FLEX, flex_attention_forward)
        AttentionMaskInterface.register(FLEX, block_mask)
        return FLEX
    if attention == "flash":
        if (kernels := flash_kernels(config)) is None:
            raise UserError(f"attention: flash has no kernels here; {INSTALL_FLASH}, or set attention: sdpa")
        return kernels
    return attention


def named(implementation: str) -> str:
    """The setting ``attention`` by the name of transformers' implementation: the reverse of ``implementation``."""
    if "flash" in implementation:
        return "flash"
    return "flex" if implementation == FLEX else implementation


def without_kernels(attention: str, config: PreTrainedConfig) -> str:
    """An implementation that runs on any device and without data, and keeps for the backward pass what ``attention``
    keeps where a row is one document: queries, keys, values, output and the normalisers of rows."""
    if attention not in MASKLESS:
        return attention
    kind = _model_class(config)
    return "sdpa" if kind is None or kind._supports_sdpa else "eager"


def flash_kernels(config: PreTrainedConfig) -> str | None:
    """transformers' name of the flash kernels that a model of ``config`` would run with here; None = none installed.

    Some families name those that they can use, such as kernels that know attention sinks.
    """
    own = getattr(_model_class(config), "_compatible_flash_implementations", None)
    names = own or ("flash_attention_3", "flash_attention_2", FLASH_ATTN_KERNEL_FALLBACK["flash_attention_2"])
    return next((name for name in names if _is_installed(name)), None)


def _is_installed(name: str) -> bool:
    if name == "flash_attention_3":
        return is_flash_attn_3_available() and torch.cuda.get_device_capability()[0] == HOPPER
    packages: dict[str, Callable[[], bool]] = {
        "flash_attention_2": is_flash_attn_2_available,
        "flash_attention_4": is_flash_attn_4_available,
    }
    return packages.get(name, is_kernels_available)()


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class of transformers for ``config``; None where the code comes with the checkpoint, or where the class holds
    other models beside the text's, for images or sound, which need not have the same kernels."""
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    model_class = model_class[0] if isinstance(model_class, tuple | list) else model_class
    has_others = model_class is not None and model_class.config_class is type(config) and bool(config.sub_configs)
    return None if has_others else model_class


def _head_sizes(config: PreTrainedConfig) -> set[int]:
    text: Any = text_config(config)
    sizes = {size for name in HEAD_SIZES if isinstance(size := getattr(text, name, None), int)}
    if not sizes and (heads := getattr(text, "num_attention_heads", None)):
        sizes = {text.hidden_size // heads}
    return sizes


def _in_the_way_of_flash(
    config: PreTrainedConfig, kind: type[PreTrainedModel] | None, precisions: Mapping[str, str]
) -> Iterator[str]:
    """Why flash kernels cannot be used on a CUDA GPU. What is quick to find out comes first."""
    if not torch.cuda.is_available():
        yield "needs a CUDA GPU, and torch finds none here"
    if (capability := torch.cuda.get_device_capability())[0] < AMPERE:
        yield f"needs a GPU of compute capability {AMPERE}.0, and this one has {capability[0]}.{capability[1]}"
    yield from _of_family(config, kind, "flash_attn", family(text_config(config).model_type).no_flash)
    if key := min((key for key, name in precisions.items() if name not in HALVES), default=None):
        yield f"computes in {' or '.join(HALVES)}, and {key} is {precisions[key]}"
    if wrong := [size for size in _head_sizes(config) if size > LARGEST_HEAD or size % 8]:
        yield f"takes heads of a multiple of 8 numbers up to {LARGEST_HEAD}, and {config.model_type} has {max(wrong)}"
    if (kernels := flash_kernels(config)) is None:
        yield f"has no kernels here: {INSTALL_FLASH}"
        return
    try:
        (_, varlen, *_), _ = lazy_import_flash_attention(kernels)
    except (ImportError, ValueError, OSError, RuntimeError) as error:  # a build for another torch, no network
        yield f"cannot load its kernels {kernels} ({str(error).strip().splitlines()[0]})"
        return
    known = inspect.signature(varlen).parameters
    for key, parameter in NOT_EVERYWHERE.items():
        if parameter not in known and (value := getattr(text_config(config), key, None)):
            yield f"has no {parameter} in {kernels}, and config.json says {key}: {value}"


def _in_the_way_of_flex(config: PreTrainedConfig, kind: type[PreTrainedModel] | None) -> Iterator[str]:
    """Why flex attention cannot be used on a CUDA GPU."""
    if importlib.util.find_spec("triton") is None:
        yield "is compiled with triton, which is not installed"
    yield from _of_family(config, kind, "flex_attn", family(text_config(config).model_type).no_flex)
    if dropout := getattr(text_config(config), "attention_dropout", 0):
        yield f"has no dropout, and config.json says attention_dropout: {dropout}"
    if wrong := [size for size in _head_sizes(config) if size < SMALLEST_HEAD]:
        yield f"takes heads of at least {SMALLEST_HEAD} numbers, and {config.model_type} has {min(wrong)}"


def _of_family(
    config: PreTrainedConfig, kind: type[PreTrainedModel] | None, kernels: str, exception: str
) -> Iterator[str]:
    called = config.model_type or type(config).__name__
    if kind is None:
        yield f"is not known to be possible for {called}"
    elif not getattr(kind, f"_supports_{kernels}"):
        yield f"is nothing that transformers has for {called}"
    if exception:
        yield f"is not possible for {called}, which {exception}"


def flex_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask | None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """(B, S, H, d) Attention by torch's flex_attention of query (B, H, S, d), key and value (B, G, S, d).

    Instead of transformers' own: that one hands torch queries and values of two precisions under autocast, and rounds
    the normaliser of rows before it is compared with the sink. A sink takes its share behind the kernel: rows are
    divided by exp(lse) + exp(sink) instead of exp(lse).

    Raises:
        UserError: a mask that is no block mask, which may hide anything, or biases on scores; a soft cap under gradient
            checkpointing, whose hooks torch lets into its own trace of the cap.
    """
    scaling, softcap, s_aux = (settings.get(name) for name in ("scaling", "softcap", "s_aux"))
    if not isinstance(attention_mask, BlockMask) or settings.get("position_bias") is not None:
        raise UserError(
            f"{type(module).__name__}: hands attention a mask or biases of its own, which flex does not read; set "
            "attention: sdpa"
        )
    if softcap is not None and _is_checkpointed():
        raise UserError(
            f"{type(module).__name__}: torch's flex_attention gives wrong gradients of soft caps where activations are "
            "checkpointed; set attention: flash or eager, or distill.trainer.gradient_checkpointing: false"
        )
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    num_heads = query.shape[1]
    if repeated := num_heads & (num_heads - 1) != 0:  # the kernels group only powers of two
        key, value = (each.repeat_interleave(num_heads // each.shape[1], 1) for each in (key, value))

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    with torch.autocast(kind, enabled=False):  # scores are kept in float32
        output_BHSd, aux = _kernel(kind)(
            query,
            key,
            value,
            score_mod=None if softcap is None else capped,
            block_mask=attention_mask,
            scale=scaling,
            enable_gqa=not repeated,
            return_aux=AuxRequest(lse=s_aux is not None),
        )
        if s_aux is not None:
            share_BHS1 = torch.sigmoid(aux.lse - s_aux.to(aux.lse.dtype)[:, None])[..., None]
            output_BHSd = (output_BHSd * share_BHS1).to(dtype)
    return output_BHSd.transpose(1, 2).contiguous(), None


def block_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0, **settings: Any
) -> BlockMask:
    """Which blocks of keys the blocks of queries see, by transformers' ``mask_function``, which knows the documents.

    Not transformers' own, which compiles on a CPU too.
    """
    mask_function, device = settings.get("mask_function", causal_mask_function), settings.get("device", "cpu")
    if (attention_mask := settings.get("attention_mask")) is not None:
        padding_BS = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        assert padding_BS is not None
        mask_function = and_masks(mask_function, padding_mask_function(padding_BS))
    seen = add_offsets_to_mask_function(mask_function, q_offset, kv_offset)
    on_gpu = torch.device(device).type != "cpu"
    return create_block_mask(seen, batch_size, None, q_length, kv_length, device=str(device), _compile=on_gpu)


def _is_checkpointed() -> bool:
    autograd: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
    return torch.is_grad_enabled() and autograd._top_saved_tensors_default_hooks(False) is not None


def _kernel(kind: str) -> Callable[..., Any]:
    """flex_attention, compiled where it runs on a GPU and no caller compiles it already."""
    return flex_attention if kind == "cpu" or torch.compiler.is_compiling() else _compiled()


@cache
def _compiled() -> Callable[..., Any]:
    # precision, gradients, caps and shapes make variants; beyond the eight that torch allows, scores are written out
    return torch.compile(flex_attention, recompile_limit=FLEX_VARIANTS)  # pyright: ignore[reportCallIssue]
