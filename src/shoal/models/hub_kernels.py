"""Kernels of the Hub: code that transformers downloads and runs in the place of its own, with other last digits.

transformers 5.25 and newer take them wherever from_pretrained is not told otherwise. Here nothing asks for one unless
the user does: it would be code without consent, and what is proven of cuts, losses and scores holds for the kernels
that it was proven with. So every model is loaded through `from_pretrained` below.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from shoal.errors import UserError

log = logging.getLogger(__name__)

DEQUANTISED = {"fp8": 2, "mxfp4": 4}
"""Formats of weights that transformers multiplies with kernels of the Hub where it can, and else turns into bfloat16 as
it loads them, as on a CPU -> how many times as many bytes they are then."""
ONLY_BY_KERNELS = ("eetq", "fbgemm_fp8", "nvfp4")
"""Formats of weights that it reads with kernels of the Hub alone."""


def from_pretrained(
    kind: Any, source: Any, *, stored: PreTrainedConfig | None = None, hub_kernels: bool = False, **settings: Any
) -> Any:
    """What ``kind``, a class of transformers, loads from ``source`` with ``settings``. ``stored`` is the configuration
    at ``source``, which says whether the weights there are quantised.

    Raises:
        UserError: weights in a format that only kernels of the Hub read, and they are not allowed.
    """
    quantised: Any = copy.deepcopy(stored)
    method = quantisation(quantised)
    if not hub_kernels and method in ONLY_BY_KERNELS:
        raise UserError(
            f"{source}: weights stored as {method} need kernels from the Hub; set hub_kernels: true with --allow code, "
            "or give the model in another format"
        )
    if not hub_kernels and method in DEQUANTISED:
        quantised.quantization_config["dequantize"] = True
        settings["config"] = quantised
    return kind.from_pretrained(source, use_kernels=hub_kernels, **settings)


def quantisation(config: Any) -> str:
    """The format of the weights that ``config`` tells of; empty where they are plain."""
    return getattr(config, "quantization_config", {}).get("quant_method", "")


def tell_of_kernels(model: PreTrainedModel, name: str) -> None:
    """Warn where ``model``, which the user loaded and calls ``name``, computes with kernels of the Hub, or will on the
    accelerator that is here. It is the user's, so it stays as it is."""
    if not getattr(model, "use_kernels", False):
        return
    from kernels import get_kernelized_layers  # pyright: ignore[reportMissingImports]  comes with transformers 5.25

    used = get_kernelized_layers(model)
    if used.layers or used.funcs or torch.accelerator.is_available():
        log.warning(
            "%s: was loaded with kernels of the Hub, which give other last digits than the models that shoal loads; "
            "load it with use_kernels=False, or set its attribute use_kernels to False",
            name,
        )
