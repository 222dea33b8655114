"""Before every run: the objective leaves a perfect student alone.

S sequence, D hidden.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.data.packing import PackedRows
from shoal.models.load import text_config
from shoal.recipe.distill import Distill, Record
from shoal.recipe.losses import LOGIT_TERMS
from shoal.runtime import device

from ..engine.arguments import autocast_dtype
from ..engine.sharding import gathered
from .capture import Captured
from .chunked_loss import check_zero_at_teacher
from .layer_losses import StateLosses
from .objective import final_hidden, output_head, to_logits

TOKENS = 64
"""Of the first row, on which the objective is tried."""
LOOKED_AT = 64
"""Rows in which documents are looked for."""
BEYOND_ROUNDING = 0.05
"""Of a state's norm: in bfloat16 experts may round otherwise when other tokens come to them."""

log = logging.getLogger(__name__)


def check_objective(
    settings: Distill,
    model: PreTrainedModel,
    rows: PackedRows,
    states: StateLosses | None,
    record: Record,
    *,
    is_teacher: bool,
) -> None:
    """With ``model`` as its own teacher every divergence must be zero, and so must its gradient.

    Any model will do: where the teacher is only recorded, that is the student before its first step. There the states
    cannot be tried, since the layers they are compared with are not at hand, and under ZeRO 3 the student's layers
    cannot run yet: its head is tried on random states.

    Raises:
        RuntimeError: naming the term. No recipe can cause this; it is a defect of shoal or of the model's code.
    """
    # what accelerate offloads has no device until it runs
    where = device() if model.device.type == "meta" else model.device
    row = {name: value[:TOKENS].unsqueeze(0).to(where) for name, value in rows[0].items() if value.ndim}
    labels_S = row["input_ids"][0, 1:]
    capturing = states.capturing_teacher() if states is not None and is_teacher else nullcontext(Captured())
    dtype = autocast_dtype(settings)
    cast = nullcontext() if dtype is None else torch.autocast(where.type, dtype)
    sharded = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    with torch.no_grad(), cast:
        if sharded and not is_teacher:
            size = text_config(model.config).hidden_size
            hidden_SD = torch.randn(len(labels_S), size, generator=torch.Generator().manual_seed(0)).to(where)
        else:
            if (rows.position_ids_NS[:LOOKED_AT, 1:] == 0).any() and _documents_meet(model, row["input_ids"]):
                log.warning(
                    "%s: documents that share a row see each other: layers of this family carry a state from token to "
                    "token and do not read where a document begins. Teacher and student read the same; fewer documents "
                    "share a row where distill.sequence_length is shorter",
                    model.config.model_type,
                )
            with capturing as seen:
                hidden_SD = final_hidden(model, row["input_ids"], row["position_ids"])[0, :-1]
            if states is not None and is_teacher:
                states.check_zero_at_teacher(seen, row["labels"], row["position_ids"])
        # only now: where head and embeddings are one table, the layers' own hooks let go of it
        with gathered(output_head(model)):
            check_zero_at_teacher(
                [term for term in settings.losses if isinstance(term, LOGIT_TERMS)],
                hidden_SD,
                to_logits(model),
                labels_S,
                top_k=None if is_teacher else record.top_k,
                chunk=settings.head_chunk,
            )


def _documents_meet(model: PreTrainedModel, input_ids_1S: Tensor) -> bool:
    """Whether the beginning of a row's second document changes with the first one, by more than rounding."""
    half = input_ids_1S.shape[1] // 2
    first, second = input_ids_1S[:, :half], input_ids_1S[:, half : 2 * half]
    positions_1S = torch.arange(half, device=first.device).repeat(1, 2)
    one, other = (
        final_hidden(model, torch.cat([before, second], 1), positions_1S)[0, half : half + 4].float()
        for before in (first, first.roll(1, 1))
    )
    return bool(((one - other).norm(dim=-1) / one.norm(dim=-1)).mean() > BEYOND_ROUNDING)
