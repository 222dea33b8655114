"""Variants of a model and their final states, each shared part of the way computed once.

A variant is the intact model with edits of single layers. Two variants are the same up to the layer of their first
difference, so states are kept by the edits met so far: all variants pass layer j together, while its weights are hot,
and what equal beginnings have in common is run once. Over all L single removals this is L(L-1)/2 + L layers where a
loop over L cut models runs L(L-1).

B batch, S sequence, D hidden.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from shoal.errors import UserError
from shoal.inference.decoder import Decoder, plain_cache
from shoal.inference.scoring import Layout, Pass, Score, Tokens, layouts, settle
from shoal.models.anatomy import decoder_layers, text_config
from shoal.recipe.edits import REMOVED, Component, LayerEdit, LayerEdits

from ..edits.layer_edits import in_force, layer_edits
from ..edits.swapping import refuse_unswappable, swapped
from .layerwise import Call, Layerwise
from .state_store import Kept, StateStore

log = logging.getLogger(__name__)

STATE_BYTES = 1 << 30
"""States of variants that are held at one time; a sweep over more of them goes through the layers in groups."""


@dataclass(frozen=True)
class Variant:
    """The intact model with ``edits``; without any it is the intact model itself."""

    name: str
    edits: LayerEdits

    @property
    def first_change(self) -> int | None:
        return self.edits[0][0] if self.edits else None


INTACT = Variant("intact", ())


def variant(name: str, edits: Iterable[tuple[int, LayerEdit]]) -> Variant:
    """The variant with ``edits`` in any order."""
    return Variant(name, tuple(sorted(edits, key=lambda edit: (edit[0], edit[1].part))))


def variant_of(component: Component, model: PreTrainedModel) -> Variant:
    """``model`` as it is without ``component`` (of a donor: with it)."""
    return Variant(component.name, layer_edits([component], model))


def without(layers: Iterable[int], name: str = "") -> Variant:
    """The variant without ``layers``."""
    chosen = sorted(layers)
    return Variant(name or ",".join(map(str, chosen)), tuple((layer, REMOVED) for layer in chosen))


@dataclass(frozen=True)
class Edited:
    """A model to which variants can be applied.

    Raises:
        UserError: a donor whose layers do not fit the model.
    """

    model: PreTrainedModel
    donor: PreTrainedModel | None = None

    def __post_init__(self) -> None:
        if self.donor is not None:
            refuse_unswappable(self.model, self.donor, range(len(decoder_layers(self.model))), ())

    def applied(self, edits: LayerEdits) -> ExitStack:
        """``edits`` in effect on the model until the returned stack is closed: the plain way, for any architecture."""
        stack = ExitStack()
        swaps = [layer for layer, edit in edits if edit.part == "donor"]
        if swaps:
            assert self.donor is not None
            stack.enter_context(swapped(self.model, self.donor, swaps))
        stack.enter_context(in_force(self.model, edits))
        return stack

    def run(self, layerwise: Layerwise, layer: int, edits: Sequence[LayerEdit], hidden: Tensor, call: Call) -> Tensor:
        """The state after ``layer`` under ``edits`` of it; ``hidden`` itself where it is removed."""
        if REMOVED in edits:
            return hidden
        if any(edit.part == "donor" for edit in edits):
            assert self.donor is not None
            assert len(edits) == 1, "a donor's layer is taken as it is"
            return call.of(decoder_layers(self.donor)[layer], hidden.clone())
        with in_force(self.model, [(layer, edit) for edit in edits]):
            return layerwise.run(layer, hidden, call)


class States:
    """The states of variants over the passes of one layout, on their way through the layers.

    With ``keep`` the keys and values that the last pass ends with stay in ``kept``: by layer, then by edits so far.
    ``store`` is where states wait for their next layer.
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
        store: StateStore | None = None,
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
        self._caches = caches = _measuring_caches(self._empty, passes)
        self._prepared = [
            layerwise.prepare(
                decoder.arguments(one.ids_BS, mask=one.mask, position_ids_BS=one.positions_BS, cache=cache)
            )
            for one, cache in zip(passes, caches, strict=True)
        ]
        self._store = store or StateStore()
        self._states: dict[LayerEdits, list[Kept]] = {
            (): [self._store.keep(made.hidden_BSD) for made in self._prepared]
        }
        self._prepared = [made.without_hidden() for made in self._prepared]
        self.layer = 0

    def advance(self) -> None:
        """Take every state through the next layer."""
        layer, before = self.layer, self._states
        self._states = {}
        if self.kept is not None:
            self.kept.append({})
        for one in self._variants:
            path = tuple(edit for edit in one.edits if edit[0] <= layer)
            if path not in self._states:
                here = [edit for at, edit in path if at == layer]
                below = before[tuple(edit for edit in path if edit[0] < layer)]
                self._states[path], last = self._run(layer, here, below)
                if self.kept is not None and last is not None and REMOVED not in here:
                    self.kept[layer][path] = last.keys, last.values
        self.layer += 1

    def final(self, of: Variant) -> list[Tensor]:
        """The final hidden states of every pass, once all layers are behind."""
        states = self._states[of.edits]
        return [self._layerwise.finish(state.load(), made) for state, made in zip(states, self._prepared, strict=True)]

    def _run(self, layer: int, here: Sequence[LayerEdit], states: Sequence[Kept]) -> tuple[list[Kept], Any]:
        """All passes through one layer, and the layer's slot of the last pass's cache.

        What later passes see of the first one is held no longer than that.
        """
        first: DynamicCache | None = None
        after: list[Kept] = []
        slot: Any = None
        for one, made, measuring, state in zip(self._passes, self._prepared, self._caches, states, strict=True):
            call = made.calls[layer]
            if self._empty is not None:
                if first is None:
                    mine = first = _with_own_slot(self._empty, layer)
                else:
                    mine = _with_own_slot(first, layer)
                    slot = mine.layers[layer]
                    slot.batch_select_indices(one.rows)
                slot = mine.layers[layer]
                call = call.replacing(measuring, mine)
            given = state.load()
            found = self._edited.run(self._layerwise, layer, here, given, call)
            after.append(state if found is given else self._store.keep(found))
        return after, slot


