"""Variants of a tiny model, and requests to them."""

from __future__ import annotations

from typing import Any

import torch
from tiny import NUM_LAYERS

from shoal.components import REMOVED, LayerEdit
from shoal.compress.variants.variants import INTACT, variant, without
from shoal.inference.prefix_sharing import Tokens

VARIED: dict[str, Any] = {"initializer_range": 0.3}
"""At which greedy text varies and equal texts mean something."""


def requests(*, num_questions: int = 5, seed: int = 0) -> list[tuple[Tokens, Tokens]]:
    """Contexts of several lengths, beyond the sliding window too, each with options of several lengths, and texts."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> Tokens:
        return tuple(torch.randint(0, 250, (length,), generator=generator).tolist())

    found = []
    for number in range(num_questions):
        context = tokens(4 + 5 * number)
        found += [(context, tokens(length)) for length in (1, 3, 3, 6)]
    return [*found, ((256,), tokens(20)), ((256,), tokens(9))]


def prompts(*, shared: int, count: int = 4, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> list[int]:
        return torch.randint(0, 250, (length,), generator=generator).tolist()

    beginning = tokens(shared)
    return [[*beginning, *tokens(2 + 4 * number)] for number in range(count)]


VARIANTS = [
    INTACT,
    *(without([layer]) for layer in range(NUM_LAYERS)),
    without([1, 2]),
    without([1, 4]),
    without([0, 1, 2, 3, 4]),
    *(variant(f"{half}{layer}", [(layer, LayerEdit(half))]) for layer in (0, 3) for half in ("attention", "mlp")),
    variant("both halves", [(2, LayerEdit("mlp")), (2, LayerEdit("attention"))]),
    variant("heads", [(5, LayerEdit("head", (1, 2))), (3, LayerEdit("head", (0,)))]),
    variant("prompt", [(2, LayerEdit("skip_prompt"))]),
    variant("prompt, written", [(1, LayerEdit("skip_prompt")), (4, LayerEdit("skip_written"))]),
    variant("mixed", [(4, REMOVED), (2, LayerEdit("mlp")), (1, LayerEdit("head", (3,)))]),
]
