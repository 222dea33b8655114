"""Which token comes next: the likeliest, or one that numbers from [0, 1) draw. B rows, T new tokens, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor

Choose = Callable[[Tensor, Sequence[int], int], Tensor]
"""Logits (B, V), the texts that the rows belong to and how many tokens each has, in; the next tokens (B,), out."""


def likeliest(logits_BV: Tensor, texts: Sequence[int], num_written: int) -> Tensor:
    """The likeliest token of every row, (B,)."""
    del texts, num_written
    return logits_BV.argmax(-1)


@dataclass(frozen=True)
class Drawn:
    """Draws every token by a number of its own: a text depends on its numbers and not on its neighbours in a batch."""

    uniforms_BT: Tensor
    """A row per text, on the device of the logits."""
    temperature: float
    top_p: float = 1.0

    def __call__(self, logits_BV: Tensor, texts: Sequence[int], num_written: int) -> Tensor:
        uniforms_B = self.uniforms_BT[list(texts), num_written]
        return draw(logits_BV, uniforms_B, temperature=self.temperature, top_p=self.top_p)


class DrawnOnly(LogitsProcessor):
    """Leaves transformers' greedy `generate` nothing but the drawn token to take."""

    def __init__(self, drawn: Drawn) -> None:
        self._drawn, self._num_written = drawn, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        chosen_B = self._drawn(scores, range(len(scores)), self._num_written)
        self._num_written += 1
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen_B[:, None], 0.0)


def draw(logits_BV: Tensor, uniforms_B: Tensor, *, temperature: float, top_p: float = 1.0) -> Tensor:
    """One token per row, (B,): the inverse of the row's distribution function at its uniform number.

    ``temperature`` 0 takes the likeliest; of the likeliest tokens the fewest that hold the share ``top_p`` are drawn
    from. In float64, where rounding in a sum over a large vocabulary does not shift what is drawn.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    chances_BV = torch.softmax(logits_BV.double() / temperature, -1)
    if top_p < 1:
        sorted_BV, order_BV = chances_BV.sort(-1, descending=True)
        outside_BV = sorted_BV.cumsum(-1) - sorted_BV >= top_p  # the token that passes the border stays
        chances_BV = chances_BV.masked_fill(outside_BV.scatter(-1, order_BV, outside_BV), 0.0)
    cumulative_BV = chances_BV.cumsum(-1)
    at_B1 = (uniforms_B.double() * cumulative_BV[:, -1])[:, None]
    return torch.searchsorted(cumulative_BV, at_B1, right=True)[:, 0].clamp(max=logits_BV.shape[-1] - 1)
