"""How attention, MLP and whole layers write to the residual stream: directions and sizes, in one pass.

What a half writes is taken as it arrives in the stream, behind any norm or multiplier of its own. It is the difference
of the stream before and after it, so the stream between the two halves must be seen. Where a module reads it (the norm
before the MLP), a hook there costs nothing; where none does, because both halves read the layer's input at the same
time, the layer runs a second time with its MLP silenced.

B batch, S sequence, D hidden, L layers, T = B * S tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shoal.compress.edits.sublayers import Sublayers, probing, silence, sublayers, where
from shoal.models.anatomy import called_on, decoder_layers, given_state, state_of, text_config, watched, with_state
from shoal.models.families import family

from .runs import TokenBatch, probe_batch, run_body

MIN_NORM = 1e-6
"""Norms below count as this much where something is divided by them."""


@dataclass(frozen=True)
class LayerFlow:
    """Where one layer's stream can be seen between its halves."""

    parallel: bool
    """Attention and MLP both read the layer's input."""
    reader: str
    """Name of a module in the layer that reads the stream between the halves; empty = none does."""
    halves: Sublayers


@dataclass
class ResidualSums:
    """Sums over real tokens, float64 on the CPU."""

    num_tokens: int = 0
    cosines: dict[str, Tensor] = field(default_factory=dict)
    """Half or `layer` -> sums (L,) of the cosine of what it writes with what it has read."""
    sizes: dict[str, Tensor] = field(default_factory=dict)
    """Half or `layer` -> sums (L,) of the norm of what it writes, relative to what it has read."""
    states_LD: Tensor | None = None
    """Sums of the states before every layer."""

    @property
    def state_means(self) -> Tensor:
        """(L, D) The mean state before every layer, which an erased state becomes."""
        assert self.states_LD is not None
        return self.states_LD / self.num_tokens

    def mean(self, sums: dict[str, Tensor]) -> dict[str, tuple[float, ...]]:
        """Token means by half, one per layer."""
        return {name: tuple((total / self.num_tokens).tolist()) for name, total in sums.items()}


def layer_flows(model: PreTrainedModel) -> tuple[tuple[LayerFlow, ...], str]:
    """Every layer's flow, or none and the reason why this model's layers cannot be told apart into halves."""
    halves, model_type = sublayers(model), text_config(model.config).model_type
    if refusal := next((layer_halves.refusal for layer_halves in halves if layer_halves.refusal), ""):
        return (), refusal
    if reason := family(model_type).changed_residual:
        return (), f"{model_type}: {reason}, so that a layer's update is not the sum of its halves"
    flows: list[LayerFlow | None] = [None] * len(halves)

    def after(index: int, args: Any, kwargs: Any, _: Any) -> None:
        flows[index] = _flow(decoder_layers(model)[index], halves[index], args, kwargs)

    with probing(model), watched(decoder_layers(model), after=after):
        run_body(model, probe_batch(model))
    known_flows = [flow for flow in flows if flow is not None]
    if len(known_flows) < len(halves):
        return (), f"{where(model, flows.index(None))}: its MLP comes before its attention"
    return tuple(known_flows), ""


def _flow(layer: nn.Module, halves: Sublayers, args: Any, kwargs: Any) -> LayerFlow | None:
    """None where the attention depends on the MLP. Noise in place of a half's output shows who reads it."""

    def inputs_with_noise(noisy: tuple[str, ...], silent: tuple[str, ...]) -> tuple[dict[str, Tensor], Tensor]:
        seen: dict[str, Tensor] = {}

        def remember(name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
            if tensors := _read(args, kwargs):
                seen.setdefault(name, tensors[0].clone())

        with ExitStack() as stack:
            for name in noisy:
                stack.enter_context(layer.get_submodule(name).register_forward_hook(_add_noise))
            for name in silent:
                stack.enter_context(silence(layer.get_submodule(name)))
            for name, module in layer.named_modules():
                if name:
                    hook = partial(remember, name)
                    stack.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))
            positional = [value.clone() if isinstance(value, Tensor) else value for value in args]
            named = {key: value.clone() if isinstance(value, Tensor) else value for key, value in kwargs.items()}
            output = state_of(layer.forward(*positional, **named)).clone()
        return seen, output

    # with the MLP silent a layer returns the stream between its halves; whose input equals that reads it there
    plain, _ = inputs_with_noise((), halves.mlp)
    noisy_attention, between = inputs_with_noise(halves.attention, halves.mlp)
    noisy_mlp, _ = inputs_with_noise(halves.mlp, ())
    if any(not _same(plain, noisy_mlp, name) for name in halves.attention):
        return None
    parallel = all(_same(plain, noisy_attention, name) for name in halves.mlp_holders)
    readers = [name for name, state in noisy_attention.items() if torch.equal(state, between)]
    return LayerFlow(parallel, readers[0] if readers else "", halves)


