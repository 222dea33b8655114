"""One streaming pass over calibration rows for all metrics of hidden states.

N rows, B batch, S sequence, T = B*S tokens, M documents of a batch, K sampled tokens, D hidden.

Besides the sums that metrics keep, memory is that of one batch: a few numbers per token and layer, and all states of
the batch where a metric compares every layer with every other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shoal.models.anatomy import decoder_body, decoder_layers, given_state, state_of, text_config, watched
from shoal.models.document_masks import documents_apart, padding_apart
from shoal.progress import each

from .hidden_metrics import (
    Angular,
    AvssOutput,
    AvssUpdate,
    BlockInfluence,
    HiddenMetric,
    PassSize,
    StreamlineCosine,
    UpdateNorm,
    refuse_other_shape,
)
from .metric import Calibration, Result, add_up_ranks, refuse_fault
from .mka import MkaSimilarity
from .observation import BatchView, Observation, Reading

HIDDEN_METRICS: dict[str, type[HiddenMetric]] = {
    "block_influence": BlockInfluence,
    "angular": Angular,
    "streamline_cosine": StreamlineCosine,
    "update_norm": UpdateNorm,
    "avss_output": AvssOutput,
    "avss_update": AvssUpdate,
    "mka_similarity": MkaSimilarity,
}
SAMPLE_SIZE = 256
"""Tokens whose states are kept, where a metric asks for some."""


def hidden_scores(model: PreTrainedModel, calibration: Calibration, names: Sequence[str]) -> dict[str, Result]:
    """Scores by the named HIDDEN_METRICS, from one pass that stops before the output head.

    Hidden states come from hooks on the decoder layers, so they are raw: the last state that transformers returns is
    behind the final norm. Padding counts nowhere and no real token sees it.

    Raises:
        UserError: states that are not finite, or that are not (B, S, D).
    """
    layers = decoder_layers(model)
    metrics = HiddenPass(model, calibration, names)
    writes = writes_into_input(model)
    for rows_B in each(calibration.batches(), f"measure: {', '.join(names)}", unit="batches"):
        batch = metrics.batch(rows_B)
        seen = Observation(batch.view, len(layers), metrics.reads)
        _run(model, layers, batch, seen.observe, writes=writes)
        if not metrics.add(batch, seen):
            break
    return metrics.scores()


class HiddenPass:
    """The named metrics of one pass, which is made in whatever order of layers and batches."""

    def __init__(self, model: PreTrainedModel, calibration: Calibration, names: Sequence[str]) -> None:
        self._device, self._dtype = model.device, model.dtype
        self._calibration, self._names = calibration, names
        chosen = [HIDDEN_METRICS[name] for name in names]
        self.reads = frozenset[Reading]().union(*(metric.reads for metric in chosen))
        self._sample_K2 = sampled_tokens(calibration)
        size = PassSize(len(decoder_layers(model)), text_config(model.config).hidden_size, len(self._sample_K2))
        self._metrics = [metric(size) for metric in chosen]
        self._fault: tuple[int, str] | None = None

    def batch(self, rows_B: Tensor) -> Batch:
        """The calibration rows of these indices, on the model's device."""
        return Batch.of(self._calibration, rows_B, self._sample_K2, self._device)

    def add(self, batch: Batch, seen: Observation) -> bool:
        """Add what was seen of a batch, in the order of batches; False where it is not finite, and nothing counts."""
        if fault := seen.first_fault():
            state, token = fault
            where = f"the output of layer {state - 1}" if state else "the input of layer 0"
            self._fault = int(batch.rows_B[token // batch.input_ids_BS.shape[1]]), where
            return False
        for metric in self._metrics:
            metric.add(seen)
        return True

    def scores(self) -> dict[str, Result]:
        """The scores by name, from all batches of all ranks, which call it together.

        Raises:
            UserError: some rank saw states that are not finite.
        """
        refuse_fault(self._calibration, self._fault, self._dtype)
        metrics = self._metrics
        counts = torch.tensor([metric.count for metric in metrics])
        # sums, never means: those of unequally many tokens would not add up
        counts, *sums = add_up_ranks([counts, *(metric.sums for metric in metrics)], self._device)
        for metric, count, total in zip(metrics, counts.tolist(), sums, strict=True):
            metric.count, metric.sums = count, total
        return {name: metric.scores() for name, metric in zip(self._names, metrics, strict=True)}


def sampled_tokens(calibration: Calibration) -> Tensor:
    """Row and column (K, 2) of evenly spaced real tokens, no document's first one among them if possible.

    They depend on the order of the documents only, not on batches, ranks, padding or the rows' length.
    """
    follows_NS = calibration.follows_NS
    eligible_E2 = (follows_NS if follows_NS.any() else calibration.mask_NS).nonzero()
    size = min(SAMPLE_SIZE, len(eligible_E2))
    # the middles of `size` equal parts: neither end of the data is preferred
    return eligible_E2[(2 * torch.arange(size) + 1) * len(eligible_E2) // (2 * max(size, 1))]


@torch.no_grad()
def writes_into_input(model: PreTrainedModel) -> bool:
    """Whether some layer changes the tensor it is given, so that its input must be copied to be known afterwards."""
    changed: list[bool] = []
    inputs: list[tuple[Tensor, int]] = []

    def before(_: int, args: Any, kwargs: Any) -> None:
        state = given_state(args, kwargs)
        inputs.append((state, state._version))  # torch counts every write in place

    def after(*_: Any) -> None:
        state, version = inputs.pop()
        changed.append(state._version != version)

    with watched(decoder_layers(model), before=before, after=after):
        ids = torch.arange(2, device=model.device).unsqueeze(0)
        decoder_body(model)(input_ids=ids, position_ids=ids, use_cache=False)
    return any(changed)


@dataclass(frozen=True)
class Batch:
    """Rows that run together."""

    rows_B: Tensor
    """Indices in the calibration data."""
    input_ids_BS: Tensor
    position_ids_BS: Tensor
    view: BatchView

    @classmethod
    def of(cls, calibration: Calibration, rows_B: Tensor, sample_K2: Tensor, device: torch.device) -> Batch:
        """The rows ``rows_B``; ``sample_K2`` is the whole pass's sample, of which some tokens may lie in them."""
        input_ids_BS = calibration.rows.input_ids_NS[rows_B]
        position_ids_BS = calibration.rows.position_ids_NS[rows_B]
        mask_BS = calibration.mask_NS[rows_B]
        position_ids_BS = padding_apart(position_ids_BS, mask_BS)
        ends_T = _last_tokens(position_ids_BS, mask_BS).flatten()
        real_T = mask_BS.flatten()
        # ends before a token = its document's number; padding shares one number behind the last, which is cut off below
        document_T = torch.where(real_T, ends_T.cumsum(0) - ends_T.long(), int(ends_T.sum()))
        # of the pass's sample: which row of this batch, and which entry of the sample
        place_K, slots_K = (rows_B[:, None] == sample_K2[:, 0]).nonzero(as_tuple=True)
        sample_K = place_K * mask_BS.shape[1] + sample_K2[slots_K, 1]
        view = BatchView(
            real_T=real_T,
            document_T=document_T.to(device),
            lengths_M=document_T.bincount(minlength=int(ends_T.sum()) + 1)[:-1].to(device),
            last_M=ends_T.nonzero().flatten().to(device),
            sample_K=sample_K.to(device),
            slots_K=slots_K,
        )
        return cls(rows_B, input_ids_BS.to(device), position_ids_BS.to(device), view)


@torch.inference_mode()
def _run(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    batch: Batch,
    observe: Callable[[int, Tensor, Tensor], None],
    *,
    writes: bool,
) -> None:
    body = decoder_body(model)
    with watching(layers, batch, observe, writes=writes), documents_apart(body, batch.position_ids_BS):
        body(input_ids=batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False)


@contextmanager
def watching(
    layers: nn.ModuleList, batch: Batch, observe: Callable[[int, Tensor, Tensor], None], *, writes: bool
) -> Iterator[None]:
    """Let ``observe`` see the flat input and output of every layer that runs on ``batch`` inside the block; ``writes``:
    layers change their input."""
    copies = dict[int, Tensor]()

    def before(layer: int, args: Any, kwargs: Any) -> None:
        copies[layer] = given_state(args, kwargs).clone()  # the layer will have changed it when `after` runs

    def after(layer: int, args: Any, kwargs: Any, output: Any) -> None:
        before_BSD = copies.pop(layer) if writes else given_state(args, kwargs)
        after_BSD = state_of(output)
        for state in (before_BSD, after_BSD):
            refuse_other_shape(layer, state, batch.input_ids_BS.shape)
        observe(layer, before_BSD.flatten(0, 1), after_BSD.flatten(0, 1))

    with watched(layers, before=before if writes else None, after=after):
        yield


def _last_tokens(position_ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Which tokens end a document: the next position does not follow, or the row ends."""
    ends_BS = torch.ones_like(mask_BS)  # a row's last token always ends its document
    ends_BS[:, :-1] = position_ids_BS[:, 1:] != position_ids_BS[:, :-1] + 1
    return ends_BS & mask_BS
