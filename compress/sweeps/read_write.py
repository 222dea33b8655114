"""Reading against writing: what a layer does for other tokens of the prompt, and what where an answer is predicted.

Every quantity is INFERRED. ShortX (icip-cas) shows that layers which reading a prompt hardly needs are indispensable
for writing the answer; it has no number per layer. N items, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from shoal.artifacts.importance import ColumnReadWrite, Estimate, ReadWrite, Sweep, SweepColumn
from shoal.stats.bootstrap import bootstrap_p, expanded_percentiles, resampled_means
from shoal.stats.intervals import Array
from shoal.stats.paired import holm

from .atlas import protocol_gaps
from .table import ALPHA, OF_LAYERS, Measured


def read_write_of(tables: Mapping[str, tuple[Sweep, tuple[Measured, ...]]]) -> ReadWrite:
    """What every layer reads and writes, from what table_of gives for each of OF_LAYERS over the same tasks.

    Hidden writing of a layer is the share of the score above chance that is kept by likelihood less the share kept in
    generated text, while the layer writes nothing from the prompt's last token on: the protocol gap of skip_written.
    The atlas notes say why a pair of columns has none.
    """
    (_, layers), (read, prompt), (wrote, written) = (tables[operator] for operator in OF_LAYERS)
    columns = zip(layers, prompt, written, read.columns, wrote.columns, strict=True)
    return ReadWrite(
        tuple(_column(*column) for column in columns),
        hidden_writing=protocol_gaps(written)[0],
        hidden_reading=protocol_gaps(prompt)[0],
    )


def _column(
    layers: Measured, prompt: Measured, written: Measured, read: SweepColumn, wrote: SweepColumn
) -> ColumnReadWrite:
    assert layers.ids == prompt.ids == written.ids, "operators were swept over different items"
    interaction_NL = _losses(layers) - _losses(prompt) - _losses(written)
    interactions, p_values = _means(interaction_NL, layers)
    return ColumnReadWrite(
        layers.task.task,
        reading=read.losses,
        writing=wrote.losses,
        interaction=interactions,
        reads=read.critical,
        writes=wrote.critical,
        interacts=tuple(layer for layer, p in enumerate(holm(p_values)) if p < ALPHA),
    )


def _losses(column: Measured) -> Array:
    """(N, L) By how much every item is worse than with the intact model."""
    losses_NL = column.scores_NK[:, :1] - column.scores_NK[:, 1:]
    return losses_NL if column.task.higher_is_better else -losses_NL


def _means(values_NL: Array, column: Measured) -> tuple[tuple[Estimate, ...], list[float]]:
    """The mean of every layer with its paired bootstrap interval, and the p-values that it is 0."""
    value_L = np.average(values_NL, axis=0, weights=column.weights_N)
    means_RL = resampled_means(values_NL, column.weights_N)
    limits = expanded_percentiles(means_RL, value_L, column.effective_n)
    rows = zip(value_L.tolist(), *(limit.tolist() for limit in limits), strict=True)
    return tuple(Estimate(*row) for row in rows), bootstrap_p(means_RL, value_L, column.effective_n).tolist()
