"""Text to measure the loss on, and the loss by plain loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from packed_rows import ROWS, documents
from tiny import tiny_tokenizer
from transformers import PreTrainedModel

from shoal.compress.changes.calibration import calibration_rows
from shoal.compress.metrics.loss_metrics import loss_scores
from shoal.compress.metrics.metric import Calibration, Estimates
from shoal.compress.metrics.registry import METRICS
from shoal.compress.surgery.cut_model import cut_model
from shoal.data.packing import PackedRows
from shoal.models.anatomy import decoder_layers
from shoal.recipe.measure import Measure

DOCUMENT_LENGTHS = (20, 7, 13, 9, 10, 20, 19)


def calibration(rows: PackedRows = ROWS, *, batch_size: int = 2, **settings: Any) -> Calibration:
    return Calibration(rows, batch_size, **settings)


def text_of(settings: Measure, num_tokens: int | None = None) -> Calibration:
    """The text of `measure` for a change, by the tiny tokenizer."""
    rows = calibration_rows(settings, tiny_tokenizer(), seed=0, num_tokens=num_tokens)
    return Calibration(rows, settings.batch_size)


def measured(model: PreTrainedModel, *names: str, **settings: Any) -> dict[str, Any]:
    for name in names:
        METRICS[name].refuse(model, name)
    found = loss_scores(model, calibration(**settings), names)
    return {name: one.values if isinstance(one, Estimates) else one for name, one in found.items()}


def architecture(name: str) -> PreTrainedModel:
    from architectures import tiny_model as tiny_family

    return tiny_family(name)


@torch.no_grad()
def plain_loss(model: PreTrainedModel, rows: PackedRows = ROWS) -> float:
    """Nats per predicted token in float64, from one document at a time."""
    model, losses = model.double(), []
    for document in documents(rows):
        logits = model(document, use_cache=False).logits[0]
        for position, token in enumerate(document[0, 1:].tolist()):
            losses.append(float(logits[position].logsumexp(0) - logits[position, token]))
    return sum(losses) / len(losses)


def loss_without(model: PreTrainedModel, drop: Sequence[int]) -> float:
    return plain_loss(cut_model(model, drop))


def layer_calls(model: PreTrainedModel, run: Callable[[], object]) -> int:
    count = 0

    def add(*_: object) -> None:
        nonlocal count
        count += 1

    handles = [layer.register_forward_hook(add) for layer in decoder_layers(model)]
    run()
    for handle in handles:
        handle.remove()
    return count
