"""Mean loss per token of calibration documents under variants of a model.

One convention for all metrics of the loss: a token is predicted from the tokens before it in its own document, and the
first token of a document, before which nothing stands, from nothing and therefore not at all. That is what training
does with packed rows. A document that was cut at a row's end goes on as a document of its own.

B documents of a batch, S tokens of the longest but for its last one, D hidden, N predicted tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from shoal.components import LayerEdits
from shoal.data.packing import IGNORED
from shoal.errors import UserError
from shoal.inference.decoder import Decoder
from shoal.models.anatomy import decoder_layers
from shoal.progress import progress

from ..variants.layerwise import Prepared
from ..variants.variants import STATE_BYTES, Edited, Variant, layerwise_or_none
from .metric import Calibration, add_up_ranks, refuse_fault

MIDDLE_BYTES = 1 << 30
"""States halfway up that are remembered from one call to the next. A greedy order that goes on in the upper half of the
layers then runs the lower half no more."""


@dataclass(frozen=True)
class Document:
    """Neighbouring tokens of one row that may see each other."""

    row: int
    tokens: tuple[int, ...]


class VariantLosses:
    """Mean negative log-likelihood per token in nats, over the documents of all ranks, of any variant of ``model``.

    All ranks call it with the same variants and get the same numbers. What was measured once is remembered.

    Raises:
        UserError: no document of two tokens, or an architecture whose head is not understood; when called, losses that
            are not finite.
    """

    def __init__(self, model: PreTrainedModel, calibration: Calibration) -> None:
        self._edited, self._decoder = Edited(model), Decoder(model)
        self._layerwise = layerwise_or_none(model)
        self._calibration = calibration
        self._known: dict[LayerEdits, float] = {}
        documents = own_documents(calibration)
        self._batches = _batches(documents, calibration.batch_size * calibration.rows.input_ids_NS.shape[1])
        num_layers = len(decoder_layers(model))
        self._below, self._above = range(num_layers // 2), range(num_layers // 2, num_layers)
        self._middle: list[dict[LayerEdits, Tensor]] = [{} for _ in self._batches]
        """By batch, then by the edits below: what the upper half of the layers was last given."""
        self._middle_bytes = 0
        count = torch.tensor(sum(len(document.tokens) - 1 for document in documents))
        self.num_tokens = int(add_up_ranks([count], model.device)[0])
        """Predicted tokens over all ranks."""
        if self.num_tokens == 0:
            raise UserError(
                "measure: the calibration data holds no document of two tokens, so that no token can be predicted from "
                "one before it; name a data source with longer texts or raise measure.sequence_length"
            )

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
            for index, batch in enumerate(self._batches):
                for number, hidden_BSD in self._final_states(index, variants):
                    loss_N = self._token_losses(hidden_BSD, index)
                    sums[number] += float(loss_N.sum())
                    if fault is None and not bool(loss_N.isfinite().all()):
                        first = int(loss_N.isfinite().logical_not().nonzero()[0])
                        fault = _row_of(batch, first), f"the loss of {_in_words(variants[number])}"
                    step()
                if fault is not None:
                    break
        refuse_fault(self._calibration, fault, self._edited.model.dtype)
        return (add_up_ranks([sums], self._edited.model.device)[0] / self.num_tokens).tolist()

    def _final_states(self, batch: int, variants: Sequence[Variant]) -> Iterator[tuple[int, Tensor]]:
        """Index of every variant and its final hidden states; what lies below first differences is computed once."""
        ids_BS = self._decoder.right_padded([document.tokens[:-1] for document in self._batches[batch]])
        if self._layerwise is None:
            for number, variant in enumerate(variants):
                with self._edited.applied(variant.edits):
                    hidden_BSD = self._decoder.hidden(ids_BS)
                yield number, hidden_BSD
            return
        prepared = self._layerwise.prepare(self._decoder.arguments(ids_BS))
        size = max(1, STATE_BYTES // prepared.hidden_BSD.nbytes)
        # a group starts again from the middle, so those that differ late are put together: they share most
        order = sorted(range(len(variants)), key=lambda number: [layer for layer, _ in variants[number].edits])
        for start in range(0, len(order), size):
            group = order[start : start + size]
            paths = [variants[number].edits for number in group]
            middle = self._states_at_the_middle(batch, prepared, paths)
            states = self._run(prepared, middle, self._above, paths)
            del middle  # else it would be held while the logits are made
            for number, path in zip(group, paths, strict=True):
                yield number, self._layerwise.finish(states[path], prepared)
        self._forget(batch, {_up_to(variant.edits, self._above.start) for variant in variants})

    def _states_at_the_middle(
        self, batch: int, prepared: Prepared, paths: Sequence[LayerEdits]
    ) -> dict[LayerEdits, Tensor]:
        """What the upper half of the layers gets, by the edits below; remembered as long as MIDDLE_BYTES allow."""
        known = self._middle[batch]
        wanted = dict.fromkeys(_up_to(path, self._above.start) for path in paths)
        fresh = [path for path in wanted if path not in known]
        computed = self._run(prepared, {(): prepared.hidden_BSD}, self._below, fresh) if fresh else {}
        states = {path: known[path] if path in known else computed[path] for path in wanted}
        for path in fresh:
            if self._middle_bytes + computed[path].nbytes <= MIDDLE_BYTES:
                known[path] = computed[path]
                self._middle_bytes += computed[path].nbytes
        return states

    def _forget(self, batch: int, used: Collection[LayerEdits]) -> None:
        for path in self._middle[batch].keys() - used:
            self._middle_bytes -= self._middle[batch].pop(path).nbytes

    def _run(
        self, prepared: Prepared, states: dict[LayerEdits, Tensor], layers: range, paths: Sequence[LayerEdits]
    ) -> dict[LayerEdits, Tensor]:
        """The states (B, S, D) behind ``layers`` by the edits of ``paths``, from those before, by the edits below."""
        assert self._layerwise is not None
        for layer in layers:
            before, states = states, {}
            for path in paths:
                through = _up_to(path, layer + 1)
                if through not in states:
                    edits = [edit for at, edit in through if at == layer]
                    hidden_BSD = before[_up_to(path, layer)]
                    states[through] = self._edited.run(self._layerwise, layer, edits, hidden_BSD, prepared.calls[layer])
        return states

    def _predicted(self, hidden_BSD: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """(N, D) The states that predict a token, document by document, and (N,) these tokens."""
        batch = self._batches[index]
        longest = hidden_BSD.shape[1]  # the last token of a document was not read: nothing is predicted from it
        rows = [[*document.tokens[1:], *[IGNORED] * (longest + 1 - len(document.tokens))] for document in batch]
        target_BS = torch.tensor(rows, device=hidden_BSD.device)
        predicted_BS = target_BS != IGNORED
        return hidden_BSD[predicted_BS], target_BS[predicted_BS]

    def _token_losses(self, hidden_BSD: Tensor, index: int) -> Tensor:
        """(N,) in nats, float64, document by document; never more logits at one time than the decoder allows."""
        hidden_ND, target_N = self._predicted(hidden_BSD, index)
        size = self._decoder.positions_at_once()
        losses = [
            functional.cross_entropy(self._decoder.logits(hidden), target, reduction="none")
            for hidden, target in zip(hidden_ND.split(size), target_N.split(size), strict=True)
        ]
        return torch.cat(losses).double()


def own_documents(calibration: Calibration) -> list[Document]:
    """The documents of this rank's rows of which a token can be predicted, in order; padding belongs to none."""
    batches = calibration.batches()
    predicted: list[Document] = []
    for row in torch.cat(batches).tolist() if batches else []:
        tokens: list[int] = []
        ids_S, real_S = calibration.rows.input_ids_NS[row].tolist(), calibration.mask_NS[row].tolist()
        documents: list[list[int]] = []
        for token, real, follows in zip(ids_S, real_S, calibration.follows_NS[row].tolist(), strict=True):
            if real and not follows:
                tokens = []
                documents.append(tokens)
            if real:
                tokens.append(token)
        predicted += [Document(row, tuple(document)) for document in documents if len(document) > 1]
    return predicted


def _batches(documents: Sequence[Document], room: int) -> list[list[Document]]:
    """Documents of similar length together, at most ``room`` tokens with their padding, longest first."""
    waiting = sorted(documents, key=lambda document: -len(document.tokens))
    batches: list[list[Document]] = []
    while waiting:
        size = max(1, room // len(waiting[0].tokens))
        batches.append(waiting[:size])
        waiting = waiting[size:]
    return batches


def _up_to(path: LayerEdits, layer: int) -> LayerEdits:
    """The edits of layers below ``layer``."""
    return tuple(edit for edit in path if edit[0] < layer)


def _in_words(variant: Variant) -> str:
    return f"the model without {variant.name}" if variant.edits else "the intact model"


def _row_of(batch: Sequence[Document], token: int) -> int:
    """The row of the document that holds the ``token``-th predicted token of ``batch``."""
    for document in batch:
        token -= len(document.tokens) - 1
        if token < 0:
            return document.row
    raise IndexError(token)
