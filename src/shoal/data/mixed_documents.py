"""Whether documents that share a packed row see each other: a fact about a family's code, told before anything runs.

S sequence.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.data.packing import PackedRows
from shoal.models.anatomy import decoder_body
from shoal.models.document_masks import documents_apart
from shoal.runtime import device

TOKENS = 64
"""Tokens of the first row that the model is tried on."""
LOOKED_AT = 64
"""Rows in which documents are looked for."""
BEYOND_ROUNDING = 0.05
"""Share of a state's norm: in bfloat16 experts may round otherwise when other tokens come to them."""

IN_TRAINING = "Teacher and student read the same; fewer documents share a row where distill.sequence_length is shorter"
WHILE_MEASURED = (
    "Metrics of states and gradients, removal factors and diagnostics read them so; fewer documents share a row where "
    "measure.sequence_length is shorter"
)

log = logging.getLogger(__name__)


@torch.no_grad()
def warn_of_mixed_documents(
    model: PreTrainedModel, rows: PackedRows, consequence: str, *, autocast_dtype: torch.dtype | None = None
) -> None:
    """Log where ``rows`` hold several documents and this model, which can run, carries something from one to the next;
    ``consequence`` says what follows and what helps.

    ``autocast_dtype``: precision in which it runs; None = the weights' own.
    """
    if not (rows.position_ids_NS[:LOOKED_AT, 1:] == 0).any():
        return
    # what accelerate offloads has no device until it runs
    where = device() if model.device.type == "meta" else model.device
    ids_1S = rows.input_ids_NS[:1, :TOKENS].long().to(where)
    with nullcontext() if autocast_dtype is None else torch.autocast(where.type, autocast_dtype):
        if _documents_meet(model, ids_1S):
            log.warning(
                "%s: documents that share a row see each other: layers of this family carry a state from token to "
                "token and do not read where a document begins. %s",
                model.config.model_type,
                consequence,
            )


def _documents_meet(model: PreTrainedModel, ids_1S: Tensor) -> bool:
    """Whether the beginning of a row's second document changes with the first one, by more than rounding."""
    half = ids_1S.shape[1] // 2
    first, second = ids_1S[:, :half], ids_1S[:, half : 2 * half]
    positions_1S = torch.arange(half, device=first.device).repeat(1, 2)
    decoder: Any = decoder_body(model)
    after = []
    for before in (first, first.roll(1, 1)):  # the same second document after the same words in another order
        with documents_apart(decoder, positions_1S):
            ids_1S = torch.cat([before, second], 1)
            states_1SD = decoder(input_ids=ids_1S, position_ids=positions_1S, use_cache=False).last_hidden_state
        after.append(states_1SD[0, half : half + 4].float())
    after_one, after_other = after
    change = (after_one - after_other).norm(dim=-1) / after_one.norm(dim=-1)
    return bool(change.mean() > BEYOND_ROUNDING)
