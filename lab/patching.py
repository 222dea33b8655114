"""Through which states an answer reaches the last token: patching.json.

Activation patching as in arXiv:2504.07898: states of the clean run are put into a corrupted one, one part at a time. Of
two prompts of one length with different answers, LD = logit(clean answer) - logit(corrupted answer) at the last token;
the effect of a part is (LD patched - LD corrupted) / (LD clean - LD corrupted), numerator and denominator summed over
the counterparts. 1 = the part carries all of the difference, 0 = none.

Below the patched layer the run is the corrupted one: that is not computed again.

S sequence, D hidden, R rows (one for every part that is put in), H query heads, d size of a head. Runs of both
counterparts have them side by side: the clean one first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shoal.artifacts.artifact import Artifact, Provenance
from shoal.compress.edits.layer_edits import with_halves
from shoal.compress.edits.sublayers import Sublayers, probing, silent_output
from shoal.compress.variants.layerwise import Layerwise
from shoal.errors import UserError
from shoal.inference.decoder import Decoder
from shoal.launch.verbs.run import Run
from shoal.models.anatomy import given_state, state_of, watched, with_state
from shoal.progress import each

from .attention.prompts import Corruption, Counterparts, look_up_pairs
from .part import identity, made, model_of, told
from .settings import Patching as Settings

SITES = {"residual": "the layer's input", "attention": "the attention's output", "mlp": "the MLP's output"}
Part = tuple[str, int]
"""A site (residual: what enters the layer; attention, mlp: what they write; head: its context) and a head, else 0."""
GROUPS = ("needle", "question", "last", "all")
"""Groups of places: what is corrupted in the data, with its value; what stands behind the data, without the last token;
the last token; everything from the first token on that differs."""


@dataclass(frozen=True)
class Patched:
    """What a part of a layer brings back of the clean run, at one group of places."""

    counterpart: Corruption
    site: str
    """residual (what enters the layer), attention, mlp (what they write) or head (its context)."""
    group: str
    """One of GROUPS."""
    effects: tuple[tuple[float, ...], ...]
    """1 = all of the difference between the counterparts, 0 = none; one number a layer but for heads."""


@dataclass(frozen=True)
class Patching(Artifact):
    """patching.json: what every part of every layer brings back of the clean run."""

    FILE: ClassVar[str] = "patching.json"

    num_layers: int
    num_counterparts: dict[Corruption, int]
    """Pairs of prompts that the model answers right both ways, on which ``patched`` is measured."""
    patched: tuple[Patched, ...]

    def in_words(self) -> str:
        """The head and the attention that bring back the most of every kind of counterpart."""
        lines = []
        for patched in self.patched:
            if patched.group == "all" and patched.site in ("head", "attention"):
                rows = enumerate(patched.effects)
                effect, layer, head = max((one, layer, head) for layer, row in rows for head, one in enumerate(row))
                place = f"head {layer}.{head}" if patched.site == "head" else f"the attention of layer {layer}"
                lines.append(f"of another {patched.counterpart} {place} brings back the most ({effect:.2f})")
        return "\n".join(lines)


def work(run: Run, settings: Settings) -> str:
    """What brings back the answer, in words."""

    def patched(provenance: Provenance) -> Patching:
        counterparts = look_up_pairs(settings.counterparts, run.tokenizer(), seed=run.recipe.seed)
        return Patching(provenance, run.num_layers, *patch_effects(model_of(run), counterparts))

    return told(run, made(run, Patching, identity(run, settings), patched))


@dataclass
class _Runs:
    """Both intact runs of one pair of counterparts."""

    states: list[Tensor] = field(default_factory=list)
    """(2, S, D) What enters each layer."""
    written: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """(2, S, D) What a module adds to the stream, by layer and the module's name within it."""
    contexts: dict[int, Tensor] = field(default_factory=dict)
    """(2, S, H * d) What each layer's output projection reads."""
    differences: tuple[float, float] = (0.0, 0.0)
    """LD of the clean and of the corrupted run."""
    is_right: bool = False
    """Whether the model gives both prompts their answers."""


