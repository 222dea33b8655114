"""Importance metrics computed from hidden states. B batch, S sequence, D hidden, L layers, M documents, T = B*S tokens.

A metric sees every decoder layer's raw input and output once per batch and keeps additive sums only, so that batches
and ranks add up to the same scores. What is per token or per document stays small and goes to the CPU at the end of a
batch, where the last steps run in float64: the arc cosine of a float32 cosine next to 1 is off by 3e-4, which is more
than some layers matter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

Runs = tuple[tuple[float, ...], ...]

PIECE_ELEMENTS = {"cpu": 1 << 18}
"""Hidden-state elements converted to float32 at one time, by device type: on a CPU what fits its cache."""
DEFAULT_PIECE_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class BatchView:
    """What of a batch counts."""

    real_T: Tensor
    """Which tokens are no padding, on the CPU."""
    last_M: Tensor
    """Flat indices of every document's last real token, on the model's device."""


class HiddenMetric(ABC):
    """One number per layer or run from raw hidden states; a lower score means: remove first."""

    needs: ClassVar[Literal["hidden"]] = "hidden"
    """What must be computed for the metric; "hidden" = one forward pass without the output head."""
    yields: ClassVar[Literal["layers", "runs"]]

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.sums: Tensor = torch.zeros(self.sums_shape(), dtype=torch.float64)
        self.count = 0
        """Tokens or documents in ``sums``."""

    @abstractmethod
    def sums_shape(self) -> tuple[int, ...]: ...

    @abstractmethod
    def observe(self, layer: int, before_TD: Tensor, after_TD: Tensor, view: BatchView) -> None:
        """Take what is needed from one layer's input and output; both are freed afterwards."""

    @abstractmethod
    def end_batch(self, view: BatchView) -> None:
        """Add the batch to the sums."""

    def layer_scores(self) -> tuple[float, ...]:
        raise NotImplementedError

    def run_scores(self) -> Runs:
        raise NotImplementedError


class BlockInfluence(HiddenMetric):
    """1 - mean over tokens of cos(h_l, h_{l+1}) (ShortGPT, Men et al. 2024, arXiv:2403.03853, equation 1)."""

    yields: ClassVar[Literal["layers", "runs"]] = "layers"

    def __init__(self, num_layers: int) -> None:
        super().__init__(num_layers)
        self._products: list[Tensor] = []

    def sums_shape(self) -> tuple[int, ...]:
        return (self.num_layers,)

    def observe(self, layer: int, before_TD: Tensor, after_TD: Tensor, view: BatchView) -> None:
        self._products.append(_products(before_TD, after_TD))

    def end_batch(self, view: BatchView) -> None:
        products_L3T = torch.stack(self._products).cpu().double()
        self._products.clear()
        cosines_LT = _cosine(*products_L3T.unbind(1))
        self.sums = self.sums + (1 - cosines_LT[:, view.real_T]).sum(1)
        self.count += int(view.real_T.sum())

    def layer_scores(self) -> tuple[float, ...]:
        return tuple((self.sums / self.count).tolist())


class Angular(HiddenMetric):
    """(1/pi) mean over documents of arccos cos(h_l, h_{l+n}) at the last token, for every run of n layers from l.

    Gromov et al. 2024, arXiv:2403.17887, equation 7.
    """

    yields: ClassVar[Literal["layers", "runs"]] = "runs"

    def __init__(self, num_layers: int) -> None:
        super().__init__(num_layers)
        self._states: list[Tensor] = []

    def sums_shape(self) -> tuple[int, ...]:
        return (self.num_layers + 1, self.num_layers + 1)

    def observe(self, layer: int, before_TD: Tensor, after_TD: Tensor, view: BatchView) -> None:
        self._states.append(before_TD[view.last_M])
        if layer == self.num_layers - 1:
            self._states.append(after_TD[view.last_M])

    def end_batch(self, view: BatchView) -> None:
        states_MLD = torch.stack(self._states, dim=1).cpu().double()
        self._states.clear()
        gram_MLL = states_MLD @ states_MLD.mT
        squares_ML = gram_MLL.diagonal(dim1=1, dim2=2)
        cosines_MLL = _cosine(gram_MLL, squares_ML[:, :, None], squares_ML[:, None, :])
        self.sums = self.sums + (cosines_MLL.arccos() / torch.pi).sum(0)
        self.count += len(states_MLD)

    def run_scores(self) -> Runs:
        means = self.sums / self.count
        return tuple(tuple(means.diagonal(length).tolist()) for length in range(1, self.num_layers + 1))


METRICS: dict[str, type[HiddenMetric]] = {"block_influence": BlockInfluence, "angular": Angular}
"""Name in recipes and in importance.json -> metric."""


def _products(before_TD: Tensor, after_TD: Tensor) -> Tensor:
    """The three inner products of a cosine, (3, T) in float32: before*after, before*before, after*after."""
    products = torch.empty(3, len(before_TD), device=before_TD.device, dtype=torch.float32)
    for piece in _pieces(before_TD):
        before, after = before_TD[piece].float(), after_TD[piece].float()
        torch.linalg.vecdot(before, after, out=products[0, piece])
        torch.linalg.vecdot(before, before, out=products[1, piece])
        torch.linalg.vecdot(after, after, out=products[2, piece])
    return products


def _pieces(states_TD: Tensor) -> Iterator[slice]:
    tokens, width = states_TD.shape
    step = max(1, PIECE_ELEMENTS.get(states_TD.device.type, DEFAULT_PIECE_ELEMENTS) // width)
    return (slice(start, min(start + step, tokens)) for start in range(0, tokens, step))


def _cosine(dot: Tensor, first_square: Tensor, second_square: Tensor) -> Tensor:
    """Cosine in [-1, 1]; exactly 1 for equal vectors and for two zero ones: nothing has changed. NaN stays NaN."""
    scale = (first_square * second_square).sqrt()
    cosine = torch.where(scale == 0, 0.0, dot / scale)
    cosine = torch.where((first_square == 0) & (second_square == 0), 1.0, cosine)
    return cosine.clamp(-1, 1)
