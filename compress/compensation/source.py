"""Where the weights of layers are while compensation is fitted: in memory, or in files, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from shoal.data.packing import PackedRows
from shoal.inference.decoder import Decoder
from shoal.recipe.prune import Calibration
from shoal.runtime import device

from ..edits.sublayers import prove_alone
from ..variants.layerwise import Layerwise, Prepared
from ..variants.state_store import Kept, StateStore
from ..variants.streamed import Streaming
from ..variants.streamed_model import StreamedLayerwise, StreamedModel


@dataclass(frozen=True)
class Source:
    """A model, taken apart, and where what is made of it waits."""

    model: PreTrainedModel
    layerwise: Layerwise
    decoder: Decoder
    loaded: Callable[[int], AbstractContextManager[object]]
    """A block in which the weights of one layer are there, and its halves are known."""
    store: StateStore
    """For states of all calibration tokens, and for folded tensors."""


def batches(source: Source, rows: PackedRows, batch_size: int) -> Iterator[tuple[Prepared, Kept]]:
    """``rows`` on their way into the layers, and the states that the first layer gets."""
    for start in range(0, len(rows), batch_size):
        ids_BS, positions_BS = (
            plane_NS[start : start + batch_size].long().to(source.model.device)
            for plane_NS in (rows.input_ids_NS, rows.position_ids_NS)
        )
        inputs = source.decoder.arguments(ids_BS, position_ids_BS=positions_BS)
        prepared = source.layerwise.prepare(inputs, positions_BS)
        yield prepared.without_hidden(), source.store.keep(prepared.hidden_BSD)


def streaming_of(
    settings: Calibration, spill_folder: Path, *, section: str, trust_remote_code: bool = False
) -> Streaming:
    """How a checkpoint is read layer by layer, and what that may take; ``section`` of the recipe says so."""
    assert settings.memory_gb is not None
    return Streaming(
        memory_bytes=int(settings.memory_gb * 2**30),
        dtype="float32",
        device=device(),
        attention=None,
        trust_remote_code=trust_remote_code,
        spill_folder=spill_folder,
        section=section,
    )


def in_memory(model: PreTrainedModel) -> Source:
    """A model with all its weights.

    Raises:
        UserError: layers that cannot be run one by one.
    """
    decoder = Decoder(model)  # whose word on weights that are damaged is clearer
    return Source(model, Layerwise(model), decoder, lambda _: nullcontext(), StateStore())


def from_files(model: StreamedModel, store: StateStore) -> Source:
    """A model of which one layer's weights are there at a time.

    Raises:
        UserError: layers that cannot be run one by one.
    """
    model.load_rest()
    layerwise = StreamedLayerwise(model.model, whole=model.whole)
    with layerwise.stand_ins():
        decoder = Decoder(model.model)
    proven: set[int] = set()

    @contextmanager
    def loaded(layer: int) -> Iterator[None]:
        with model.layer(layer):
            if layer not in proven:
                with layerwise.stand_ins(but=layer):
                    prove_alone(model.model, layer)
                proven.add(layer)
            yield

    return Source(model.model, layerwise, decoder, loaded, store)
