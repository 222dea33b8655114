"""Greedy text of many variants of a model at once; every text is the one that the variant alone would write.

Every variant reads the prompts in one pass: variants share what is below their first difference, prompts the beginning
they have in common. From there on all texts of all variants are rows of one batch, on keys and values that the reading
left behind; finished rows leave it.

B batch, S sequence, D hidden, H key-value heads, d size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from shoal.components import LayerEdit
from shoal.inference.decoder import Decoder, plain_cache
from shoal.inference.generation import Texts, write, write_after
from shoal.inference.prefix_sharing import batches, in_common, right_aligned
from shoal.inference.scoring import Pass
from shoal.runtime import queued

from ..edits.layer_edits import KINDS, RowsOfBatch, in_force
from .variants import INTACT, Edited, States, Variant, layerwise_or_none

Tokens = list[int]

CACHE_BYTES = 2 << 30
"""Keys and values that reading prompts may leave behind; more variants than that are taken in groups."""
WORTH_SHARING = 8
"""Tokens that prompts must have in common before they are read once for all."""


@dataclass(frozen=True)
class Limits:
    """When a text ends."""

    max_new_tokens: int
    is_finished: Callable[[Tokens], bool]


def generate_variants(
    edited: Edited,
    decoder: Decoder,
    prompts: Sequence[Tokens],
    variants: Sequence[Variant],
    limits: Limits,
    *,
    batch_size: int,
) -> list[list[Tokens]]:
    """The new tokens of every prompt under every variant: by variant, then in the order of ``prompts``.

    The intact model, and variants that cannot share a batch (a donor's layers, or an architecture that has to run as a
    whole) write one after the other.
    """
    together = _together(edited.model, decoder, variants)
    written: list[list[Tokens]] = [[[] for _ in prompts] for _ in variants]
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for batch in batches(order, batch_size):
        rows = [prompts[index] for index in batch]
        texts: dict[int, list[Tokens]] = {}  # by variant, then in the order of the batch
        for group in batches(together, _group_size(decoder, rows, limits)) if together else ():
            members = [variants[number] for number in group]
            texts.update(zip(group, _write_together(edited, decoder, rows, members, limits), strict=True))
        for number, variant in enumerate(variants):
            if number not in texts:
                with edited.applied(variant.edits):
                    texts[number] = write_after(
                        decoder, rows, max_new_tokens=limits.max_new_tokens, is_finished=limits.is_finished
                    )
            for index, tokens in zip(batch, texts[number], strict=True):
                written[number][index] = tokens
    return written


def _together(model: PreTrainedModel, decoder: Decoder, variants: Sequence[Variant]) -> list[int]:
    """The variants that can be rows of one batch, those with most in common next to each other."""
    if not decoder.can_branch or layerwise_or_none(model) is None:
        return []
    chosen = [
        number
        for number, variant in enumerate(variants)
        if variant.edits and all(KINDS[edit.part].hooks is not None for _, edit in variant.edits)
    ]
    return sorted(chosen, key=lambda number: [layer for layer, _ in variants[number].edits])


def _group_size(decoder: Decoder, prompts: Sequence[Tokens], limits: Limits) -> int:
    tokens = len(prompts) * (max(map(len, prompts)) + limits.max_new_tokens)
    return max(1, CACHE_BYTES // (tokens * decoder.cache_bytes))


def _write_together(
    edited: Edited, decoder: Decoder, prompts: Sequence[Tokens], variants: Sequence[Variant], limits: Limits
) -> list[list[Tokens]]:
    """The texts of ``variants`` by variant, then by prompt."""
    reading = _Reading(edited, decoder, prompts, variants)
    # one list, variant after variant: text number t is variant t // prompts, prompt t % prompts
    written = [[token] for variant in variants for token in reading.first_tokens(variant)]
    alive = [
        index
        for index, text in enumerate(written)
        if not limits.is_finished(text) and len(text) < limits.max_new_tokens
    ]
    if alive:
        texts = reading.texts(written, alive)
        del reading  # its states; the keys and values are the texts' now
        edits = RowEdits(edited.model, [variants[index // len(prompts)] for index in range(len(written))])
        with in_force(edited.model, edits.rows, edits.rows):
            write(
                decoder,
                texts,
                max_new_tokens=limits.max_new_tokens,
                is_finished=limits.is_finished,
                before_step=edits.choose,
            )
    return [written[start : start + len(prompts)] for start in range(0, len(written), len(prompts))]


class _Reading:
    """Every variant's pass over the prompts."""

    def __init__(
        self, edited: Edited, decoder: Decoder, prompts: Sequence[Tokens], variants: Sequence[Variant]
    ) -> None:
        self._decoder, self._prompts, self._variants = decoder, prompts, variants
        shared = min((in_common(prompts[0], other) for other in prompts[1:]), default=0)
        self._shared = shared if shared >= WORTH_SHARING else 0  # every prompt keeps a token of its own
        layerwise = layerwise_or_none(edited.model)
        assert layerwise is not None
        self._num_layers = layerwise.num_layers
        removed = [{layer for layer, edit in variant.edits if edit.removes_layer} for variant in variants]
        if set.intersection(*removed):  # a layer that nobody goes through would leave no slot
            variants = [*variants, INTACT]
        self._states = States(edited, layerwise, decoder, self._passes(), variants, keep=True)
        for _ in range(self._num_layers):
            self._states.advance()

    def _passes(self) -> list[Pass]:
        """The common beginning as one row, and what every prompt goes on with; one pass where nothing is shared."""
        read = [prompt[self._shared :] for prompt in self._prompts]
        ids_BS = self._decoder.right_padded(read)
        last_B1 = queued(torch.tensor([[len(rest) - 1] for rest in read]), ids_BS.device)
        answer_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device) >= last_B1
        if not self._shared:
            return [Pass(ids_BS, answer_BS)]
        context = queued(torch.tensor([self._prompts[0][: self._shared]]), self._decoder.device)
        positions_BS = self._shared + torch.arange(ids_BS.shape[1], device=ids_BS.device).expand(ids_BS.shape)
        rows = torch.zeros(len(read), dtype=torch.long, device=ids_BS.device)
        shared = Pass(context, torch.zeros_like(context, dtype=torch.bool))
        return [shared, Pass(ids_BS, answer_BS, None, positions_BS, rows)]

    def first_tokens(self, variant: Variant) -> Tokens:
        """What ``variant`` writes first after every prompt."""
        hidden_BSD = self._states.final(variant)[-1]
        last_B = queued(torch.tensor([len(each) - self._shared - 1 for each in self._prompts]), hidden_BSD.device)
        hidden_BD = hidden_BSD[torch.arange(len(last_B), device=hidden_BSD.device), last_B]
        return self._decoder.logits(hidden_BD).argmax(dim=-1).tolist()

    def texts(self, written: list[Tokens], alive: list[int]) -> Texts:
        """The texts ``alive`` (index: variant, then prompt), each ready to be fed its last token."""
        device = self._decoder.device
        count = len(self._prompts)
        sources = [(self._variants[text // count], text % count) for text in alive]
        lengths = [len(self._prompts[prompt]) for _, prompt in sources]
        longest = max(lengths)
        cache = plain_cache(self._num_layers)
        kept = self._states.kept
        assert kept is not None
        for layer, slots in enumerate(kept):
            # a removed layer has left nothing behind; what stands in its place is never read
            left = [
                (slots.get(tuple(edit for edit in variant.edits if edit[0] <= layer)), prompt)
                for variant, prompt in sources
            ]
            keys_BHSd, values_BHSd = (
                right_aligned([slot and slot[which][prompt] for slot, prompt in left], lengths, like=of_any[0])
                for which, of_any in enumerate(next(iter(slots.values())))
            )
            cache.update(keys_BHSd, values_BHSd, layer)
            slots.clear()  # layer by layer, so that not all of them are there twice
        lengths_B1 = queued(torch.tensor(lengths), device).unsqueeze(1)
        ids_BS = queued(torch.tensor([[written[text][-1]] for text in alive]), device)
        return Texts(cache, [longest - n for n in lengths], longest + 1, ids_BS, lengths_B1, list(alive), written)


class RowEdits:
    """Edits of layers that hold for some rows of the batch only."""

    def __init__(self, model: PreTrainedModel, variants: Sequence[Variant]) -> None:
        self._model = model
        self._variants = variants
        """Variant of every text."""
        self.rows = {edit: RowsOfBatch(torch.empty(0), 0) for variant in variants for edit in variant.edits}
        """Rows by layer and what is done to it."""

    def choose(self, alive: Sequence[int]) -> None:
        """Say which texts the rows of the next forward belong to."""
        chosen: dict[tuple[int, LayerEdit], list[int]] = {edit: [] for edit in self.rows}
        for row, text in enumerate(alive):
            for edit in self._variants[text].edits:
                chosen[edit].append(row)
        for edit, rows in self.rows.items():
            rows.rows_R = queued(torch.tensor(chosen[edit], dtype=torch.long), self._model.device)
            rows.num_rows = len(alive)
