"""A made-up model of six unlike layers, for plans by size and time: no configuration, numbers to check by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shoal.compress.layer_sizes import LayerSizes, StoredBytes
from shoal.models.cost import Cost, LayerCache

PARAMETERS = (50, 300, 310, 40, 305, 60)
"""Of each layer: dense ones between mixtures of experts."""
TOKEN_BYTES = (4, 0, 4, 4, 0, 4)
"""Of the cache: two layers are recurrent."""
SCORES = (0.05, 0.4, 0.3, 0.1, 0.35, 0.12)
OUTSIDE = 200
LENGTH = 10


def sizes(**changes: Any) -> LayerSizes:
    """A model of 6 layers with two bytes per parameter, of which a mixture reads a fifth."""
    active = tuple(count if count < 100 else count // 5 for count in PARAMETERS)
    total = OUTSIDE + sum(PARAMETERS)
    cache = tuple(LayerCache(token_bytes=size, max_tokens=None, state_bytes=0 if size else 16) for size in TOKEN_BYTES)
    cost = Cost(6, total, OUTSIDE + sum(active), cache)
    stored = StoredBytes(2 * OUTSIDE, tuple(2 * count for count in PARAMETERS))
    return replace(LayerSizes(cost, stored, PARAMETERS, active, 2, LENGTH), **changes)
