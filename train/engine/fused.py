"""Liger's kernels for RMS norms, gated MLPs and rotary embedding in the place of a model's own; not its losses.

They do the same arithmetic in one pass over memory and keep less for the backward pass. Liger (Hsu et al. 2024,
arXiv:2410.10989) puts them into classes and functions of transformers, where later models would have them too; here
they are taken back from there, and from the models when training ends.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shoal.errors import UserError
from shoal.models.anatomy import decoder_body, text_config

log = logging.getLogger(__name__)

LOSSES = ("cross_entropy", "fused_linear_cross_entropy")
"""Kernels of Liger that would take the place of the loss."""
PROOF_TOKENS = 24
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""How far final states may be apart, relative to their norm: some steps of rounding per layer."""


def why_not_fused(family: str, device: torch.device) -> str | None:
    """Why Liger's kernels cannot run models of ``family`` on ``device``; None where they can."""
    if importlib.util.find_spec("liger_kernel") is None or importlib.util.find_spec("triton") is None:
        return "liger-kernel is not installed; `pip install liger-kernel`"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Liger's kernels run on GPUs, and this is a CPU"
    if family not in _families():
        return f"Liger has no kernels for {family}"
    return None


def is_fused(wanted: bool | Literal["auto"], family: str, device: torch.device) -> bool:
    """Whether distill.fused, ``wanted``, comes to Liger's kernels.

    Raises:
        UserError: they are asked for and cannot be had.
    """
    if wanted is False:
        return False
    reason = why_not_fused(family, device)
    if reason is not None and wanted is True:
        raise UserError(f"distill.fused: {reason}; or set fused: false")
    return reason is None


class Fused:
    """Models whose norms, MLPs and rotary embedding are Liger's while this is installed."""

    def __init__(self, models: Sequence[PreTrainedModel]) -> None:
        self._models = tuple(models)
        self._undo = contextlib.ExitStack()

    def install(self) -> None:
        """Put the kernels in."""
        for model in self._models:
            apply = _families()[model.config.model_type]
            off = {name: False for name in LOSSES if name in inspect.signature(apply).parameters}
            before = {id(module): set(vars(module)) for module in model.modules()}
            shared = {type(part).__module__: dict(vars(sys.modules[type(part).__module__])) for part in _parts(model)}
            apply(model=model, **off)
            for module in model.modules():
                self._undo.callback(_forget, module, set(vars(module)) - before[id(module)])
            for name, values in shared.items():
                for key in [key for key, value in values.items() if getattr(sys.modules[name], key) is not value]:
                    if inspect.isclass(values[key]):
                        setattr(sys.modules[name], key, values[key])  # models that are built later are others' business
                    else:
                        self._undo.callback(setattr, sys.modules[name], key, values[key])

    def uninstall(self) -> None:
        """Give the models their own forwards back, and transformers its functions."""
        self._undo.close()

    @torch.no_grad()
    def differing(self, device: torch.device, *, autocast_dtype: torch.dtype | None) -> str | None:
        """What the kernels compute otherwise than the models do, in words; None where they agree up to rounding. The
        models are moved to ``device``."""
        for model in self._models:
            model.to(device)  # pyright: ignore[reportArgumentType]
            own = _final_states(model, autocast_dtype)
            self.install()
            try:
                theirs = _final_states(model, autocast_dtype)
            finally:
                self.uninstall()
            apart = float((theirs - own).norm() / own.norm())
            allowed = TOLERANCE.get(autocast_dtype or model.dtype, TOLERANCE[torch.bfloat16])
            if not apart <= allowed:
                return f"final states are {apart:.2g} of their norm apart, {allowed:g} may be rounding"
        return None


def _families() -> dict[str, Callable[..., None]]:
    from liger_kernel.transformers import monkey_patch  # pyright: ignore[reportMissingImports]

    return monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN


def _parts(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    return model, decoder_body(model)


def _forget(module: nn.Module, names: set[str]) -> None:
    for name in names:
        vars(module).pop(name, None)


def _final_states(model: PreTrainedModel, autocast_dtype: torch.dtype | None) -> Tensor:
    device = next(model.parameters()).device
    vocabulary = text_config(model.config).vocab_size
    ids = torch.randint(0, vocabulary, (1, PROOF_TOKENS), generator=torch.Generator().manual_seed(0)).to(device)
    was_training = model.training
    model.eval()
    with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
        states: Any = decoder_body(model)(input_ids=ids, use_cache=False).last_hidden_state
    model.train(was_training)
    return states.float()