def _add_noise(_: nn.Module, args: Any, output: Any) -> Any:
    state = state_of(output)
    noise = torch.randn(state.shape, generator=torch.Generator().manual_seed(0)).to(state)
    changed = state + noise * state.abs().max().clamp_min(1.0)
    return with_state(output, changed)


def _read(args: Any, kwargs: Any) -> list[Tensor]:
    return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]


def _same(first: dict[str, Tensor], second: dict[str, Tensor], name: str) -> bool:
    if (name in first) != (name in second):
        return False
    return name not in first or torch.equal(first[name], second[name])


@contextmanager
def add_batch(
    model: PreTrainedModel, flows: tuple[LayerFlow, ...], batch: TokenBatch, sums: ResidualSums
) -> Iterator[None]:
    """Add to ``sums`` what one forward of the model over ``batch``, inside the block, writes to the stream."""
    layers, real_T = decoder_layers(model), batch.real_BS.flatten()
    measured: dict[str, list[Tensor]] = {}  # half or layer -> (2, T) of every layer, on the model's device till the end
    state_sums: list[Tensor] = []
    before: dict[int, Tensor] = {}  # layer -> the stream (T, D) before it
    between: dict[int, Tensor] = {}  # layer -> the stream (T, D) between its halves
    real_T1 = real_T.to(model.device)[:, None]

    def enter(index: int, args: Any, kwargs: Any) -> None:
        before[index] = given_state(args, kwargs).flatten(0, 1).clone()  # some layers write into their input

    def pass_between(number: int, args: Any, kwargs: Any) -> None:
        between[with_reader[number]] = _read(args, kwargs)[0].flatten(0, 1).clone()

    def leave(index: int, args: Any, kwargs: Any, output: Any) -> None:
        before_TD, after_TD = before.pop(index), state_of(output).flatten(0, 1)
        if flows and not flows[index].reader:
            between[index] = _without_mlp(layers[index], flows[index], before_TD, args, kwargs)
        parallel = bool(flows) and flows[index].parallel
        for name, values in _layer_terms(before_TD, between.pop(index, None), after_TD, parallel):
            measured.setdefault(name, []).append(values)
        # where, not a product: padding may not be finite
        state_sums.append(torch.where(real_T1, before_TD, 0).sum(0, dtype=torch.float64).cpu())

    with_reader = [index for index, flow in enumerate(flows) if flow.reader]
    readers = [layers[index].get_submodule(flows[index].reader) for index in with_reader]
    with watched(layers, before=enter, after=leave), watched(readers, before=pass_between):
        yield
    for name, parts in measured.items():
        cosine_L, size_L = torch.stack(parts).cpu().double()[..., real_T].sum(-1).unbind(1)
        sums.cosines[name] = sums.cosines[name] + cosine_L if name in sums.cosines else cosine_L
        sums.sizes[name] = sums.sizes[name] + size_L if name in sums.sizes else size_L
    states_LD = torch.stack(state_sums)
    sums.states_LD = states_LD if sums.states_LD is None else sums.states_LD + states_LD
    sums.num_tokens += int(real_T.sum())


def _without_mlp(layer: nn.Module, flow: LayerFlow, given_TD: Tensor, args: Any, kwargs: Any) -> Tensor:
    state = given_state(args, kwargs)
    again = given_TD.reshape(state.shape).clone()  # the layer may have written into its input
    with ExitStack() as stack:
        for name in flow.halves.mlp:
            stack.enter_context(silence(layer.get_submodule(name)))
        output = called_on(layer.forward, args, kwargs, again)
    return state_of(output).flatten(0, 1)


def _layer_terms(
    before_TD: Tensor, between_TD: Tensor | None, after_TD: Tensor, parallel: bool
) -> Iterator[tuple[str, Tensor]]:
    """(2, T) cosine and relative size of the layer's update, and of its halves' where the stream between is known."""
    yield "layer", _update(before_TD, before_TD, after_TD)
    if between_TD is not None:
        yield "attention", _update(before_TD, before_TD, between_TD)
        yield "mlp", _update(before_TD if parallel else between_TD, between_TD, after_TD)


def _update(reads_TD: Tensor, before_TD: Tensor, after_TD: Tensor) -> Tensor:
    """(2, T) cosine and relative size of what was written, against what its writer has read, in float32."""
    reads, written = reads_TD.float(), after_TD.float() - before_TD.float()
    read_norm, written_norm = (state.norm(dim=-1) for state in (reads, written))
    scale = read_norm.clamp_min(MIN_NORM) * written_norm.clamp_min(MIN_NORM)
    return torch.stack([torch.linalg.vecdot(reads, written) / scale, written_norm / read_norm.clamp_min(MIN_NORM)])
