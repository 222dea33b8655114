"""One streaming pass over calibration rows for all metrics of hidden states.

B rows of a batch, S tokens of each.

Besides the sums that metrics keep, memory is that of one batch: a few numbers per token and layer, and all states of
the batch where a metric compares every layer with every other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.models.anatomy import decoder_body, decoder_layers, given_state, state_of, watched
from shoal.models.document_masks import documents_apart, documents_known
from shoal.progress import each

from .hidden_metrics import HIDDEN_METRICS, refuse_other_states
from .metric import Calibration, Result, add_up_ranks, refuse_fault
from .observation import Batch, Observation, Reading


@torch.inference_mode()
def hidden_scores(model: PreTrainedModel, calibration: Calibration, names: Sequence[str]) -> dict[str, Result]:
    """Scores by the named HIDDEN_METRICS, from one pass that stops before the output head.

    Hidden states come from hooks on the decoder layers, so they are raw: the last state that transformers returns is
    behind the final norm.

    Raises:
        UserError: states that are not finite, or that are not (B, S, D).
    """
    body, metrics = decoder_body(model), HiddenPass(model, calibration, names)
    for rows_B in each(calibration.batches(), f"measure: {', '.join(names)}", unit="batches"):
        batch = metrics.batch(rows_B)
        known = documents_known(calibration.rows.position_ids_NS[rows_B].long(), model.device)
        with metrics.counting(batch), known, documents_apart(body, batch.position_ids_BS):
            body(input_ids=batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False)
        if metrics.fault is not None:
            break
    return metrics.scores()


class HiddenPass:
    """The named metrics of one pass, which is made in whatever order of layers and batches."""

    def __init__(self, model: PreTrainedModel, calibration: Calibration, names: Sequence[str]) -> None:
        refuse_other_states(model)
        self.fault: tuple[int, str] | None = None
        """Row and state that is not finite; what comes after it does not count."""
        self._layers, self._device, self._model = decoder_layers(model), model.device, model
        self._calibration, self._names = calibration, names
        chosen = [HIDDEN_METRICS[name] for name in names]
        self._reads = frozenset[Reading]().union(*(metric.reads for metric in chosen))
        self._metrics = [metric(len(self._layers)) for metric in chosen]

    def batch(self, rows_B: Tensor) -> Batch:
        """The calibration rows of these indices, on the model's device."""
        return Batch.of(self._calibration, rows_B, self._device)

    @contextmanager
    def counting(self, batch: Batch) -> Iterator[None]:
        """What every layer makes of ``batch`` inside the block counts, unless it is not finite."""
        seen, inputs = Observation(batch, len(self._layers), self._reads), dict[int, Tensor]()

        def before(layer: int, args: Any, kwargs: Any) -> None:
            inputs[layer] = given_state(args, kwargs).flatten(0, 1).clone()  # some layers write into their input

        def after(layer: int, args: Any, kwargs: Any, output: Any) -> None:
            seen.observe(layer, inputs.pop(layer), state_of(output).flatten(0, 1))

        with watched(self._layers, before=before, after=after):
            yield
        if fault := seen.first_fault():
            state, token = fault
            where = f"the output of layer {state - 1}" if state else "the input of layer 0"
            self.fault = int(batch.rows_B[token // batch.input_ids_BS.shape[1]]), where
            return
        for metric in self._metrics:
            metric.add(seen)

    def scores(self) -> dict[str, Result]:
        """The scores by name, from all batches of all ranks, which call it together."""
        refuse_fault(self._calibration, self.fault, self._model)
        metrics = self._metrics
        counts = torch.tensor([metric.count for metric in metrics])
        # sums, never means: those of unequally many tokens would not add up
        counts, *sums = add_up_ranks([counts, *(metric.sums for metric in metrics)], self._device)
        for metric, count, total in zip(metrics, counts.tolist(), sums, strict=True):
            metric.count, metric.sums = count, total
        return {name: metric.scores() for name, metric in zip(self._names, metrics, strict=True)}
