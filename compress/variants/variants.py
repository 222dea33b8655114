"""Variants of a model and their final states, each shared part of the way computed once.

A variant is the intact model with edits of single layers. Two variants are the same up to the layer of their first
difference, so states are kept by the edits met so far: all variants pass layer j together, while its weights are hot,
and what equal beginnings have in common is run once. Over all L single removals this is L(L-1)/2 + L layers where a
loop over L cut models runs L(L-1).

Scoring a batch takes several passes (shoal.inference.scoring): the first reads contexts, later ones read what goes on
from rows of the first one's keys and values. A layer writes these into its slot of a cache.

B batch, S sequence, D hidden.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from shoal.components import REMOVED, Component, ComponentPart, LayerEdit, LayerEdits
from shoal.errors import UserError
from shoal.inference.decoder import Decoder, plain_cache
from shoal.inference.prefix_sharing import Tokens
from shoal.inference.scoring import Pass, Score, hidden_of, layouts, settle, token_scores
from shoal.models.anatomy import text_config
from shoal.models.document_masks import documents_known

from ..edits.layer_edits import in_force, layer_edits, passed_on
from .layerwise import Call, Layerwise

log = logging.getLogger(__name__)

STATE_BYTES = 1 << 30
"""States of variants that are held at one time; a sweep over more of them goes through the layers in groups."""


@dataclass(frozen=True)
class Variant:
    """The intact model with ``edits``; without any it is the intact model itself."""

    name: str
    edits: LayerEdits


INTACT = Variant("intact", ())


def variant(name: str, edits: Iterable[tuple[int, LayerEdit]]) -> Variant:
    """The variant with ``edits`` in any order."""
    return Variant(name, tuple(sorted(edits, key=lambda edit: (edit[0], edit[1].part))))


def variant_of(component: Component, model: PreTrainedModel) -> Variant:
    """``model`` as it is without ``component``."""
    return Variant(component.name, layer_edits([component], model))


def without(layers: Iterable[int], name: str = "") -> Variant:
    """The variant without ``layers``."""
    chosen = sorted(layers)
    return Variant(name or ",".join(map(str, chosen)), tuple((layer, REMOVED) for layer in chosen))


@dataclass(frozen=True)
class Edited:
    """A model to which variants can be applied."""

    model: PreTrainedModel

    def applied(self, edits: LayerEdits) -> AbstractContextManager[object]:
        """``edits`` in effect on the model until the block ends: the plain way, for any architecture."""
        return in_force(self.model, edits)

    def run(
        self, layerwise: Layerwise, layer: int, edits: Sequence[LayerEdit], hidden_BSD: Tensor, call: Call
    ) -> Tensor:
        """(B, S, D) The state after ``layer`` under ``edits`` of it; ``hidden_BSD`` itself where it is just removed."""
        if any(edit.removes_layer for edit in edits):
            return hidden_BSD
        with self.applied(tuple((layer, edit) for edit in edits)):
            return layerwise.run(layer, hidden_BSD, call)


class States:
    """The states of variants over the passes of one layout, on their way through the layers.

    Variants with the same edits up to here have the same states; these are held once, under those edits. With ``keep``
    the keys and values that the last pass ends with stay in ``kept``: by layer, then by edits so far.
    """

    def __init__(
        self,
        edited: Edited,
        layerwise: Layerwise,
        decoder: Decoder,
        passes: Sequence[Pass],
        variants: Sequence[Variant],
        *,
        keep: bool = False,
    ) -> None:
        self._edited, self._layerwise = edited, layerwise
        self._variants = variants
        self._passes = passes
        self._empty = None
        if keep:  # a sliding layer's own kind forgets what a shorter text would still see
            self._empty = plain_cache(layerwise.num_layers)
        elif len(passes) > 1:
            self._empty = decoder.new_cache()
        self.kept: list[dict[LayerEdits, tuple[Tensor, Tensor]]] | None = [] if keep else None
        self._lengths_only = _caches_of_lengths(self._empty, passes)
        """For every pass the cache that its recorded calls hand over; replaced by one with keys and values."""
        with documents_known(None, decoder.device):
            prepared = [
                layerwise.prepare(
                    decoder.arguments(batch.ids_BS, mask=batch.mask, position_ids_BS=batch.positions_BS, cache=cache)
                )
                for batch, cache in zip(passes, self._lengths_only, strict=True)
            ]
        self._states: dict[LayerEdits, list[Tensor]] = {(): [batch.hidden_BSD for batch in prepared]}
        """By the edits of the layers behind: what the next layer gets, one (B, S, D) for every pass."""
        self._prepared = [batch.without_hidden() for batch in prepared]
        self.layer = 0
        """The layer that comes next."""

    def advance(self) -> None:
        """Take every state through the next layer."""
        layer, before = self.layer, self._states
        self._states = {}
        if self.kept is not None:
            self.kept.append({})
        passed: dict[LayerEdits, tuple[list[Tensor], Any]] = {}
        for variant in self._variants:
            so_far = tuple(edit for edit in variant.edits if edit[0] <= layer)
            if so_far in self._states:
                continue
            edits = [edit for at, edit in so_far if at == layer]
            states = before[tuple(edit for edit in so_far if edit[0] < layer)]
            # what passes its input on at some positions has run as all others that get these states
            through = tuple((at, edit) for at, edit in so_far if at < layer or not edit.at_positions)
            if through not in passed:
                passed[through] = self._through(layer, [edit for at, edit in through if at == layer], states)
            after, slot = passed[through]
            skips: list[ComponentPart] = [edit.part for edit in edits if edit.at_positions]
            if skips:
                pairs = zip(self._passes, states, after, strict=True)
                after = [passed_on(skips, batch.answer_BS, given, made) for batch, given, made in pairs]
            self._states[so_far] = after
            if self.kept is not None and slot is not None and not any(edit.removes_layer for edit in edits):
                self.kept[layer][so_far] = slot.keys, slot.values
        self.layer += 1

    def final(self, variant: Variant) -> list[Tensor]:
        """(B, S, D) The final hidden states of every pass, once all layers are behind."""
        states = zip(self._states[variant.edits], self._prepared, strict=True)
        return [self._layerwise.finish(state, prepared) for state, prepared in states]

    def _through(self, layer: int, edits: Sequence[LayerEdit], states: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        """The states of all passes behind ``layer``, and the slot with what the last pass ends with there.

        Later passes go on from the first one's keys and values in this layer, which nobody needs after them.
        """
        contexts: DynamicCache | None = None
        after: list[Tensor] = []
        slot: Any = None
        for batch, prepared, lengths_only, before_BSD in zip(
            self._passes, self._prepared, self._lengths_only, states, strict=True
        ):
            call = prepared.calls[layer]
            if self._empty is not None:
                # a copy of this layer's slot alone: it is all that the layer reads and writes, and what one variant
                # writes no other may see
                cache = _with_own_slot(self._empty if contexts is None else contexts, layer)
                slot = cache.layers[layer]
                if contexts is None:
                    contexts = cache
                else:
                    slot.batch_select_indices(batch.rows)  # (contexts, heads, S, d) -> (B, heads, S, d)
                call = call.replacing(lengths_only, cache)
            after.append(self._edited.run(self._layerwise, layer, edits, before_BSD, call))
        return after, slot


def _caches_of_lengths(empty: DynamicCache | None, passes: Sequence[Pass]) -> list[DynamicCache | None]:
    """For every pass a cache as long as the one it goes on from, of which the body needs the length for masks and
    positions and no number."""
    if empty is None:
        return [None] * len(passes)
    ids_BS, full = passes[0].ids_BS, copy.deepcopy(empty)
    for layer in range(len(full.layers)):
        zeros_B1S1 = torch.zeros(len(ids_BS), 1, ids_BS.shape[1], 1, device=ids_BS.device)
        full.update(zeros_B1S1, zeros_B1S1, layer)
    return [copy.deepcopy(empty), *(copy.deepcopy(full) for _ in passes[1:])]


def _with_own_slot(cache: DynamicCache, layer: int) -> DynamicCache:
    """``cache``, whose slot of ``layer`` may be changed without changing it there."""
    own = copy.copy(cache)
    own.layers = list(cache.layers)
    own.layers[layer] = copy.copy(cache.layers[layer])
    return own


def score_variants(
    edited: Edited,
    decoder: Decoder,
    requests: Sequence[tuple[Tokens, Tokens]],
    variants: Sequence[Variant],
    *,
    batch_size: int,
    progress: Callable[[int], object] = lambda done: None,
) -> list[list[Score]]:
    """The score of every (context, continuation) under every variant: by variant, then in order of ``requests``.

    The same values as scoring every variant on its own. Where the layers of an architecture cannot be run alone, that
    is what happens.
    """
    answers: list[list[Score]] = [[(0.0, True)] * len(requests) for _ in variants]
    layerwise = layerwise_or_none(edited.model)
    for layout in layouts(decoder, requests, batch_size=batch_size):
        owners: list[list[int]] = []
        found: dict[int, Tensor] = {}
        for number, hidden in final_states(edited, layerwise, decoder, layout.passes, variants):
            positions = layout.locate(hidden)
            owners, found[number] = positions.owners, token_scores(decoder, positions)
        # a GPU is waited for once, however many variants there are
        for number, scores in zip(found, torch.stack(list(found.values())).tolist(), strict=True):
            settle(owners, scores, answers[number])
        progress(len({owner for some in owners for owner in some}))
    return answers


def final_states(
    edited: Edited, layerwise: Layerwise | None, decoder: Decoder, passes: Sequence[Pass], variants: Sequence[Variant]
) -> Iterator[tuple[int, list[Tensor]]]:
    """Index of every variant and its final hidden states of all ``passes``; what lies below first differences is
    computed once."""
    if layerwise is None:
        for number, variant in enumerate(variants):
            with edited.applied(variant.edits):
                hidden = hidden_of(decoder, passes)
            yield number, hidden
        return
    # a group starts again from the first layer, so those that differ late are put together: they share most
    order = sorted(range(len(variants)), key=lambda number: [layer for layer, _ in variants[number].edits])
    size = _group_size(edited.model, passes)
    for start in range(0, len(order), size):
        group = order[start : start + size]
        states = States(edited, layerwise, decoder, passes, [variants[number] for number in group])
        for _ in range(layerwise.num_layers):
            states.advance()
        for number in group:
            yield number, states.final(variants[number])


def layerwise_or_none(model: PreTrainedModel) -> Layerwise | None:
    """``model`` taken apart into layers, or None where its architecture has to run as a whole."""
    try:
        return Layerwise(model)
    except UserError as error:
        if model not in _told:
            log.info("%s; every variant runs through all layers", error)
            _told.add(model)
        return None


_told: WeakSet[PreTrainedModel] = WeakSet()
"""Models of which the log says already that they run as a whole."""


def _group_size(model: PreTrainedModel, passes: Sequence[Pass]) -> int:
    """How many variants' states of one layout may be held."""
    elements = sum(batch.ids_BS.numel() for batch in passes) * text_config(model.config).hidden_size
    return max(1, STATE_BYTES // (elements * model.dtype.itemsize))
