"""What passes through a model's decoder layers while it runs: raw states, and what attention is computed from.

B batch, S sequence, D hidden, H query heads, G key-value heads, d size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers, state_of

NO_STATES = "take hidden_states out of distill.losses"
NO_RELATIONS = "take attention_relation and value_relation out of distill.losses"


@dataclass(frozen=True)
class AttentionInputs:
    """What one layer's attention is computed from, after rotary embedding and all norms."""

    query_BHSd: Tensor
    key_BGSd: Tensor
    value_BGSd: Tensor
    scale: float
    """Factor of the scores."""
    softcap: float | None = None
    """Scores are bent to lie within +/- this; None = they are not."""
    seen_B1SS: Tensor | None = None
    """Which keys a query sees, by the mask that the layer was given (its first dimension may be 1); None = without a
    mask: all of its document up to itself."""


@dataclass
class Captured:
    """What was seen of one forward pass, by layer of the model that ran. Recorded states make one too."""

    states: dict[int, Tensor] = field(default_factory=dict)
    """(B, S, D) after a layer, before any final norm."""
    attention: dict[int, AttentionInputs] = field(default_factory=dict)


@contextmanager
def capturing(model: PreTrainedModel, layers: Collection[int], attention: Collection[int] = ()) -> Iterator[Captured]:
    """While ``model`` runs once: the raw states after ``layers`` and the inputs of the attention of ``attention``.

    By hooks, because the last state that transformers returns is behind the final norm. What runs again when gradient
    checkpointing recomputes a layer is not taken a second time. No parameter is touched: ZeRO-3 may have sharded them.

    Raises:
        UserError: layers whose output is not one (B, S, D) stream or is overwritten later; a layer whose attention
            does not go through transformers' attention interface.
    """
    seen = Captured()
    versions: dict[int, int] = {}
    decoder = decoder_layers(model)
    family = model.config.model_type

    def keep(layer: int, _module: nn.Module, _args: Any, output: Any) -> None:
        state = state_of(output)
        if not isinstance(state, Tensor) or state.ndim != 3:
            raise UserError(f"{family}: layer {layer} does not return one stream of hidden states; {NO_STATES}")
        if layer not in seen.states:  # else checkpointing runs the layer a second time
            seen.states[layer] = state
            versions[layer] = _version(state)

    with ExitStack() as stack:
        for layer in sorted(layers):
            stack.callback(decoder[layer].register_forward_hook(partial(keep, layer)).remove)
        if attention:
            stack.enter_context(_attention_calls(model, attention, seen.attention))
        yield seen
    for layer, state in seen.states.items():
        if _version(state) != versions[layer]:
            raise UserError(f"{family}: what layer {layer} returns is overwritten by the layer after it; {NO_STATES}")
    missing = sorted(set(attention) - seen.attention.keys())
    if missing:
        raise UserError(
            f"{family}: layer {missing[0]} has no attention that shoal can look into (no softmax attention, or not by "
            f"transformers' attention interface); name other layers, or {NO_RELATIONS}"
        )


def _version(state: Tensor) -> int:
    return 0 if state.is_inference() else state._version


@contextmanager
def _attention_calls(
    model: PreTrainedModel, layers: Collection[int], seen: dict[int, AttentionInputs]
) -> Iterator[None]:
    """Every attention of ``layers`` leaves its inputs in ``seen``.

    Where families compute queries, keys and values differs (fused, latent, normed, rotated); that they hand them to
    one interface does not.
    """
    decoder, family = decoder_layers(model), model.config.model_type
    layer_of = {id(module): layer for layer in layers for module in decoder[layer].modules()}
    callers: dict[int, int] = {}
    get_interface = AttentionInterface.get_interface

    def take(
        interface: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs
    ) -> Any:
        layer = layer_of.get(id(module))
        if layer is not None:
            if callers.setdefault(layer, id(module)) != id(module):
                raise UserError(f"{family}: layer {layer} has more than one attention; {NO_RELATIONS}")
            mask = args[0] if args else kwargs.get("attention_mask")
            # one per head is no question of who sees whom: Doge adds what it has learnt of every key
            if kwargs.get("position_bias") is not None or (mask is not None and mask.shape[1] != 1):
                raise UserError(f"{family}: attention of layer {layer} adds biases to its scores; {NO_RELATIONS}")
            if layer not in seen:
                seen[layer] = _inputs(query, key, value, mask, kwargs)
        return interface(module, query, key, value, *args, **kwargs)

    def recorded(interfaces: AttentionInterface, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        return partial(take, get_interface(interfaces, *args, **kwargs))

    AttentionInterface.get_interface = recorded  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        AttentionInterface.get_interface = get_interface


def _inputs(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, settings: dict[str, Any]
) -> AttentionInputs:
    scale = settings.get("scaling")
    return AttentionInputs(
        query,
        key,
        value,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        softcap=settings.get("softcap"),
        # eager attention adds its mask to the scores: 0 to what is seen
        seen_B1SS=mask if mask is None or mask.dtype == torch.bool else mask == 0,
    )
