"""The text that a change is decided on, and the model that runs over it, one layer at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from shoal.data.packing import PackedRows
from shoal.data.streams import pack
from shoal.errors import UserError
from shoal.formatting import bytes_text, duration_text
from shoal.inference.decoder import Decoder
from shoal.machine import device_memory, fast_dtype, flops_per_second
from shoal.models.anatomy import text_config
from shoal.models.document_masks import documents_known
from shoal.models.load import align_weights, load_model, named_dtype, num_parameters, without_data
from shoal.recipe.measure import Measure
from shoal.runtime import device, queued

from ..surgery.quantised import without_quantization
from ..surgery.teacher import Teacher
from ..variants.layerwise import Layerwise, Prepared

log = logging.getLogger(__name__)

MOST_TOKENS = 65_536
"""Where a change needs no more: a correction of 14,336 features needs these, and the states of all are in memory."""
SHARE = 0.48
"""Of the rate of products: what layers reach with norms, attention and the rest, by a model of 135 million weights."""
STATES = 4.5
"""Of every calibration token at one time, at a gap: the teacher's, the student's before the layer below, with the gap
open and closed, and of the held-out eighth what goes on from there."""


class Source:
    """A model, taken apart."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.decoder = model, Decoder(model)  # first, since its word on damaged weights is clearer
        self.layerwise = Layerwise(model)


def batches(source: Source, rows: PackedRows, batch_size: int) -> Iterator[tuple[Prepared, Tensor]]:
    """``rows`` on their way into the layers, and the states that the first layer gets."""
    for start in range(0, len(rows), batch_size):
        part, where = slice(start, start + batch_size), source.model.device
        on_host = [plane_NS[part].long() for plane_NS in (rows.input_ids_NS, rows.position_ids_NS)]
        ids_BS, positions_BS = (queued(plane_BS, where) for plane_BS in on_host)
        inputs = source.decoder.arguments(ids_BS, position_ids_BS=positions_BS)
        with documents_known(on_host[1], where):
            prepared = source.layerwise.prepare(inputs, positions_BS)
        yield prepared.without_hidden(), prepared.hidden_BSD


@contextmanager
def calibrating(teacher: Teacher, num_tokens: int, *, section: str, flop: float | None = None) -> Iterator[Source]:
    """The model of ``teacher``, in a block in which a ``section`` of the recipe decides by it on so many tokens: in
    float32, under autocast where half precision is fast, since a state's rounding to 16 bits hides changes. What that
    takes is logged before; ``flop``: its floating-point operations, None = those of one pass.
    """
    where, folder, trust_remote_code = device(), teacher.folder, teacher.trust_remote_code
    bare = without_data(teacher.config)
    needed, flop = needed_bytes(bare, num_tokens), flop or 2.0 * num_parameters(bare) * num_tokens
    level = logging.WARNING if needed > device_memory(where) else logging.INFO
    log.log(level, "%s: %s tokens, %s", section, f"{num_tokens:,}", in_words(needed, flop))
    fast = named_dtype(fast_dtype(where).dtype)
    model = load_model(folder, dtype="float32", attention=None, device=where, trust_remote_code=trust_remote_code)
    align_weights(model)
    # its cache of cast weights would keep every tensor that is tried
    with torch.autocast(where.type, fast, enabled=fast != torch.float32, cache_enabled=False):
        yield Source(model)


def calibration_rows(
    settings: Measure, tokenizer: PreTrainedTokenizerBase, *, seed: int, num_tokens: int | None = None
) -> PackedRows:
    """The text of `measure` as rows of tokens, or ``num_tokens`` of it."""
    num_tokens = num_tokens or settings.num_tokens
    sources = [(source, None) for source in settings.data]
    rows = pack(sources, tokenizer, sequence_length=settings.sequence_length, num_tokens=num_tokens, seed=seed)
    if repeated := [name for name, counts in rows.counts.items() if counts.get("repeats")]:
        log.warning(
            "measure.data: %s tokens are more than %s holds, so it is repeated: the fit rests on less text, and its "
            "held-out part is not held out; name more text",
            *(f"{num_tokens:,}", ", ".join(repeated)),
        )
    return rows


def refuse_quantised(folder: Path, config: PreTrainedConfig, *, section: str) -> None:
    """Raises UserError: quantised weights."""
    if without_quantization(config)[1]:
        raise UserError(
            f"{folder}: is quantised, and {section} changes weights of layers that stay; give the full-precision "
            f"model, or remove {section}"
        )


def needed_bytes(model: PreTrainedModel, num_tokens: int, *, num_features: int = 0) -> int:
    """Memory that deciding on ``model``, which may be without weights, takes, about: weights and the states of all
    tokens in float32, and sums over ``num_features`` features of an MLP."""
    hidden = text_config(model.config).hidden_size
    sums = 8 * (4 * num_features**2 + 8 * num_features * hidden)
    return 4 * num_parameters(model) + int(STATES * num_tokens * hidden * 4) + sums


def in_words(needed: int, flop: float) -> str:
    """What needed_bytes found, whether it is there, and how long that takes on this device."""
    where = device()
    free, rate = device_memory(where), flops_per_second(where, named_dtype(fast_dtype(where).dtype) or torch.float32)
    missing = "" if needed <= free else f" ({bytes_text(free)} free)"
    seconds = duration_text(flop / rate / SHARE)
    return f"takes about {bytes_text(needed)} of memory{missing}, and about {seconds} on an idle machine"
