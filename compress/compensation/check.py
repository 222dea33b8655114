"""What can be said against compensation from a model's first layers, before it is known which ones go."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.models.anatomy import text_config
from shoal.models.load import load_config
from shoal.recipe.prune import Compensate

from ..surgery.quantised import without_quantization
from ..variants.state_store import StateStore
from ..variants.streamed_model import StreamedModel, as_a_whole
from .fit import refuse_unfoldable
from .size import COMPENSATE
from .source import from_files

log = logging.getLogger(__name__)

PROBE_TOKENS = 8


def refuse_quantised(folder: Path, config: PreTrainedConfig) -> None:
    """Raises UserError: quantised weights."""
    if without_quantization(config)[1]:
        raise UserError(
            f"{folder}: is quantised, and prune.compensate changes weights of layers that stay; give the "
            "full-precision model, or leave prune.compensate out"
        )


def refuse_impossible_compensation(folder: Path, settings: Compensate, *, trust_remote_code: bool = False) -> None:
    """Refuse a model into whose first layers nothing can be folded; it takes embeddings and two layers in memory.

    Fitting proves every layer that it changes; this is for those who would measure for hours before.

    Raises:
        UserError: quantised weights, or a family into which ``settings.method`` cannot be folded exactly.
    """
    refuse_quantised(folder, load_config(folder, trust_remote_code=trust_remote_code))
    try:
        model = StreamedModel(
            folder, dtype="float32", attention=None, trust_remote_code=trust_remote_code, whole=as_a_whole(COMPENSATE)
        )
        source = from_files(model, StateStore())
    except UserError as error:
        if settings.memory_gb is not None:
            raise
        log.debug("%s: what can be folded shows when it is loaded as a whole (%s)", folder, error)
        return
    ids_NS = torch.arange(2 * PROBE_TOKENS).view(2, -1) % text_config(model.model.config).vocab_size
    positions_NS = torch.arange(PROBE_TOKENS).repeat(2, 1)
    refuse_unfoldable(source, settings, PackedRows(ids_NS, positions_NS))
