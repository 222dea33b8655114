"""What hidden-state metrics share: one batch, read layer by layer.

A metric names what it reads; whatever several of them read is computed once. Sums per token and per document are what
remains of a batch, and they go to the CPU at its end, where the last steps run in float64: the arc cosine of a float32
cosine next to 1 is off by 3e-4, which is more than some layers matter.

B rows, S tokens of each, T = B*S, D hidden, L layers, M documents.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from shoal.models.document_masks import document_starts
from shoal.runtime import queued

from .metric import Calibration

Reading = Literal["products", "updates", "last"]
"""Quantity that a metric reads. products: inner ones of a layer's input and output; updates: norms of their difference;
last: states of documents' last tokens."""

Quantity = Literal["products", "before_squares", "after_squares", "update_squares"]
"""Number of every layer; squares: squared norms of its input, its output and what it adds."""

NUMBERS = ("products", "before_squares", "after_squares", "update_squares")


@dataclass(frozen=True)
class Batch:
    """Rows that run together. On the model's device, but for indices of all data."""

    rows_B: Tensor
    """Indices in the calibration data."""
    input_ids_BS: Tensor
    position_ids_BS: Tensor
    last_M: Tensor
    """Flat indices of every document's last token."""

    @classmethod
    def of(cls, calibration: Calibration, rows_B: Tensor, device: torch.device) -> Batch:
        """The rows ``rows_B``."""
        position_ids_BS = calibration.rows.position_ids_NS[rows_B].long()
        starts_BS = document_starts(position_ids_BS)
        ends_T = starts_BS.roll(-1, dims=1).flatten()  # the next token starts a document, or the row ends
        return cls(
            rows_B,
            queued(calibration.rows.input_ids_NS[rows_B], device),
            queued(position_ids_BS, device),
            last_M=queued(ends_T.nonzero().flatten(), device),
        )

    @property
    def num_tokens(self) -> int:
        """T"""
        return self.input_ids_BS.numel()


class Observation:
    """One batch of one forward pass. ``observe`` is called for every layer in order; then the rest can be read."""

    def __init__(self, batch: Batch, num_layers: int, reads: Collection[Reading]) -> None:
        self.batch = batch
        self.num_layers = num_layers
        self._reads = frozenset(reads)
        self._found: defaultdict[str, list[Tensor]] = defaultdict(list)
        """By quantity what was found of every layer, or of all L+1 states."""

    def observe(self, layer: int, before_TD: Tensor, after_TD: Tensor) -> None:
        """Take what is needed from one layer's raw input and output."""
        found, reads = self._found, self._reads
        self._keep(before_TD)
        if layer == self.num_layers - 1:
            self._keep(after_TD)
        before, after = before_TD.float(), after_TD.float()  # one conversion serves every reading
        found["before_squares"].append(torch.linalg.vecdot(before, before))
        found["after_squares"].append(torch.linalg.vecdot(after, after))
        if "products" in reads:
            found["products"].append(torch.linalg.vecdot(before, after))
        if "updates" in reads:
            found["update_squares"].append(torch.linalg.vector_norm(after - before, dim=1).square())

    def _keep(self, state_TD: Tensor) -> None:
        if "last" in self._reads:
            self._found["last"].append(state_TD[self.batch.last_M])

    def of_layers(self, quantity: Quantity) -> Tensor:
        """What was found of every layer for each token, (L, T)."""
        return self._fetched[quantity]

    @cached_property
    def _fetched(self) -> dict[str, Tensor]:
        """of_layers; a GPU is waited for once for all."""
        found = {name: torch.stack(self._found[name]) for name in NUMBERS if name in self._found}
        return dict(zip(found, torch.stack(list(found.values())).cpu().double(), strict=True)) if found else {}

    @property
    def last_MLD(self) -> Tensor:
        """States (M, L+1, D) of every document's last token."""
        return torch.stack(self._found["last"], dim=1).cpu().double()

    def first_fault(self) -> tuple[int, int] | None:
        """The lowest of the L+1 states that is not finite, and its first token; None where all are.

        The state comes first: attention carries a NaN to tokens before it, because 0 times NaN is NaN.
        """
        bad_LT = ~torch.cat([self.of_layers("before_squares"), self.of_layers("after_squares")[-1:]]).isfinite()
        if not bad_LT.any():
            return None
        state = int(bad_LT.any(dim=1).nonzero()[0])
        return state, int(bad_LT[state].nonzero()[0])


def cosine(dot: Tensor, first_square: Tensor, second_square: Tensor) -> Tensor:
    """Cosine in [-1, 1]; exactly 1 for equal vectors and for two zero ones: nothing has changed. NaN stays NaN."""
    scale = (first_square * second_square).sqrt()
    cosines = torch.where(scale == 0, 0.0, dot / scale)
    cosines = torch.where((first_square == 0) & (second_square == 0), 1.0, cosines)
    return cosines.clamp(-1, 1)
