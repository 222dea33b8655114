"""Faster ways through a model while it is trained, taken back when training ends: regions compiled by torch.compile,
and Liger's kernels for RMS norms, gated MLPs and rotary embedding; not its losses.

Only regions are compiled, never a whole model: a layer is compiled once for all layers of its kind, the loss once for
all chunks, and what looks into a model between layers (hooks, masks, ZeRO's) goes on as before.

Liger's kernels do the same arithmetic in one pass over memory and keep less for the backward pass. Liger (Hsu et al.
2024, arXiv:2410.10989) puts them into classes and functions of transformers, where later models would have them too;
here they are taken back from there.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._dynamo import config as dynamo
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._functorch import config as functorch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from shoal.errors import UserError
from shoal.models.anatomy import decoder_body

log = logging.getLogger(__name__)

BACKEND = "inductor"
"""What makes machine code of a graph; tests that look at graphs alone take one that needs no compiler."""
VARIANTS = 64
"""Times that one function may be compiled: layers differ in kind, precision, masks, and in what of them is trained."""
LOSSES = ("cross_entropy", "fused_linear_cross_entropy")
"""Kernels of Liger that would take the place of the loss."""


class Compiled:
    """Functions, the forwards of ``layers`` among them, that run compiled while this is installed; from the first that
    cannot be compiled on, all run as they are, and one warning says why.

    Of layers only the forward of the instances changes: names, classes and state dicts stay, and hooks on a layer see
    it from outside.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._layers = tuple(layers)
        self._forwards: dict[type[nn.Module], tuple[Callable[..., Any], Callable[..., Any]]] = {}
        # by class and not by layer: weights are inputs of a graph, so that one serves all layers of a kind
        for kind in {type(layer) for layer in self._layers}:
            own: Any = kind.forward
            if issubclass(kind, GradientCheckpointingLayer):  # without what transformers wraps around it
                own = own.__wrapped__
            self._forwards[kind] = (own, _graphs(own))
        self._is_on = self._failed = False
        self._strict = contextlib.ExitStack()

    def install(self) -> None:
        """Compile from now on what is called, and put compiled forwards in the place of the layers' own."""
        # else torch would go on without a compiled function after VARIANTS, and find out in the middle of a backward
        # pass, where there is no way back, that it cannot be compiled
        self._strict.enter_context(dynamo.patch(fail_on_recompile_limit_hit=True))
        self._strict.enter_context(functorch.patch(force_non_lazy_backward_lowering=True))
        self._is_on = not self._failed
        for layer in self._layers:
            layer.forward = partial(self._run_layer, layer)

    def uninstall(self) -> None:
        """Give the layers their own forwards back, and torch its own settings."""
        for layer in self._layers:
            del layer.forward
        self._is_on = False
        self._strict.close()

    def function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """What runs ``function``, compiled where that can be done."""
        return partial(self._run, function, _graphs(function))

    def _run(self, function: Callable[..., Any], graphs: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._is_on:
            try:
                return graphs(*args, **kwargs)
            except Exception as error:
                is_of_dynamo = isinstance(error, TorchDynamoException | FailOnRecompileLimitHit)
                if not is_of_dynamo and not type(error).__module__.startswith("triton."):
                    raise  # of what is run, not of compiling it
                inner = getattr(error, "inner_exception", error.__cause__)
                if isinstance(inner, torch.OutOfMemoryError):  # without compiling even more would be needed
                    raise inner from error
                self._is_on, self._failed = False, True
                reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])[:300]
                log.warning(
                    "distill.trainer.torch_compile: %s cannot be compiled; training continues without compiling: %s",
                    getattr(function, "__qualname__", function),
                    reason,
                )
        return function(*args, **kwargs)

    def _run_layer(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        own, graphs = self._forwards[type(layer)]
        if getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled():
            # around the compiled layer and not within it: what it keeps is then one state, as without compiling
            return layer._gradient_checkpointing_func(partial(self._repeatable(own, graphs), layer, **kwargs), *args)
        return self._run(own, graphs, layer, *args, **kwargs)

    def _repeatable(self, function: Callable[..., Any], graphs: Callable[..., Any]) -> Callable[..., Any]:
        """What runs ``function`` a second time as it did the first: checkpointing wants the same tensors kept, and what
        comes behind a compiled layer may be the first that cannot be compiled."""
        first: list[Callable[..., Any]] = []

        def run(*args: Any, **kwargs: Any) -> Any:
            if first:
                return first[0](*args, **kwargs)
            result = self._run(function, graphs, *args, **kwargs)
            first.append(graphs if self._is_on else function)
            return result

        return run


def _graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, backend=BACKEND, recompile_limit=VARIANTS)  # pyright: ignore[reportCallIssue]


def require_liger(family: str, device: torch.device) -> None:
    """Refuse what Liger's kernels cannot run.

    Raises:
        UserError: they are not installed, not for ``device``, or not for models of ``family``.
    """
    reason = ""
    if importlib.util.find_spec("liger_kernel") is None or importlib.util.find_spec("triton") is None:
        reason = "liger-kernel is not installed; `pip install 'liger-kernel<0.9'`"
    elif device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        reason = "Liger's kernels run on GPUs, and this is a CPU"
    elif family not in _families():
        reason = f"Liger has no kernels for {family}"
    if reason:
        raise UserError(f"distill.trainer.use_liger_kernel: {reason}; or set it to false")


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
            modules = {type(part).__module__ for part in (model, decoder_body(model))}
            shared = {name: dict(vars(sys.modules[name])) for name in modules}
            apply(model=model, **off)
            for module in model.modules():
                for name in set(vars(module)) - before[id(module)]:
                    self._undo.callback(vars(module).pop, name, None)
            for name, values in shared.items():
                for key in [key for key, value in values.items() if getattr(sys.modules[name], key) is not value]:
                    if inspect.isclass(values[key]):
                        setattr(sys.modules[name], key, values[key])  # models that are built later are others' business
                    else:
                        self._undo.callback(setattr, sys.modules[name], key, values[key])

    def uninstall(self) -> None:
        """Give the models their own forwards back, and transformers its functions."""
        self._undo.close()


def _families() -> dict[str, Callable[..., None]]:
    from liger_kernel.transformers import monkey_patch  # pyright: ignore[reportMissingImports]

    return monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN
