"""What every layer is worth, by every metric that is asked for. N rows, S sequence."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.importance import Importance
from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers, refuse_text_alone
from shoal.models.document_masks import WHILE_MEASURED, warn_of_mixed_documents

from .metrics.metric import Calibration, Estimates, Need
from .metrics.registry import METRICS, PASSES

log = logging.getLogger(__name__)


def measure_importance(
    model: PreTrainedModel,
    rows: PackedRows,
    *,
    metrics: Sequence[str],
    batch_size: int,
    num_drop: int | None = None,
    seed: int = 0,
) -> Importance:
    """Scores of every layer by ``metrics`` (names in METRICS); those of one need come out of one pass together. Those
    that need tasks are left to a sweep. What the scores were made from is still to be said.

    Where torch.distributed is initialised, each rank takes its share of the rows (none is fine) and all ranks return
    the same scores. ``num_drop`` is how many removals greedy metrics make; None = as many as there can be. ``seed`` is
    of what is drawn at random.

    Raises:
        UserError: a model with layers that text passes by, no rows, numbers that are not finite, and
            what the passes refuse.
    """
    refuse_text_alone(model.config)
    metrics = [name for name in metrics if METRICS[name].needs != "tasks"]
    by_need: dict[Need, list[str]] = {}  # both in the order of first mention
    for name in dict.fromkeys(metrics):
        by_need.setdefault(METRICS[name].needs, []).append(name)
    calibration = Calibration(rows, batch_size, num_drop, seed)
    needs_next = bool({"gradients", "loss"} & by_need.keys())
    if not (calibration.follows_NS.any() if needs_next else len(rows)):
        raise UserError("measure: the data holds no token to measure on; name a data source with (longer) text")
    for name in metrics:
        METRICS[name].refuse(model, name)
    warn_of_mixed_documents(model, rows.input_ids_NS, rows.position_ids_NS, WHILE_MEASURED)
    results: dict[str, Any] = {}
    for need, names in by_need.items():
        log.info("measure: %s", ", ".join(names))
        results |= PASSES[need](model, calibration, names)
    scores = Importance(Provenance({}), len(decoder_layers(model)), rows.input_ids_NS.numel(), layers={}, runs={})
    places = {"layers": scores.layers, "runs": scores.runs, "order": scores.orders}
    for name in metrics:
        result = results[name]
        if isinstance(result, Estimates):
            scores.errors[name] = tuple(None if math.isnan(error) else error for error in result.standard_errors)
            result = result.values
        places[METRICS[name].yields][name] = result
    return scores
