"""What passes through a model's decoder layers while it runs: raw states.

B batch, S sequence, D hidden.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers, state_of

NO_STATES = "take hidden_states out of distill.losses"


@dataclass
class Captured:
    """What was seen of one forward pass, by layer of the model that ran. Recorded states make one too."""

    states: dict[int, Tensor] = field(default_factory=dict)
    """(B, S, D) after a layer, before any final norm."""


@contextmanager
def capturing(model: PreTrainedModel, layers: Collection[int]) -> Iterator[Captured]:
    """While ``model`` runs once: the raw states after ``layers``.

    By hooks, because the last state that transformers returns is behind the final norm. What runs again when gradient
    checkpointing recomputes a layer is not taken a second time. No parameter is touched: ZeRO-3 may have sharded them.

    Raises:
        UserError: layers whose output is not one (B, S, D) stream or is overwritten later.
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
        yield seen
    for layer, state in seen.states.items():
        if _version(state) != versions[layer]:
            raise UserError(f"{family}: what layer {layer} returns is overwritten by the layer after it; {NO_STATES}")


def _version(state: Tensor) -> int:
    return 0 if state.is_inference() else state._version
