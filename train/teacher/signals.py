"""What a teacher says about a micro-batch, through one interface: run now, or recorded before."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..objective.capture import Captured
from ..objective.host_batch import on_host, queued
from ..objective.layer_losses import StateLosses
from ..objective.objective import SharedPrefix, Signals, final_hidden
from .recording_reader import RecordingReader


class Teacher(Protocol):
    """Gives the signals of a micro-batch."""

    def signals(self, batch: Mapping[str, Tensor]) -> Signals: ...


class LiveTeacher:
    """Runs the teacher on every micro-batch, without gradients.

    ``reads_logits``: a loss term looks at the teacher's distributions. ``states`` says what else is wanted of it.
    ``prefix`` records the state at the first cut in passing, for the student to go on from.
    """

    def __init__(
        self, model: PreTrainedModel, *, reads_logits: bool, states: StateLosses | None, prefix: SharedPrefix | None
    ) -> None:
        self._model = model
        self._reads_logits = reads_logits
        self._states = states
        self._prefix = prefix

    @torch.no_grad()
    def signals(self, batch: Mapping[str, Tensor]) -> Signals:
        """The teacher's final hidden states, and what the state terms compare with."""
        if not self._reads_logits and self._states is None and self._prefix is None:
            return Signals()
        recording = contextlib.nullcontext() if self._prefix is None else self._prefix.recording()
        capturing = contextlib.nullcontext(Captured()) if self._states is None else self._states.capturing_teacher()
        with recording, capturing as captured:
            hidden_BSD = final_hidden(self._model, batch["input_ids"], batch["position_ids"])
        return Signals(hidden_BSD if self._reads_logits else None, captured=captured)


class NoTeacher:
    """Says nothing: no loss term asks."""

    def signals(self, batch: Mapping[str, Tensor]) -> Signals:
        """Empty ones."""
        return Signals()


class RecordedTeacher:
    """Reads what `shoal record` has written about the rows of a micro-batch, and moves it to their device.

    ``prefix`` is handed the recorded state that the student goes on from.
    """

    def __init__(
        self, reader: RecordingReader, *, reads_logits: bool, states: StateLosses | None, prefix: SharedPrefix | None
    ) -> None:
        self._reader = reader
        self._reads_logits = reads_logits
        self._states = states
        self._prefix = prefix

    def signals(self, batch: Mapping[str, Tensor]) -> Signals:
        """The rows' most probable tokens, and the recorded states that state terms compare with."""
        device = batch["input_ids"].device
        rows = self._reader.rows(on_host(batch).rows)
        if self._prefix is not None:
            assert rows.prefix_BSD is not None
            self._prefix.take(queued(rows.prefix_BSD, device))
        captured = Captured()
        for layer in () if self._states is None else self._states.teacher_layers:
            captured.states[layer] = queued(rows.states[layer], device)
        if not self._reads_logits:
            return Signals(captured=captured)
        ids_BSK, log_probs_BSK = queued(rows.ids_BSK, device), queued(rows.log_probs_BSK, device)
        return Signals(ids_BSK=ids_BSK, log_probs_BSK=log_probs_BSK, captured=captured)
