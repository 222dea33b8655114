"""Mean loss per token of calibration documents under variants of a model.

One convention for all metrics of the loss: a token is predicted from the tokens before it in its own document, and the
first token of a document, before which nothing stands, from nothing and therefore not at all. That is what training
does with packed rows. A document that was cut at a row's end goes on as a document of its own.

B documents of a batch, S tokens of the longest but for its last one, D hidden, N predicted tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from shoal.components import LayerEdits
from shoal.inference.decoder import Decoder
from shoal.inference.scoring import Pass
from shoal.progress import progress
from shoal.runtime import queued

from ..variants.variants import Edited, Variant, final_states, layerwise_or_none
from .metric import Calibration, Document, add_up_ranks, refuse_fault


class VariantLosses:
    """Mean negative log-likelihood per token in nats, over the documents of all ranks, of any variant of ``model``.

    All ranks call it with the same variants and get the same numbers. What was measured once is remembered.

    Raises:
        UserError: an architecture whose head is not understood; when called, losses that are not finite.
    """

    def __init__(self, model: PreTrainedModel, calibration: Calibration) -> None:
        self._edited, self._decoder = Edited(model), Decoder(model)
        self._layerwise = layerwise_or_none(model)
        self._calibration = calibration
        self._known: dict[LayerEdits, float] = {}
        room = calibration.batch_size * calibration.rows.input_ids_NS.shape[1]
        rows = [row for batch in calibration.batches() for row in batch.tolist()]  # this rank's
        self._batches = _batches([each for each in calibration.documents(rows) if len(each.tokens) > 1], room)
        self.num_tokens = int(calibration.follows_NS.sum())
        """Predicted tokens over all ranks."""

    def __call__(self, variants: Sequence[Variant], *, what: str = "losses") -> list[float]:
        """The loss under each of ``variants``; ``what`` is measured is shown beside the progress."""
        fresh = {variant.edits: variant for variant in variants if variant.edits not in self._known}
        if fresh:
            self._known |= zip(fresh, self._measure(list(fresh.values()), what), strict=True)
        return [self._known[variant.edits] for variant in variants]

    def _measure(self, variants: Sequence[Variant], what: str) -> list[float]:
        sums = torch.zeros(len(variants), dtype=torch.float64)  # of many small numbers, by document and rank
        fault: tuple[int, str] | None = None
        total = len(self._batches) * len(variants)
        with progress(f"measure: {what}", total=total, unit="batches") as step:
            for batch in self._batches:
                ids_BS = self._decoder.right_padded([document.tokens[:-1] for document in batch])
                passes = [Pass(ids_BS, answer_BS=torch.zeros_like(ids_BS, dtype=torch.bool))]
                # of a document's last token, which was not read, nothing is predicted
                reads = [(row, at) for row, document in enumerate(batch) for at in range(len(document.tokens) - 1)]
                places = [(row * ids_BS.shape[1] + at, batch[row].tokens[at + 1]) for row, at in reads]
                place_N, token_N = queued(torch.tensor(places), self._decoder.device).T
                found: dict[int, Tensor] = {}
                for number, (hidden_BSD,) in final_states(
                    self._edited, self._layerwise, self._decoder, passes, variants
                ):
                    found[number] = self._loss_2(hidden_BSD, place_N, token_N)
                    step()
                # a GPU is waited for once in a batch, however many variants there are
                for number, (loss, bad) in zip(found, torch.stack(list(found.values())).tolist(), strict=True):
                    sums[number] += loss
                    if fault is None and bad < len(reads):
                        without = f"model without {variants[number].name}" if variants[number].edits else "teacher"
                        fault = batch[reads[int(bad)][0]].row, f"the loss of the {without}"
                if fault is not None:
                    break
        refuse_fault(self._calibration, fault, self._edited.model)
        return (add_up_ranks([sums], self._edited.model.device)[0] / self.num_tokens).tolist()

    def _loss_2(self, hidden_BSD: Tensor, place_N: Tensor, token_N: Tensor) -> Tensor:
        """The sum in nats, float64, of the losses of tokens at places in the flattened (B x S) states, and the first of
        them that is not finite, N where all are; never more logits at one time than the decoder allows."""
        hidden_ND, size = hidden_BSD.flatten(0, 1)[place_N], self._decoder.positions_at_once()
        losses = [
            functional.cross_entropy(self._decoder.logits(part_ND), part_N, reduction="none")
            for part_ND, part_N in zip(hidden_ND.split(size), token_N.split(size), strict=True)
        ]
        loss_N = torch.cat(losses).double()
        places_N = torch.arange(len(loss_N), device=loss_N.device)
        return torch.stack([loss_N.sum(), places_N.masked_fill(loss_N.isfinite(), len(loss_N)).min().double()])


def _batches(documents: Sequence[Document], room: int) -> list[list[Document]]:
    """Documents of similar length together, at most ``room`` tokens with their padding, longest first."""
    waiting = sorted(documents, key=lambda document: -len(document.tokens))
    batches: list[list[Document]] = []
    while waiting:
        size = max(1, room // len(waiting[0].tokens))
        batches.append(waiting[:size])
        waiting = waiting[size:]
    return batches
