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
from shoal.data.packing import IGNORED
from shoal.inference.decoder import Decoder
from shoal.inference.scoring import Pass
from shoal.progress import progress

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
        self._batches = _batches(own_documents(calibration), room)
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
                for number, (hidden_BSD,) in final_states(
                    self._edited, self._layerwise, self._decoder, passes, variants
                ):
                    loss_N = self._token_losses(hidden_BSD, batch)
                    sums[number] += float(loss_N.sum())
                    if fault is None and not bool(loss_N.isfinite().all()):
                        first = int(loss_N.isfinite().logical_not().nonzero()[0])
                        rows = [document.row for document in batch for _ in document.tokens[1:]]  # of loss_N
                        fault = rows[first], f"the loss of {_in_words(variants[number])}"
                    step()
                if fault is not None:
                    break
        refuse_fault(self._calibration, fault, self._edited.model.dtype)
        return (add_up_ranks([sums], self._edited.model.device)[0] / self.num_tokens).tolist()

    def _token_losses(self, hidden_BSD: Tensor, batch: Sequence[Document]) -> Tensor:
        """(N,) in nats, float64, document by document; never more logits at one time than the decoder allows."""
        longest = hidden_BSD.shape[1]  # the last token of a document was not read: nothing is predicted from it
        rows = [[*document.tokens[1:], *[IGNORED] * (longest + 1 - len(document.tokens))] for document in batch]
        target_BS = torch.tensor(rows, device=hidden_BSD.device)
        predicted_BS = target_BS != IGNORED
        size = self._decoder.positions_at_once()
        losses = [
            functional.cross_entropy(self._decoder.logits(hidden_ND), target_N, reduction="none")
            for hidden_ND, target_N in zip(
                hidden_BSD[predicted_BS].split(size), target_BS[predicted_BS].split(size), strict=True
            )
        ]
        return torch.cat(losses).double()


def own_documents(calibration: Calibration) -> list[Document]:
    """The documents of this rank's rows of which a token can be predicted, in order."""
    rows = [row for batch in calibration.batches() for row in batch.tolist()]
    return [document for document in calibration.documents(rows) if len(document.tokens) > 1]


def _batches(documents: Sequence[Document], room: int) -> list[list[Document]]:
    """Documents of similar length together, at most ``room`` tokens with their padding, longest first."""
    waiting = sorted(documents, key=lambda document: -len(document.tokens))
    batches: list[list[Document]] = []
    while waiting:
        size = max(1, room // len(waiting[0].tokens))
        batches.append(waiting[:size])
        waiting = waiting[size:]
    return batches


def _in_words(variant: Variant) -> str:
    return f"the model without {variant.name}" if variant.edits else "the intact model"
