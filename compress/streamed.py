"""Metrics of hidden states of a model that is larger than memory: one pass over its files, layer by layer.

variants/streamed.py has how a checkpoint is read and what that may take, and the same for likelihoods.

L layers, N rows, B batch, S sequence, T tokens of a batch, D hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.models.anatomy import text_config
from shoal.progress import each

from .measure import Scores, measure_importance
from .metrics.hidden_metrics import refuse_other_shape
from .metrics.hidden_pass import Batch, HiddenPass
from .metrics.metric import Calibration, Result
from .metrics.observation import BatchView, Observation, Reading
from .metrics.registry import METRICS
from .variants.layerwise import Prepared
from .variants.state_store import Kept, StateStore
from .variants.streamed import Streaming
from .variants.streamed_model import StreamedLayerwise, StreamedModel

log = logging.getLogger(__name__)

NUMBERS_PER_STATE = 6
"""Numbers that an observation keeps of a token and layer."""


def measure_streamed(
    folder: Path,
    rows: PackedRows,
    *,
    metrics: Sequence[str],
    batch_size: int,
    streaming: Streaming,
    attention_mask_NS: Tensor | None = None,
) -> Scores:
    """What measure_importance says of the checkpoint at ``folder``, from one pass over its files.

    Raises:
        UserError: a metric that needs more than hidden states; a limit too small for one layer; what StreamedModel,
            StreamedLayerwise and measure_importance refuse.
    """
    for name in metrics:
        if name in METRICS and (need := METRICS[name].needs) != "hidden":
            raise UserError(
                f"measure.metrics: {name} needs {need}, for which the whole model has to be in memory; leave it "
                "out, or unset measure.memory_gb on a machine with more memory"
            )
    model = streaming.open(folder)
    log.info("measure: layer by layer from %s", folder)

    def hidden(_: PreTrainedModel, calibration: Calibration, names: Sequence[str]) -> dict[str, Result]:
        return _hidden_scores(model, calibration, names, streaming)

    return measure_importance(
        model.model,
        rows,
        metrics=metrics,
        batch_size=batch_size,
        attention_mask_NS=attention_mask_NS,
        passes={"hidden": hidden},
    )


def _hidden_scores(
    model: StreamedModel, calibration: Calibration, names: Sequence[str], streaming: Streaming
) -> dict[str, Result]:
    model.load_rest()
    layerwise = StreamedLayerwise(model.model)
    metrics = HiddenPass(model.model, calibration, names)
    store = _store_of_pass(model, calibration, metrics.reads, streaming)
    waiting = [
        _WaitingBatch.of(metrics.batch(rows_B), layerwise, metrics.reads, store) for rows_B in calibration.batches()
    ]
    for layer in each(range(model.num_layers), "measure, layer by layer", unit="layers"):
        with model.layer(layer):
            for batch in waiting:
                batch.advance(layerwise, layer)
    waiting.reverse()
    while waiting and metrics.add(*waiting.pop().seen_whole()):
        pass
    return metrics.scores()


def _store_of_pass(
    model: StreamedModel, calibration: Calibration, reads: Collection[Reading], streaming: Streaming
) -> StateStore:
    positions_NS = calibration.rows.position_ids_NS
    tokens, length = positions_NS.numel(), positions_NS.shape[1]
    vector = text_config(model.model.config).hidden_size * model.model.dtype.itemsize
    documents = int((positions_NS == 0).sum()) + len(positions_NS)
    layers = model.num_layers
    states = 2 * tokens * vector
    states += (layers + 1) * vector * (tokens * ("cosines" in reads) + documents * ("last" in reads))
    spreads = 4 * layers * documents * (vector // model.model.dtype.itemsize)
    numbers = 4 * layers * tokens * NUMBERS_PER_STATE
    masks = 2 * tokens * length
    return streaming.store(
        [model],
        tokens_at_once=min(len(positions_NS), calibration.batch_size) * length,
        fixed=numbers + masks + spreads * len({"output_spread", "update_spread"} & set(reads)),
        states=states,
    )


@dataclass
class _WaitingBatch:
    """A batch on its way through the layers."""

    batch: Batch
    seen: _WaitingObservation
    prepared: Prepared
    state: Kept
    store: StateStore

    @classmethod
    def of(
        cls, batch: Batch, layerwise: StreamedLayerwise, reads: Collection[Reading], store: StateStore
    ) -> _WaitingBatch:
        inputs = {"input_ids": batch.input_ids_BS, "position_ids": batch.position_ids_BS, "use_cache": False}
        prepared = layerwise.prepare(inputs)
        seen = _WaitingObservation(batch.view, layerwise.num_layers, reads, store)
        return cls(batch, seen, prepared.without_hidden(), store.keep(prepared.hidden_BSD), store)

    def advance(self, layerwise: StreamedLayerwise, layer: int) -> None:
        before_BSD = self.state.load()
        after_BSD = layerwise.run(layer, before_BSD, self.prepared.calls[layer])
        for state in (before_BSD, after_BSD):
            refuse_other_shape(layer, state, self.batch.input_ids_BS.shape)
        self.seen.observe(layer, before_BSD.flatten(0, 1), after_BSD.flatten(0, 1))
        self.state = self.store.keep(after_BSD)

    def seen_whole(self) -> tuple[Batch, Observation]:
        """The batch, and all that was seen of it back in memory."""
        self.seen.gather()
        return self.batch, self.seen


class _WaitingObservation(Observation):
    """An observation of which what is large lies in a store while the batch waits for its next layer."""

    def __init__(self, view: BatchView, num_layers: int, reads: Collection[Reading], store: StateStore) -> None:
        super().__init__(view, num_layers, reads)
        self._store = store
        self._away: list[tuple[list[Tensor], Kept]] = []

    def observe(self, layer: int, before_TD: Tensor, after_TD: Tensor) -> None:
        super().observe(layer, before_TD, after_TD)
        self._previous = None  # else the state would be held here
        for states in (self._last, self._sample, self._kept):
            self._away += [(states, self._store.keep(state)) for state in states]
            states.clear()
        self._buffers = []

    def gather(self) -> None:
        """Put everything back."""
        for states, state in self._away:
            states.append(state.load())
        self._away.clear()
