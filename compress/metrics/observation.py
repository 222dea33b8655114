"""What hidden-state metrics share: one batch, read layer by layer while its states are in the processor's cache.

A metric names what it reads; whatever several of them read is computed once. Sums per token and per document are what
remains of a batch, and they go to the CPU at its end, where the last steps run in float64: the arc cosine of a float32
cosine next to 1 is off by 3e-4, which is more than some layers matter.

T = B*S tokens of a batch, P of them in one piece, D hidden, L layers, M documents, K sampled tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Reading = Literal["products", "updates", "output_spread", "update_spread", "last", "cosines", "sample"]
"""Quantity that a metric reads. products: inner ones of a layer's input and output; updates: norms of their difference;
spread: sums that AVSS needs of one of them; last: states of documents' last tokens; cosines: those between all layers,
summed over tokens; sample: states of some tokens."""

PIECE_ELEMENTS = {"cpu": 1 << 18}
"""Hidden-state elements converted to float32 at one time, by device type: on a CPU what fits its cache."""
DEFAULT_PIECE_ELEMENTS = 1 << 26
ROWS_MULTIPLE = 16
"""Products of matrices with so many rows take half the time of those with one row less."""
SPARSE_BELOW = 1e-3
"""A unit counts as silent below this share of its token's root mean square."""


@dataclass(frozen=True)
class BatchView:
    """Tokens of a batch that count. On the model's device, but for ``real_T`` and ``slots_K``."""

    real_T: Tensor
    """Mask of tokens that are no padding."""
    document_T: Tensor
    """Index of every token's document; that of padding is the number of documents."""
    lengths_M: Tensor
    """Tokens per document."""
    last_M: Tensor
    """Flat indices of every document's last real token."""
    sample_K: Tensor
    """Flat indices of the tokens of this batch that are in the sample of the whole pass."""
    slots_K: Tensor
    """Places of these tokens in that sample."""


@dataclass(frozen=True)
class _Spread:
    """Sums over one layer's states that AVSS needs."""

    pooled_MD: Tensor
    """States added up per document; the last row is padding's."""
    silent_T: Tensor
    """Silent units per token."""

    @classmethod
    def empty(cls, view: BatchView, state_TD: Tensor) -> _Spread:
        tokens, width = state_TD.shape
        pooled = torch.zeros(len(view.lengths_M) + 1, width, device=state_TD.device)
        return cls(pooled, torch.empty(tokens, device=state_TD.device))

    def add(self, piece: slice, states_PD: Tensor, squares_P: Tensor, buffer_PD: Tensor, view: BatchView) -> None:
        width = states_PD.shape[1]
        self.pooled_MD.index_add_(0, view.document_T[piece], states_PD)
        limits_P = SPARSE_BELOW * (squares_P / width).sqrt()
        # the buffer holds |state|, then in the same place 1 where a unit is silent, else 0
        is_silent = torch.lt(torch.abs(states_PD, out=buffer_PD), limits_P[:, None], out=buffer_PD)
        torch.mv(is_silent, is_silent.new_ones(width), out=self.silent_T[piece])

    def sums_2(self, view: BatchView, real_T: Tensor) -> Tensor:
        """Variances of documents' mean states over hidden units, and silent units, both added up."""
        means_MD = self.pooled_MD[:-1] / view.lengths_M[:, None]  # without padding's row
        return torch.stack([means_MD.var(dim=1, correction=0).double().sum(), self.silent_T[real_T].double().sum()])


