"""Mean loss per token of calibration documents under variants of a model.

One convention for all metrics of the loss: a token is predicted from the tokens before it in its own document, and the
first token of a document, before which nothing stands, from nothing and therefore not at all. That is what training
does with packed rows. A document that was cut at a row's end goes on as a document of its own.

B documents of a batch, S tokens of the longest but for its last one, D hidden, N predicted tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from shoal.components import LayerEdits
from shoal.data.packing import IGNORED
from shoal.errors import UserError
from shoal.inference.decoder import Decoder
from shoal.models.anatomy import decoder_body, decoder_layers, given_state, state_of, watched
from shoal.models.document_masks import documents_apart, padding_apart
from shoal.progress import progress

from ..variants.layerwise import Prepared
from ..variants.variants import INTACT, STATE_BYTES, Edited, Variant, layerwise_or_none
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
    """Mean negative log-likelihood per token in nats, over the documents of all ranks, of any variant of ``model``, and
    its divergence from the intact model.

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
        self._known_divergences: dict[LayerEdits, float] = {}
        documents = own_documents(calibration)
        self._batches = _batches(documents, calibration.batch_size * calibration.rows.input_ids_NS.shape[1])
        num_layers = len(decoder_layers(model))
        self._below, self._above = range(num_layers // 2), range(num_layers // 2, num_layers)
        self._middle: list[dict[LayerEdits, Tensor]] = [{} for _ in self._batches]
        """By batch, then by the edits below: what the upper half of the layers was last given."""
        self._middle_bytes = 0
        self._intact: dict[int, Tensor] = {}
        """By batch: the intact model's final states that predict a token; there once a divergence was asked for."""
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
        return self._remembered(self._known, variants, what, self._token_losses)

    def divergences(self, variants: Sequence[Variant], *, what: str) -> list[float]:
        """KL(intact || variant) of the next-token distributions, mean over the same tokens, in nats."""
        for index in range(0 if self._intact else len(self._batches)):
            ((_, intact_BSD),) = self._final_states(index, [INTACT])
            self._intact[index] = self._predicted(intact_BSD, index)[0]
        return self._remembered(self._known_divergences, variants, what, self._token_divergences)

    @cached_property
    def factors(self) -> Mapping[int, float] | None:
        """Layer -> times which it hands on its input where an order has removed it; None where it just does."""
        if not self._calibration.scale_removals:
            return None
        return removal_factors(self._edited.model, self._calibration)

    def _remembered(
        self,
        known: dict[LayerEdits, float],
        variants: Sequence[Variant],
        what: str,
        of_tokens: Callable[[Tensor, int], Tensor],
    ) -> list[float]:
        fresh = {variant.edits: variant for variant in variants if variant.edits not in known}
        if fresh:
            known |= zip(fresh, self._measure(list(fresh.values()), what, of_tokens), strict=True)
        return [known[variant.edits] for variant in variants]

    def _measure(
        self, variants: Sequence[Variant], what: str, of_tokens: Callable[[Tensor, int], Tensor]
    ) -> list[float]:
        sums = torch.zeros(len(variants), dtype=torch.float64)  # of many small numbers, by document and rank
        fault: tuple[int, str] | None = None
        total = len(self._batches) * len(variants)
        with progress(f"measure: {what}", total=total, unit="batches") as step:
            for index, batch in enumerate(self._batches):
                for number, hidden_BSD in self._final_states(index, variants):
                    loss_N = of_tokens(hidden_BSD, index)
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

    def _token_divergences(self, hidden_BSD: Tensor, index: int) -> Tensor:
        """(N,) KL(intact || variant) in nats, float64; as _token_losses."""
        hidden_ND, size = self._predicted(hidden_BSD, index)[0], self._decoder.positions_at_once()
        divergences: list[Tensor] = []
        for ours_ND, theirs_ND in zip(hidden_ND.split(size), self._intact[index].split(size), strict=True):
            log_q_NV, log_p_NV = (self._decoder.logits(some).log_softmax(-1) for some in (ours_ND, theirs_ND))
            divergences.append(functional.kl_div(log_q_NV, log_p_NV, reduction="none", log_target=True).sum(-1))
        return torch.cat(divergences).double()


def removal_factors(model: PreTrainedModel, calibration: Calibration) -> Mapping[int, float]:
    """Layer -> E|h'| / E|h| over the states behind and before it; all ranks call it.

    The factors of neighbouring layers multiply to that of their run (Prune&Comp, arXiv 2507.18212). A document's first
    token, which holds attention sinks of a hundred times the norm, is left out.
    """
    decoder, layers = Decoder(model), decoder_layers(model)
    sums = torch.zeros(2, len(layers), dtype=torch.float64)

    def add(which: int, layer: int, state_BSD: Tensor, counted_BS: Tensor) -> None:
        sums[which, layer] += float(state_BSD[counted_BS].abs().sum(dtype=torch.float64))

    for rows_B in calibration.batches():
        positions_BS = padding_apart(calibration.rows.position_ids_NS[rows_B], calibration.mask_NS[rows_B].bool())
        ids_BS, positions_BS = (
            plane_BS.long().to(model.device) for plane_BS in (calibration.rows.input_ids_NS[rows_B], positions_BS)
        )
        counted_BS = calibration.follows_NS[rows_B].to(model.device)
        with (
            documents_apart(decoder_body(model), positions_BS),
            watched(
                layers,
                before=lambda layer, args, kwargs, at=counted_BS: add(0, layer, given_state(args, kwargs), at),
                after=lambda layer, _, __, output, at=counted_BS: add(1, layer, state_of(output), at),
            ),
        ):
            decoder.hidden(ids_BS, position_ids_BS=positions_BS)
    before_L, after_L = add_up_ranks([sums], model.device)[0]
    return dict(enumerate((after_L / before_L).tolist()))


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
