"""What the head reads of rows, by a model that is larger than memory: one pass over its files, layer by layer.

N rows, S sequence, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.models.load import before_head
from shoal.progress import each

from .streamed_model import StreamedLayerwise, StreamedModel


@torch.no_grad()
def final_states(model: StreamedModel, ids_NS: Tensor, positions_NS: Tensor) -> Tensor:
    """Final hidden states, (N, S, D), on the CPU, of rows whose documents ``positions_NS`` tell apart. The head of
    ``model`` is loaded afterwards.

    Raises:
        UserError: layers that cannot be run one by one.
    """
    model.load_rest()
    layerwise = StreamedLayerwise(model.model, whole=model.whole)
    rows = [
        layerwise.prepare({"input_ids": ids[None].long(), "position_ids": positions[None].long(), "use_cache": False})
        for ids, positions in zip(ids_NS.to(model.device), positions_NS.to(model.device), strict=True)
    ]
    states = [row.hidden_BSD for row in rows]
    for layer in each(range(model.num_layers), "teacher, layer by layer", unit="layers"):
        with model.layer(layer):
            states = [layerwise.run(layer, state, row.calls[layer]) for state, row in zip(states, rows, strict=True)]
    states = [layerwise.finish(state, row) for state, row in zip(states, rows, strict=True)]
    if (prepare := before_head(model.model)) is not None:
        states = [prepare(state) for state in states]
    return torch.cat([state.cpu() for state in states])