def _measuring_caches(empty: DynamicCache | None, passes: Sequence[Pass]) -> list[DynamicCache | None]:
    """For every pass a cache as long as the one it goes on from, from which the body works out masks and positions."""
    if empty is None:
        return [None] * len(passes)
    ids_BS, full = passes[0].ids_BS, copy.deepcopy(empty)
    for layer in range(len(full.layers)):
        nothing = torch.zeros(len(ids_BS), 1, ids_BS.shape[1], 1, device=ids_BS.device)
        full.update(nothing, nothing, layer)
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
        done = 0
        for number, hidden in _finals(edited, layerwise, decoder, layout, variants):
            done = len(settle(decoder, layout.locate(hidden), answers[number]))
        progress(done)
    return answers


def _finals(
    edited: Edited, layerwise: Layerwise | None, decoder: Decoder, layout: Layout, variants: Sequence[Variant]
) -> Iterator[tuple[int, list[Tensor]]]:
    """Index of every variant and its final hidden states of all passes."""
    if layerwise is None:
        for number, one in enumerate(variants):
            with edited.applied(one.edits):
                hidden = layout.hidden(decoder)
            yield number, hidden
        return
    # neighbours in this order share most
    order = sorted(range(len(variants)), key=lambda number: [layer for layer, _ in variants[number].edits])
    size = _group_size(edited.model, layout.passes)
    for start in range(0, len(order), size):
        group = order[start : start + size]
        states = States(edited, layerwise, decoder, layout.passes, [variants[number] for number in group])
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
            log.info("%s; every variant runs through the whole model", error)
            _told.add(model)
        return None


_told: WeakSet[PreTrainedModel] = WeakSet()
"""Models of which the log says already that they run as a whole."""


def _group_size(model: PreTrainedModel, passes: Sequence[Pass]) -> int:
    """How many variants' states of one layout may be held."""
    elements = sum(one.ids_BS.numel() for one in passes) * text_config(model.config).hidden_size
    return max(1, STATE_BYTES // (elements * model.dtype.itemsize))
