"""Variants of a model that is larger than memory: one pass over its files, one layer's weights at a time.

Where a model in memory takes batch after batch through all layers, here every layer takes all batches, of all variants,
before the next one is loaded. The numbers are the same, because the same kernels run on the same tensors.

L layers, B batch, S sequence, D hidden.
"""

from __future__ import annotations

import itertools
import logging
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from shoal.components import ComponentPart
from shoal.errors import UserError
from shoal.formatting import bytes_text
from shoal.inference.decoder import LOGIT_ELEMENTS, Decoder
from shoal.inference.prefix_sharing import Tokens
from shoal.inference.scoring import Layout, Score, layouts, settle
from shoal.machine import free_disk
from shoal.models.anatomy import text_config
from shoal.progress import each

from ..edits.layer_edits import KINDS
from ..edits.sublayers import prove_alone
from .state_store import FileStore, StateStore
from .streamed_model import StreamedLayerwise, StreamedModel, as_a_whole
from .variants import Edited, States, Variant

log = logging.getLogger(__name__)

STATES_AT_WORK = 8
"""Hidden states of a batch that a layer makes on its way, about."""
WIDE_STATES_AT_WORK = 4
"""So many more are as wide as the widest tensor of the layer."""


@dataclass(frozen=True)
class Streaming:
    """How a checkpoint is read and what it may take."""

    memory_bytes: int | None = None
    """What weights, hidden states and their numbers may take together, besides what Python and its libraries take; None
    = no limit. What of the states does not fit goes to a file."""
    dtype: str = "stored"
    device: torch.device | str = "cpu"
    attention: str | None = "sdpa"
    trust_remote_code: bool = False
    spill_folder: Path | None = None
    """Where that file lies, which has no name and vanishes with the process; None = the system's temporary folder."""
    section: str = "measure"
    """Of the recipe; its memory_gb, batch_size and sequence_length are what messages name."""

    def open(self, folder: Path) -> StreamedModel:
        return StreamedModel(
            folder,
            dtype=self.dtype,
            device=self.device,
            attention=self.attention,
            trust_remote_code=self.trust_remote_code,
            whole=as_a_whole(self.section),
        )

    def needed(self, models: Sequence[StreamedModel], *, tokens_at_once: int, fixed: int) -> int:
        """Bytes that one layer of every model takes beside what stays loaded and ``fixed`` bytes of other things.

        Raises:
            UserError: more than the limit.
        """
        layer, rest = sum(model.layer_bytes for model in models), sum(model.rest_bytes for model in models)
        width = text_config(models[0].model.config).hidden_size
        at_work = tokens_at_once * bytes_per_token(width, models[0].widest)
        needed = layer + rest + at_work + fixed
        if self.memory_bytes is not None and needed > self.memory_bytes:
            raise UserError(
                f"{self.section}.memory_gb: {bytes_text(self.memory_bytes)} is too little to run one layer of "
                f"{models[0].folder}, which takes {bytes_text(needed)}: {bytes_text(layer)} the largest layer, "
                f"{bytes_text(rest)} embeddings and head, {bytes_text(at_work)} a batch at work, {bytes_text(fixed)} "
                f"masks, sums and numbers; raise it, or lower {self.section}.batch_size or "
                f"{self.section}.sequence_length"
            )
        return needed

    def file_folder(self, needed: int, states: int) -> Path | None:
        """Where ``states`` bytes of hidden states go beside what is ``needed``; None = they stay in memory.

        Raises:
            UserError: a disk without room for them.
        """
        if self.memory_bytes is None or needed + states <= self.memory_bytes:
            return None
        folder = self.spill_folder or Path(tempfile.gettempdir())
        if states > (free := free_disk(folder)):
            raise UserError(
                f"{folder}: {bytes_text(states)} of hidden states do not fit into {bytes_text(self.memory_bytes)} of "
                f"memory, and only {bytes_text(free)} are free there; point TMPDIR to a larger disk, or take fewer "
                "tokens or items"
            )
        return folder

    def store(self, models: Sequence[StreamedModel], *, tokens_at_once: int, fixed: int, states: int) -> StateStore:
        """Where ``states`` bytes of hidden states are kept, beside ``models`` and ``fixed`` bytes of other things.

        Raises:
            UserError: the limit is too small for one layer, or the disk for the states.
        """
        folder = self.file_folder(self.needed(models, tokens_at_once=tokens_at_once, fixed=fixed), states)
        if folder is None:
            return StateStore()
        log.info("%s: %s of hidden states go to a file in %s", self.section, bytes_text(states), folder)
        return FileStore(folder)


