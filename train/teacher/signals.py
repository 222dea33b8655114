"""What a teacher says about a micro-batch, through one interface: run now, or recorded before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.data.packing import IMAGES

from ..objective.capture import Captured
from ..objective.host_batch import asking_rows, documents_known, on_host, queued, rows_of, scattered
from ..objective.layer_losses import StateLosses
from ..objective.objective import SharedPrefix, Signals, final_hidden
from .recording_reader import RecordingReader

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
        with documents_known(on_host(part), ids.device):
            return final_hidden(self.model, ids, positions)


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
        ids_BSK, log_probs_BSK, tail_BS = (
            queued(plane, device) for plane in (rows.ids_BSK, rows.log_probs_BSK, rows.tail_BS)
        )
        return Signals(ids_BSK=ids_BSK, log_probs_BSK=log_probs_BSK, tail_BS=tail_BS, captured=captured)
