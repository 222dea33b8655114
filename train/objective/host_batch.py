"""What the host knows of a micro-batch, so that a step need not ask the device.

Which tokens are learnt decides shapes: of what the head reads, of what states are compared. Every such question to a
tensor on a GPU waits until all that was queued before it is done, in the middle of a step; the host has known the
answer since it made the rows.

B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoal.data.image_rows import stacked_with_images
from shoal.data.packing import IGNORED, IMAGES, ROW, SOURCES
from shoal.recipe.distill import SAMPLES
from shoal.runtime import queued

ON_HOST = "on_host"
"""Its place in a batch. It has no method `to`, so what moves a batch to the device leaves it where it is."""


@dataclass(frozen=True)
class OnHost:
    """The planes of a micro-batch in the host's memory."""

    labels_BS: Tensor
    position_ids_BS: Tensor
    input_ids_BS: Tensor | None = None
    rows: Sequence[int] = ()
    """Numbers of the batch's rows in the packed rows; empty for what the student has written."""
    sources_BS: Tensor | None = None
    """Number of every token's source; None where that does not matter, or for what the student has written."""

    def labels_from(self, sources: Collection[int] | None) -> Tensor:
        """The labels of the tokens that are from these sources, IGNORED elsewhere, (B, S); None = from all. All of what
        the student has written is from SAMPLES."""
        is_written = self.sources_BS is None and not self.rows
        if sources is None or (is_written and SAMPLES in sources):
            return self.labels_BS
        if not sources or is_written:
            return torch.full_like(self.labels_BS, IGNORED)
        assert self.sources_BS is not None, "rows that are learnt by source were packed without their sources"
        theirs_BS = torch.zeros_like(self.sources_BS, dtype=torch.bool)
        for number in sources:
            theirs_BS |= self.sources_BS == number
        return self.labels_BS.masked_fill(~theirs_BS, IGNORED)


def with_host_copy(batch: dict[str, Tensor]) -> dict[str, Any]:
    """The batch, not yet on the device, and beside its tensors what the host knows of them."""
    return {**batch, ON_HOST: on_host(batch)}


def stacked(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """The micro-batch of these rows of shoal.data.packing.PackedRows, with its host copy: a data collator."""
    if IMAGES in rows[0]:
        return with_host_copy(stacked_with_images(rows))
    return with_host_copy({key: torch.stack([row[key] for row in rows]) for key in rows[0]})


def on_host(batch: Mapping[str, Any]) -> OnHost:
    """What the host knows of a batch; without a copy of its own, asked of the device."""
    if ON_HOST in batch:
        return batch[ON_HOST]
    labels, positions, ids = (batch[name].cpu() for name in ("labels", "position_ids", "input_ids"))
    sources = batch[SOURCES].cpu() if SOURCES in batch else None
    return OnHost(labels, positions, ids, batch[ROW].tolist() if ROW in batch else (), sources)


def asking_rows(batch: Mapping[str, Any], sources: Collection[int] | None) -> Tensor | None:
    """Which rows hold a token that is learnt and from these sources, (B,), on the host; None = all, of what the student
    has written too."""
    if sources is None or (labels_BS := (host := on_host(batch)).labels_from(sources)) is host.labels_BS:
        return None
    asks_B = (labels_BS[:, 1:] != IGNORED).any(1)
    return None if asks_B.all() else asks_B


def rows_of(batch: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    """These rows of a micro-batch without images, with their host copy; ``rows`` are on the host."""
    host, there = on_host(batch), queued(rows, batch["input_ids"].device)
    part = OnHost(
        host.labels_BS[rows],
        host.position_ids_BS[rows],
        None if host.input_ids_BS is None else host.input_ids_BS[rows],
        [host.rows[row] for row in rows.tolist()] if host.rows else (),
        None if host.sources_BS is None else host.sources_BS[rows],
    )
    return {**{name: batch[name][there] for name in ("input_ids", "position_ids")}, ON_HOST: part}


def scattered(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """``values`` of some rows of a micro-batch, (b, ...), in their places among all, (B, ...), the others 0; ``rows``
    are on the host."""
    out = values.new_zeros(num_rows, *values.shape[1:])
    out[queued(rows, values.device)] = values
    return out


def learnt_places(labels_BS: Tensor) -> Tensor:
    """Where in the flattened (B x S) tokens stand of which the next one is learnt; a row's first is no one's target."""
    learnt_BS = torch.zeros_like(labels_BS, dtype=torch.bool)
    learnt_BS[:, :-1] = labels_BS[:, 1:] != IGNORED  # position t predicts token t + 1
    return learnt_BS.flatten().nonzero()[:, 0]