class Observation:
    """One batch of one forward pass. ``observe`` is called for every layer in order; then the rest can be read."""

    def __init__(self, view: BatchView, num_layers: int, reads: Collection[Reading]) -> None:
        self.view = view
        self.num_layers = num_layers
        self._reads = frozenset(reads)
        self._real_T = view.real_T.to(view.last_M.device)
        self._before_squares: list[Tensor] = []
        self._after_squares: list[Tensor] = []
        self._previous: Tensor | None = None
        """Output of the layer before: as a rule the next layer's input, so that its norms are known."""
        self._products: list[Tensor] = []
        self._update_squares: list[Tensor] = []
        self._spreads: dict[Reading, list[_Spread]] = {"output_spread": [], "update_spread": []}
        self._last: list[Tensor] = []
        self._sample: list[Tensor] = []
        self._kept: list[Tensor] = []
        self._buffers: list[Tensor] = []

    def observe(self, layer: int, before_TD: Tensor, after_TD: Tensor) -> None:
        """Take what is needed from one layer's raw input and output."""
        # norms of an input that is the last output are known; some families scale or copy between layers
        is_known = self._previous is not None and _is_same(before_TD, self._previous)
        self._before_squares.append(self._after_squares[-1] if is_known else _squares(before_TD))
        self._previous = after_TD
        self._keep(before_TD)
        if layer == self.num_layers - 1:
            self._keep(after_TD)
        # room for one float32 per token, filled piece by piece below
        for numbers in (self._after_squares, self._products, self._update_squares):
            numbers.append(torch.empty(len(after_TD), device=after_TD.device))
        for kind, spreads in self._spreads.items():
            if kind in self._reads:
                spreads.append(_Spread.empty(self.view, after_TD))
        if not self._buffers:
            self._buffers = [torch.empty(_step(after_TD), after_TD.shape[1], device=after_TD.device) for _ in range(4)]
        for piece in pieces(after_TD):
            self._take(piece, before_TD[piece], after_TD[piece])

    def _take(self, piece: slice, before_PD: Tensor, after_PD: Tensor) -> None:
        """Some tokens of one layer. All goes into memory that is there: fresh memory costs more than arithmetic."""
        buffers = [buffer[: len(after_PD)] for buffer in self._buffers]
        after = _float32(after_PD, buffers[0])  # one conversion serves every reading
        torch.linalg.vecdot(after, after, out=self._after_squares[-1][piece])
        if "output_spread" in self._reads:
            self._spreads["output_spread"][-1].add(piece, after, self._after_squares[-1][piece], buffers[3], self.view)
        if not self._reads & {"products", "updates", "update_spread"}:
            return
        before = _float32(before_PD, buffers[1])
        if "products" in self._reads:
            torch.linalg.vecdot(before, after, out=self._products[-1][piece])
        if self._reads & {"updates", "update_spread"}:
            update = torch.sub(after, before, out=buffers[2])
            squares = torch.linalg.vector_norm(update, dim=1, out=self._update_squares[-1][piece]).square_()
            if "update_spread" in self._reads:
                self._spreads["update_spread"][-1].add(piece, update, squares, buffers[3], self.view)

    def _keep(self, state_TD: Tensor) -> None:
        if "last" in self._reads:
            self._last.append(state_TD[self.view.last_M])
        if "sample" in self._reads:
            self._sample.append(state_TD[self.view.sample_K].float())
        if "cosines" in self._reads:
            self._kept.append(state_TD)

    @property
    def before_squares_LT(self) -> Tensor:
        """Squared norms of every layer's input."""
        return torch.stack(self._before_squares).cpu().double()

    @property
    def after_squares_LT(self) -> Tensor:
        """Squared norms of every layer's output."""
        return torch.stack(self._after_squares).cpu().double()

    @property
    def products_LT(self) -> Tensor:
        """Inner products of every layer's input and output."""
        return torch.stack(self._products).cpu().double()

    @property
    def update_squares_LT(self) -> Tensor:
        """Squared norms of what every layer adds."""
        return torch.stack(self._update_squares).cpu().double()

    def spread_L2(self, kind: Reading) -> Tensor:
        """Per layer the variance of the document's mean state over hidden units, summed over documents, and the number
        of silent units, summed over tokens."""
        return torch.stack([spread.sums_2(self.view, self._real_T) for spread in self._spreads[kind]]).cpu()

    @property
    def last_MLD(self) -> Tensor:
        """States (M, L+1, D) of every document's last token."""
        return torch.stack(self._last, dim=1).cpu().double()

    @property
    def sample_KLD(self) -> Tensor:
        """States (K, L+1, D) of the sampled tokens, in float32."""
        return torch.stack(self._sample, dim=1).cpu()

    def cosine_sums_LL(self) -> Tensor:
        """Cosines between the states (L+1) of each token, summed over tokens.

        The sum over tokens and units is one matrix product of all normalised states, laid out as L+1 long rows.
        """
        squares_LT = self._state_squares()  # L + 1 rows
        inverse_LT = torch.where(self._real_T & (squares_LT > 0), squares_LT.rsqrt(), 0)  # padding adds nothing
        padded = -(-len(squares_LT) // ROWS_MULTIPLE) * ROWS_MULTIPLE
        # four times the elements of other pieces, for all states together
        step, width = max(1, _step(self._kept[0]) * 4 // padded), self._kept[0].shape[1]
        buffer_LPD = torch.zeros(padded, step, width, device=squares_LT.device)
        sums_LL = torch.zeros(padded, padded, dtype=torch.float64, device=squares_LT.device)
        for start in range(0, squares_LT.shape[1], step):
            piece = slice(start, start + step)
            rows_LPD = buffer_LPD[:, : inverse_LT[:, piece].shape[1]]
            for state_TD, row_PD in zip(self._kept, rows_LPD, strict=False):
                row_PD.copy_(state_TD[piece])
            rows_LPD[: len(squares_LT)].mul_(inverse_LT[:, piece, None])
            rows_LN = rows_LPD.flatten(1)  # N = P * D
            sums_LL += rows_LN @ rows_LN.mT  # float32 within a piece, float64 over pieces
        # two zero states count as equal, as in cosine()
        zero_LT = (self._real_T & (squares_LT == 0)).double()
        return (sums_LL[: len(squares_LT), : len(squares_LT)] + zero_LT @ zero_LT.mT).cpu()

    def _state_squares(self) -> Tensor:
        """Squared norms (L+1, T) of every layer's input and of the last one's output."""
        return torch.stack([*self._before_squares, self._after_squares[-1]])

    def first_fault(self) -> tuple[int, int] | None:
        """The lowest of the L+1 states that is not finite, and its first token; None where all are.

        The state comes first: attention carries a NaN to tokens before it, because 0 times NaN is NaN.
        """
        bad_LT = ~self._state_squares().isfinite() & self._real_T
        if not bad_LT.any():
            return None
        state = int(bad_LT.any(dim=1).nonzero()[0])
        return state, int(bad_LT[state].nonzero()[0])


def pieces(state_TD: Tensor) -> Iterator[slice]:
    """Slices of tokens that are worked on at one time."""
    tokens, step = len(state_TD), _step(state_TD)
    return (slice(start, min(start + step, tokens)) for start in range(0, tokens, step))


def _step(state_TD: Tensor) -> int:
    elements = PIECE_ELEMENTS.get(state_TD.device.type, DEFAULT_PIECE_ELEMENTS)
    return min(len(state_TD), max(1, elements // state_TD.shape[1]))


def _float32(state_PD: Tensor, buffer_PD: Tensor) -> Tensor:
    return state_PD if state_PD.dtype == torch.float32 else buffer_PD.copy_(state_PD)


def _is_same(first: Tensor, second: Tensor) -> bool:
    return first is second or (first.data_ptr(), first.shape, first.stride()) == (
        second.data_ptr(),
        second.shape,
        second.stride(),
    )


def _squares(state_TD: Tensor) -> Tensor:
    squares = torch.empty(len(state_TD), device=state_TD.device)
    for piece in pieces(state_TD):
        state = state_TD[piece].float()
        torch.linalg.vecdot(state, state, out=squares[piece])
    return squares


def cosine(dot: Tensor, first_square: Tensor, second_square: Tensor) -> Tensor:
    """Cosine in [-1, 1]; exactly 1 for equal vectors and for two zero ones: nothing has changed. NaN stays NaN."""
    scale = (first_square * second_square).sqrt()
    cosines = torch.where(scale == 0, 0.0, dot / scale)
    cosines = torch.where((first_square == 0) & (second_square == 0), 1.0, cosines)
    return cosines.clamp(-1, 1)
