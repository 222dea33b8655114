"""In which order packed rows are dealt out to ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler


class StepSampler(Sampler[int]):
    """Rows as they are packed, step by step, and inside of a step those that ask the teacher behind the others.

    A step holds the same rows as without that, and its loss is their sum. The Trainer deals a step out micro-batch by
    micro-batch, in each rank by rank. So all ranks run the teacher in the same micro-batches, but for one in which they
    have as many rows each that ask it, give or take one: a step takes as long as its slowest rank.
    """

    def __init__(self, asks_N: NDArray[np.bool_], *, rows: int, ranks: int, micro_batches: int) -> None:
        """``asks_N``: whether the teacher is asked of a row. A step has ``micro_batches`` of ``rows`` rows on every
        rank."""
        super().__init__()
        self._asks_N = asks_N
        self._shape = (micro_batches, rows, ranks)

    def __len__(self) -> int:
        return len(self._asks_N)

    def __iter__(self) -> Iterator[int]:
        per_step = int(np.prod(self._shape))
        for start in range(0, len(self), per_step):
            yield from (start + self._dealt(self._asks_N[start : start + per_step])).tolist()

    def _dealt(self, asks: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Places of a step's rows in the order in which they are dealt."""
        order = asks.argsort(kind="stable")
        if asks.all() or not asks.any() or asks.size != np.prod(self._shape):
            return order
        # one to each rank in turn, until all have their micro-batch
        return order.reshape(self._shape).swapaxes(1, 2).ravel()