def patch_effects(
    model: PreTrainedModel, pairs_by_kind: Mapping[Corruption, Sequence[Counterparts]]
) -> tuple[dict[Corruption, int], tuple[Patched, ...]]:
    """How many pairs the model answers right both ways, and over these the effect of every part and group of places.

    A kind of pairs of which none is answered right has no effects.

    Raises:
        UserError: layers that cannot be run alone or whose halves are not known, or no pairs that are answered right.
    """
    patcher = Patcher(model)
    num_used: dict[Corruption, int] = {}
    patched: list[Patched] = []
    with probing(model):
        for kind, pairs in pairs_by_kind.items():
            num_used[kind], effects = _effects(patcher, kind, pairs)
            patched += effects
    if not patched:
        raise UserError(
            f"shoal lab patching: the model answers none of {sum(map(len, pairs_by_kind.values()))} pairs right both "
            "ways, so nothing can be brought back"
        )
    return num_used, tuple(patched)


def _effects(patcher: Patcher, kind: Corruption, pairs: Sequence[Counterparts]) -> tuple[int, list[Patched]]:
    gained: dict[tuple[str, str], list[list[float]]] = {}
    num_used, gap = 0, 0.0
    for pair in each(pairs, f"patching: {kind}", unit="pairs"):
        runs = patcher.intact(pair)
        if not runs.is_right:
            continue
        num_used += 1
        clean, corrupted = runs.differences
        gap += clean - corrupted
        for (group, places), layer in itertools.product(pair.groups.items(), range(patcher.num_layers)):
            parts = patcher.parts(layer)
            changes = patcher.differences(runs, pair, layer, parts, places)
            for (site, index), difference in zip(parts, changes, strict=True):
                rows = gained.setdefault((site, group), patcher.zeros(site))
                rows[layer][index] += difference - corrupted
    return num_used, [
        Patched(kind, site, group, tuple(tuple(value / gap for value in row) for row in rows))
        for (site, group), rows in gained.items()
    ]


