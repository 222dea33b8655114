"""What layers are worth for answers about images, row by row through the whole model. L layers, N rows.

Images of a row, and so its tokens, may be of any number and size; rows are not packed or padded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from shoal.data.image_rows import Asked, on_device
from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers
from shoal.progress import each
from shoal.runtime import together

from ..surgery.cut_model import skipped
from .hidden_pass import Batch, HiddenPass, watching, writes_into_input
from .metric import Calibration, Estimates, Layers, add_up_ranks, rank, world_size
from .observation import Observation

INFLUENCE = "block_influence_images"
ANSWER_LOSS = "answer_loss_images"
COLUMNS = (INFLUENCE, ANSWER_LOSS)
REMEDY = "set dtype: float32, or leave the row out"


@torch.no_grad()
def image_scores(model: PreTrainedModel, items: Iterable[Asked], num_rows: int) -> dict[str, Layers | Estimates]:
    """Two columns over rows of image, prompt and answer; a lower score means: remove first.

    block_influence_images: 1 - cosine of a layer's input and output, the mean over all tokens, those of images too
    (arXiv:2403.03853). answer_loss_images: by how much the mean negative log-likelihood of an answer's tokens rises
    where the layer is skipped, the mean over rows, in nats. L + 1 forwards per row.

    ``items`` are the rows of this rank, every world_size-th of ``num_rows``; all ranks call this and get the same.

    Raises:
        UserError: a row that cannot be read, or states or losses that are not finite.
    """
    layers, device = decoder_layers(model), model.device
    writes = writes_into_input(model)
    similar = HiddenPass(model, _row(torch.zeros(1, 1, dtype=torch.long)), ["block_influence"])
    losses_NV = torch.zeros(num_rows, len(layers) + 1, dtype=torch.float64, device=device)

    def score_own_rows() -> None:
        for place, item in enumerate(each(items, "measure: images", unit="rows")):
            number, inputs = rank() + place * world_size(), on_device(item.inputs, device, model.dtype)
            row = _row(item.inputs["input_ids"])
            batch = Batch.of(row, torch.tensor([0]), torch.empty(0, 2, dtype=torch.long), device)
            batch = replace(batch, rows_B=torch.tensor([number]))
            seen = Observation(batch.view, len(layers), similar.reads)
            with watching(layers, batch, seen.observe, writes=writes):
                losses_NV[number, 0] = answer_loss(model, inputs, item.num_answer)
            if not similar.add(batch, seen):
                break
            for layer in range(len(layers)):
                with skipped(model, [layer]):
                    losses_NV[number, layer + 1] = answer_loss(model, inputs, item.num_answer)
            if not torch.isfinite(losses_NV[number]).all():
                break

    together(score_own_rows)
    influence: Any = similar.scores()["block_influence"]
    (losses_NV,) = add_up_ranks([losses_NV], device)
    refuse_no_number(losses_NV, "measure.images", lambda column: f" where layer {column - 1} is skipped" * (column > 0))
    return {INFLUENCE: influence, ANSWER_LOSS: rises(losses_NV.cpu())}


def _row(input_ids_1S: Tensor) -> Calibration:
    positions_1S = torch.arange(input_ids_1S.shape[1]).unsqueeze(0)
    return Calibration(PackedRows(input_ids_1S, positions_1S), batch_size=1)


def answer_loss(model: PreTrainedModel, inputs: dict[str, Any], num_answer: int) -> Tensor:
    """The mean negative log-likelihood in nats of the last ``num_answer`` tokens."""
    logits_SV = model(**inputs, use_cache=False).logits[0, -num_answer - 1 : -1]
    return cross_entropy(logits_SV.double(), inputs["input_ids"][0, -num_answer:])


def refuse_no_number(losses_NV: Tensor, setting: str, variant: Callable[[int], str]) -> None:
    """Refuse losses of rows that are not finite; ``variant`` has words for a column.

    Raises:
        UserError: there is one.
    """
    if (faults := torch.nonzero(~torch.isfinite(losses_NV))).numel():
        row, column = faults[0].tolist()
        raise UserError(f"{setting}: the loss of row {row} is not finite{variant(column)}; {REMEDY}")


def rises(losses_NV: Tensor) -> Estimates:
    """What V - 1 variants lose against column 0, the intact model: means over N rows with their standard errors."""
    rises_NL = losses_NV[:, 1:] - losses_NV[:, :1]
    num_rows = len(rises_NL)
    errors = rises_NL.std(0) / math.sqrt(num_rows) if num_rows > 1 else torch.full_like(rises_NL[0], math.nan)
    return Estimates(tuple(rises_NL.mean(0).tolist()), tuple(errors.tolist()), num_rows * losses_NV.shape[1])