def score_variants_streamed(
    folder: Path,
    requests: Sequence[tuple[Tokens, Tokens]],
    variants: Sequence[Variant],
    *,
    batch_size: int,
    streaming: Streaming,
    donor: Path | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> list[list[Score]]:
    """What score_variants says of the checkpoint at ``folder``, from one pass over its files and the donor's.

    ``progress`` is told of answered requests when all layers are behind.

    Raises:
        UserError: a limit too small for one layer; what StreamedModel, StreamedLayerwise, Edited and Decoder refuse.
    """
    models = [streaming.open(checkpoint) for checkpoint in (folder, donor) if checkpoint is not None]
    edited = Edited(*(model.model for model in models))
    for model in models:
        model.load_rest()
    layerwise = StreamedLayerwise(edited.model)
    with layerwise.stand_ins():
        decoder = Decoder(edited.model)
    batches = list(layouts(decoder, requests, batch_size=batch_size))
    tokens_at_once = max((run.ids_BS.numel() for batch in batches for run in batch.passes), default=0)
    logits = min(LOGIT_ELEMENTS, tokens_at_once * text_config(edited.model.config).vocab_size)
    store = streaming.store(
        models,
        tokens_at_once=tokens_at_once,
        fixed=2 * sum(map(_mask_bytes, batches)) + 8 * logits,  # in float32, and their log-softmax
        states=_most_states(variants, models[0].num_layers) * sum(_state_bytes(models[0], batch) for batch in batches),
    )
    states = [States(edited, layerwise, decoder, batch.passes, variants, store=store) for batch in batches]
    for layer in each(range(models[0].num_layers), "sweep, layer by layer", unit="layers"):
        parts: set[ComponentPart] = {edit.part for variant in variants for at, edit in variant.edits if at == layer}
        with ExitStack() as stack:
            stack.enter_context(models[0].layer(layer))
            if "donor" in parts:
                stack.enter_context(models[1].layer(layer))
            if any(KINDS[part].is_inside for part in parts):
                with layerwise.stand_ins(but=layer):
                    prove_alone(edited.model, layer)
            for states_of_batch in states:
                states_of_batch.advance()
    answers: list[list[Score]] = [[(0.0, True)] * len(requests) for _ in variants]
    for batch, states_of_batch in zip(batches, states, strict=True):
        done = 0
        for number, variant in enumerate(variants):
            done = len(settle(decoder, batch.locate(states_of_batch.final(variant)), answers[number]))
        progress(done)
    return answers


def bytes_per_token(width: int, widest: int) -> int:
    """Of what a layer makes of a token on its way, in float32 at most, about.

    ``width`` is the hidden size, and ``widest`` the largest extent of a tensor in a layer.
    """
    return 4 * (STATES_AT_WORK * width + WIDE_STATES_AT_WORK * widest)


def _state_bytes(model: StreamedModel, layout: Layout) -> int:
    """Of one variant's states of all passes."""
    width = text_config(model.model.config).hidden_size
    return sum(run.ids_BS.numel() for run in layout.passes) * width * model.model.dtype.itemsize


def _mask_bytes(layout: Layout) -> int:
    """Of the passes' attention masks: every token may see every token of its row and of what it goes on from."""
    context = layout.passes[0].ids_BS.shape[1] if layout.branches else 0
    return sum(run.ids_BS.numel() * (run.ids_BS.shape[1] + context) for run in layout.passes)


def _most_states(variants: Sequence[Variant], num_layers: int) -> int:
    """How many different states of one batch there are at one time, before and behind a layer together."""
    counts = [
        len({tuple(edit for edit in variant.edits if edit[0] < layer) for variant in variants})
        for layer in range(num_layers + 1)
    ]
    return max(before + after for before, after in itertools.pairwise(counts))