class Patcher:
    """One model's clean, corrupted and patched runs."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._layerwise, self._decoder = Layerwise(model), Decoder(model)
        self.num_layers = self._layerwise.num_layers
        self._halves: list[Sublayers] = [with_halves(model, layer) for layer in range(self.num_layers)]

    def parts(self, layer: int) -> list[Part]:
        """What of ``layer`` can be put in; heads where they can be told apart."""
        heads = range(self._halves[layer].num_heads)
        return [("residual", 0), ("attention", 0), ("mlp", 0), *(("head", head) for head in heads)]

    def zeros(self, site: str) -> list[list[float]]:
        """One number for every layer and what of it can be put in at ``site``."""
        counts = [sum(own == site for own, _ in self.parts(layer)) for layer in range(self.num_layers)]
        return [[0.0] * count for count in counts]

    def intact(self, counterparts: Counterparts) -> _Runs:
        """Both runs, with what can be taken from them."""
        runs = _Runs()
        ids_2S = torch.tensor([counterparts.clean_ids, counterparts.corrupted_ids], device=self._decoder.device)

        def enter(_: int, args: Any, kwargs: Any) -> None:
            runs.states.append(given_state(args, kwargs).clone())

        def wrote(layer: int, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            state_2SD = state_of(output) - silent_output(module, args, kwargs, output)
            runs.written[layer, name] = state_2SD.reshape(*ids_2S.shape, -1)

        def read(layer: int, _: nn.Module, args: Any) -> None:
            runs.contexts[layer] = args[0].clone()

        with ExitStack() as stack:
            stack.enter_context(watched(self._layerwise.layers, before=enter))
            for layer, halves in enumerate(self._halves):
                module = self._layerwise.layers[layer]
                for name in (*halves.attention, *halves.mlp):
                    hook = partial(wrote, layer, name)
                    stack.enter_context(module.get_submodule(name).register_forward_hook(hook, with_kwargs=True))
                if halves.projection:
                    projection = module.get_submodule(halves.projection)
                    stack.enter_context(projection.register_forward_pre_hook(partial(read, layer)))
            hidden_2SD = self._decoder.hidden(ids_2S)
        logits_2V = self._decoder.logits(hidden_2SD[:, -1])
        clean, corrupted = self._differences(logits_2V, counterparts)
        runs.differences = (clean, corrupted)
        runs.is_right = logits_2V.argmax(-1).tolist() == [counterparts.right, counterparts.wrong]
        return runs

    def differences(
        self, runs: _Runs, counterparts: Counterparts, layer: int, parts: Sequence[Part], places: Sequence[int]
    ) -> list[float]:
        """LD of the corrupted run with each of ``parts`` of ``layer`` as it is in the clean one, at ``places``."""
        ids_RS = torch.tensor([counterparts.corrupted_ids] * len(parts), device=self._decoder.device)
        prepared = self._layerwise.prepare(self._decoder.arguments(ids_RS))
        places_P = torch.tensor(places, dtype=torch.long, device=ids_RS.device)
        state_RSD = runs.states[layer][1:].repeat(len(parts), 1, 1)
        for row, (site, _) in enumerate(parts):
            if site == "residual":
                state_RSD[row, places_P] = runs.states[layer][0, places_P]
        with ExitStack() as stack:
            for hook in self._hooks(runs, layer, parts, places_P):
                stack.enter_context(hook)
            state_RSD = self._layerwise.run(layer, state_RSD, prepared.calls[layer])
        for above in range(layer + 1, self.num_layers):
            state_RSD = self._layerwise.run(above, state_RSD, prepared.calls[above])
        hidden_RSD = self._layerwise.finish(state_RSD, prepared)
        return self._differences(self._decoder.logits(hidden_RSD[:, -1]), counterparts)

    def _hooks(self, runs: _Runs, layer: int, parts: Sequence[Part], places_P: Tensor) -> Iterator[Any]:
        """What puts halves and heads of the clean run into their rows while ``layer`` runs."""
        halves, module = self._halves[layer], self._layerwise.layers[layer]

        def write(rows: Sequence[int], name: str, half: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            clean_SD = runs.written[layer, name][0]
            silent_RSD = silent_output(half, args, kwargs, output).reshape(len(parts), *clean_SD.shape)
            changed_RSD = state_of(output).clone().reshape(silent_RSD.shape)
            for row in rows:
                changed_RSD[row, places_P] = silent_RSD[row, places_P] + clean_SD[places_P]
            return with_state(output, changed_RSD.reshape(state_of(output).shape))

        def read(heads: Sequence[tuple[int, int]], _: nn.Module, args: Any) -> Any:
            context_RSHd = args[0].clone().unflatten(-1, (halves.num_heads, -1))
            clean_SHd = runs.contexts[layer][0].unflatten(-1, (halves.num_heads, -1))
            for row, head in heads:
                context_RSHd[row, places_P, head] = clean_SHd[places_P, head]
            return (context_RSHd.flatten(-2), *args[1:])

        for site, names in (("attention", halves.attention), ("mlp", halves.mlp)):
            rows = [row for row, (own, _) in enumerate(parts) if own == site]
            for name in names if rows else ():
                hook = partial(write, rows, name)
                yield module.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
        if heads := [(row, head) for row, (site, head) in enumerate(parts) if site == "head"]:
            yield module.get_submodule(halves.projection).register_forward_pre_hook(partial(read, heads))

    @staticmethod
    def _differences(logits_RV: Tensor, counterparts: Counterparts) -> list[float]:
        return (logits_RV[:, counterparts.right] - logits_RV[:, counterparts.wrong]).double().tolist()
