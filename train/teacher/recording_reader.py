"""Recorded signals of the teacher, read back for the rows of a run.

B batch, S sequence, D hidden, K recorded tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shoal.artifacts.artifact import differences
from shoal.errors import UserError
from shoal.recipe.distill import Record
from shoal.recipe.losses import LOGIT_TERMS, LossTerm, reads_distributions

from ..objective.chunked_loss import refuse_for_top_k
from .recording_format import RECORD_AGAIN, ShardFile, TokenRows
from .recording_plan import (
    PREFIX,
    RecordingManifest,
    refuse_other_rows,
    shard_name,
    shards_of,
    warn_of_versions,
)

OPEN_SHARDS = 64
"""Shards that stay mapped; each holds a file descriptor."""


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

    ``inputs``: as recording_inputs gives them for this run; a recording may hold a prefix that they do not ask for.
    ``rows_from`` only explains a difference of rows. ``states``: layers whose states will be asked for.
    ``temperatures``: those of the loss terms that look at the teacher's distributions.

    Raises:
        UserError: not there or not finished, recorded from something else, for other rows or for fewer, at another
            temperature, without these states, or with a shard that is missing or torn.
    """

    def __init__(
        self,
        folder: Path,
        rows: TokenRows,
        *,
        inputs: dict[str, Any],
        rows_from: dict[str, Any],
        states: Collection[int] = (),
        temperatures: Collection[float] = (),
    ) -> None:
        path = folder / RecordingManifest.FILE
        if not path.is_file():
            raise UserError(f"{folder}: holds no recorded signals; run `shoal record` first")
        manifest = RecordingManifest.read(path)
        not_asked = {PREFIX} - inputs.keys()
        recorded_inputs = {key: value for key, value in manifest.provenance.inputs.items() if key not in not_asked}
        differing = differences(inputs, recorded_inputs)
        if differing:
            raise UserError(
                f"{path}: belongs to another run: {'; '.join(differing)}. Set the recipe back, or run `shoal record` "
                "for this recipe into another folder"
            )
        if not manifest.shards:
            raise UserError(f"{path}: the recording was not finished; run `shoal record` again, which goes on with it")
        self._refuse_missing(path, manifest, states, temperatures)
        if manifest.num_rows < len(rows):
            needed = len(rows) * manifest.layout.sequence_length
            raise UserError(
                f"{path}: holds {manifest.num_rows:,} rows and this run needs {len(rows):,}; set record.num_tokens to "
                f"{needed} and run `shoal record` again, which adds what is missing"
            )
        warn_of_versions(path, manifest.provenance)
        self._folder, self._manifest, self._states = folder, manifest, tuple(states)
        self._has_prefix = PREFIX in inputs
        self._shard = lru_cache(OPEN_SHARDS)(self._open)
        shaped_otherwise = differences(rows_from, manifest.rows_from)
        for index, shard in enumerate(shards_of(len(rows), manifest.rows_per_shard)):
            refuse_other_rows(self._path(index), self._open(index).hashes, rows, shard.start, shaped_otherwise)

    def rows(self, indices: Sequence[int]) -> RecordedRows:
        """Signals of the rows ``indices``, which may repeat, in that order. On the CPU."""
        layout, size = self._manifest.layout, self._manifest.rows_per_shard
        shape = (len(indices), layout.sequence_length)
        ids, log_probs = (np.empty((*shape, layout.top_k), dtype) for dtype in (np.int64, np.float32))
        tail = np.empty(shape, np.float32)
        states = {k: torch.empty(*shape, layout.hidden_size, dtype=torch.bfloat16) for k in self._states}
        prefix = None
        if self._has_prefix:
            prefix = torch.empty(*shape, layout.hidden_size, dtype=getattr(torch, layout.prefix_dtype))
        places: dict[int, list[int]] = defaultdict(list)
        for place, row in enumerate(indices):
            places[row // size].append(place)
        for index, wanted in places.items():
            file, inside = self._shard(index), [indices[place] % size for place in wanted]
            ids[wanted], log_probs[wanted], tail[wanted] = file.read(inside)
            for layer, state in states.items():
                state[wanted] = file.read_states(f"state_{layer}", inside)
            if prefix is not None:
                prefix[wanted] = file.read_states("prefix", inside)
        return RecordedRows(torch.from_numpy(ids), torch.from_numpy(log_probs), torch.from_numpy(tail), states, prefix)

    def _open(self, index: int) -> ShardFile:
        file = ShardFile(self._path(index), self._manifest.layout)
        if file.sha256 != self._manifest.shards[index]["sha256"]:
            raise UserError(f"{self._path(index)}: is not the file that was recorded; {RECORD_AGAIN}")
        return file

    def _path(self, index: int) -> Path:
        return self._folder / shard_name(index)

    @staticmethod
    def _refuse_missing(
        path: Path, manifest: RecordingManifest, states: Collection[int], temperatures: Collection[float]
    ) -> None:
        if lacking := sorted(set(states) - set(manifest.layout.states)):
            raise UserError(
                f"{path}: lacks the states after layer {', '.join(map(str, lacking))} that the loss terms read; "
                "add them to record.states and record into another folder, or leave those terms out"
            )
        recorded = manifest.provenance.inputs["record.temperature"]
        if other := [temperature for temperature in temperatures if temperature != recorded]:
            raise UserError(
                f"{path}: is recorded at temperature {recorded:g}, and a loss term has {other[0]:g}: the mass outside "
                "the top k is not known there. Set both to the same"
            )


def refuse_unrecorded(losses: Sequence[LossTerm], record: Record, *, vocab_size: int) -> None:
    """Refuse losses that no recording of these settings can serve, before anything is opened.

    Raises:
        UserError: a term that needs the teacher itself, another temperature, or nothing outside the top k.
    """
    refuse_for_top_k([term for term in losses if isinstance(term, LOGIT_TERMS)], temperature=record.temperature)
    if any(map(reads_distributions, losses)) and record.top_k >= vocab_size:
        raise UserError(
            f"record.top_k: {record.top_k} leaves none of the {vocab_size:,} tokens of the vocabulary outside, and "
            "losses compare the top k with all others; record fewer"
        )
