"""What a teacher says about a micro-batch, through one interface: run now, or recorded before.

B batch, S sequence, D hidden, K recorded tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.artifacts.artifact import differences
from shoal.data.packing import IMAGES, PackedRows
from shoal.errors import UserError
from shoal.models.document_masks import documents_known
from shoal.runtime import queued, warn_of_versions

from ..objective.host_batch import asking_rows, on_host, rows_of, scattered
from ..objective.layer_losses import Captured, StateLosses
from ..objective.objective import SharedPrefix, Signals, final_hidden
from .recording import (
    RECORD_AGAIN,
    RecordingManifest,
    ShardFile,
    Wanted,
    of_another_run,
    other_rows,
    shard_name,
    shards_of,
)

OPEN_SHARDS = 64
"""Shards that stay mapped."""
Teacher = Callable[[Mapping[str, Tensor]], Signals]
"""Gives the signals of a micro-batch."""


@dataclass(frozen=True)
class LiveTeacher:
    """Runs the teacher on the micro-batch, without gradients."""

    model: PreTrainedModel
    reads_logits: bool
    """A loss term looks at the teacher's distributions."""
    states: StateLosses | None
    """Loss terms that say what else is wanted of it."""
    prefix: SharedPrefix | None
    """Recorder of the state at the first cut, for the student to go on from."""
    asked: frozenset[int] | None = None
    """Numbers of the sources of whose tokens it is asked; None = of all. Rows without them pass the layers up to the
    first cut alone, or none."""

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor]) -> Signals:
        """The teacher's final hidden states, and what the state terms compare with."""
        if not self.reads_logits and self.states is None and self.prefix is None:
            return Signals()
        if self.prefix is not None:
            self.prefix.forget()
        asks_B = None if IMAGES in batch else asking_rows(batch, self.asked)
        if asks_B is not None:
            return self._of_rows(batch, asks_B)
        recording = contextlib.nullcontext() if self.prefix is None else self.prefix.recording()
        capturing = contextlib.nullcontext(Captured()) if self.states is None else self.states.capturing_teacher()
        with recording, capturing as captured:
            images: Any = batch.get(IMAGES)
            hidden_BSD = final_hidden(self.model, batch["input_ids"], batch["position_ids"], images)
        return Signals(hidden_BSD if self.reads_logits else None, captured=captured)

    def _of_rows(self, batch: Mapping[str, Tensor], asks_B: Tensor) -> Signals:
        """What it says of the rows marked in ``asks_B``."""
        assert self.states is None, "states are compared row by row, of all rows"
        asked, others = (mask_B.nonzero()[:, 0] for mask_B in (asks_B, ~asks_B))
        hidden_BSD = None
        if len(asked):
            with contextlib.nullcontext() if self.prefix is None else self.prefix.recording(asked):
                hidden_BSD = scattered(self._hidden(batch, asked), asked, len(asks_B))
        if self.prefix is not None:
            with self.prefix.recording(others, goes_on=False):
                self._hidden(batch, others)
        return Signals(hidden_BSD)

    def _hidden(self, batch: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        """Final hidden states of these rows, (b, S, D)."""
        part = rows_of(batch, rows)
        ids, positions = part["input_ids"], part["position_ids"]
        with documents_known(on_host(part).position_ids_BS, ids.device):
            return final_hidden(self.model, ids, positions)


class RecordedRows(NamedTuple):
    """Signals of some rows, in the order they were asked for."""

    ids_BSK: Tensor
    """int64; most probable first."""
    log_probs_BSK: Tensor
    """fp32, under the full softmax: exp sums to 1 - tail."""
    tail_BS: Tensor
    """fp32; probability of all other tokens together."""
    states: dict[int, Tensor]
    """Teacher layer -> (B, S, D), bfloat16."""
    prefix_BSD: Tensor | None = None
    """The state that the student goes on from, where it was asked for."""


class RecordingReader:
    """A finished recording, opened for the rows of a run; reads any of them in any order.

    ``rows_from`` only explains a difference of rows.

    Raises:
        UserError: not there or not finished, recorded from something else, for other rows or for fewer, or with a shard
            that is missing or torn.
    """

    def __init__(self, folder: Path, rows: PackedRows, wanted: Wanted, *, rows_from: dict[str, Any]) -> None:
        path, manifest = folder / RecordingManifest.FILE, wanted.require(folder)
        if manifest.num_rows < len(rows):
            raise UserError(
                f"{path}: holds {manifest.num_rows:,} rows, but this run needs {len(rows):,}; run `shoal record` "
                "again, which adds the missing rows"
            )
        warn_of_versions(path, manifest.provenance.environment)
        self._folder, self._manifest, self.wanted = folder, manifest, wanted
        self._shard = lru_cache(OPEN_SHARDS)(self._open)
        shaped_otherwise = differences(rows_from, manifest.rows_from)
        for index, shard in enumerate(shards_of(len(rows), manifest.rows_per_shard)):
            if words := other_rows(self._open(index).hashes, rows, shard.start, shaped_otherwise):
                raise UserError(of_another_run(self._path(index), words))

    def rows(self, indices: Sequence[int]) -> RecordedRows:
        """Signals of the rows ``indices``, which may repeat, in that order. On the CPU."""
        size = self._manifest.rows_per_shard
        places = [(self._shard(row // size), row % size) for row in indices]
        told = zip(*(file.read(row) for file, row in places), strict=True)
        ids, log_probs, tail = (torch.from_numpy(np.stack(plane)) for plane in told)

        def states(plane: str) -> Tensor:
            return torch.stack([file.state(plane, row) for file, row in places])

        of_layers = {layer: states(f"state_{layer}") for layer in self.wanted.states}
        return RecordedRows(ids, log_probs, tail, of_layers, None if self.wanted.prefix is None else states("prefix"))

    def _open(self, index: int) -> ShardFile:
        file = ShardFile(self._path(index), self._manifest.layout)
        if file.sha256 != self._manifest.shards[index]["sha256"]:
            raise UserError(f"{self._path(index)}: differs from the recorded file; {RECORD_AGAIN}")
        return file

    def _path(self, index: int) -> Path:
        return self._folder / shard_name(index)


@dataclass(frozen=True)
class RecordedTeacher:
    """Reads what `shoal record` has written about the rows of a micro-batch, and moves it to their device."""

    reader: RecordingReader
    reads_logits: bool
    """A loss term looks at the teacher's distributions."""
    states: StateLosses | None
    """Loss terms that read recorded states."""
    prefix: SharedPrefix | None
    """Taker of the recorded state that the student goes on from."""

    def __call__(self, batch: Mapping[str, Tensor]) -> Signals:
        """The rows' most probable tokens, and the recorded states that state terms compare with."""
        device = batch["input_ids"].device
        rows = self.reader.rows(on_host(batch).rows)
        if self.prefix is not None:
            assert rows.prefix_BSD is not None
            self.prefix.take(queued(rows.prefix_BSD, device))
        captured = Captured()
        for layer in () if self.states is None else self.states.teacher_layers:
            captured.states[layer] = queued(rows.states[layer], device)
        if not self.reads_logits:
            return Signals(captured=captured)
        planes = {name: queued(getattr(rows, name), device) for name in ("ids_BSK", "log_probs_BSK", "tail_BS")}
        return Signals(**planes, temperature=self.reader.wanted.temperature, captured=captured)
