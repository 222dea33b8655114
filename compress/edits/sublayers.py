"""Where a decoder layer keeps its two halves, token mixing and MLP, and whether they can be silenced exactly.

Names only propose; what they propose is proven by running the model on a few tokens, every layer on the same input:

- both halves silenced: the layer must pass its input on, bit for bit;
- one half silenced: the other one must still change the stream, so neither holds a part of the other;
- the token mixing silenced: no token may still see another one, so nothing that mixes tokens was forgotten;
- every head's context scaled by a factor of its own: the slices of the output projection's input must follow, so that
  each slice is one head's.

B batch, S sequence, D hidden size, H query heads, d size of a head. The probes have B = 1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shoal.models.anatomy import decoder_layers, given_state, state_of, text_config, with_state
from shoal.models.families import family

SPECIAL_NAMES = {
    "norm_attn_norm": ("attention", "norm_attn_norm.attn"),  # DBRX
    "temporal_block": ("attention", "temporal_block"),  # RecurrentGemma
    "fc2": ("mlp", "fc2"),  # OPT, XGLM, BioGPT: an MLP without a module of its own
}
"""Child of a layer -> its half and the module whose output the layer adds to the residual."""
NO_HALF = ("norm", "ln_", "dropout", "cross", "hyper_connection", "_hc", "residual", "router")
MLP_WORDS = ("mlp", "ffn", "feed_forward", "moe", "expert")
ATTENTION_WORDS = ("attn", "attention", "mamba", "conv", "mixer")
"""All other children, by what their names contain; NO_HALF goes first, then the MLP."""
MLP_COMPANIONS = {"fc2": ("fc1",)}
OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "Wo")
"""Last part of the name of the map from all heads' contexts to the residual stream."""

OUTPUT_MAPS = {
    *(*OUTPUT_PROJECTIONS, "linear_out"),  # of attention and what stands in its place
    *("down_proj", "dense_4h_to_h", "fc2", "fc_out", "w2", "output_linear"),  # of MLPs and experts
}
"""Modules and parameters that write a half's result. What these names miss shows when the zeroed half is run."""
OUTPUT_BIASES = ("bias", "experts.bias")
"""Parameters of a half itself that are added to its result (JetMoE)."""

PROBE_LENGTH = 6
LAST_ID = 5
"""All probes end with this token; padding and the like have lower ids."""
FIRST_IDS = (6, 12)
SCALE_STEPS = 8
"""Heads are scaled by 2**-1 to 2**-8, which is exact, and again from 2**-1 on."""


@dataclass(frozen=True)
class Sublayers:
    """One decoder layer's halves; module names are relative to the layer."""

    attention: tuple[str, ...]
    """Token mixing: attention, or linear attention, a convolution or a state space in its place."""
    mlp: tuple[str, ...]
    """MLP or mixture of experts."""
    refusal: str = ""
    """Why halves cannot be silenced exactly here, with the remedy; empty = they can."""
    projection: str = ""
    """The attention's output projection; its input is the heads' contexts side by side."""
    num_heads: int = 0
    num_kv_heads: int = 0
    head_refusal: str = ""
    """Why single heads cannot be masked exactly here; empty = they can."""

    @property
    def mlp_holders(self) -> tuple[str, ...]:
        """All modules that belong to the MLP; for most families just ``mlp``."""
        return tuple(name for half in self.mlp for name in (*MLP_COMPANIONS.get(half, ()), half))


_known: WeakKeyDictionary[nn.Module, tuple[Any, tuple[Sublayers, ...]]] = WeakKeyDictionary()


def sublayers(model: PreTrainedModel) -> tuple[Sublayers, ...]:
    """The halves of every decoder layer, proven by four runs over a few tokens; kept for the next call on this model.

    Raises:
        UserError: an architecture whose decoder layers are not one list. What is wrong with a single layer stands in
            its ``refusal``: other layers may still be used.
    """
    layers = decoder_layers(model)
    state = (tuple(map(id, layers)), model.config._attn_implementation)
    known = _known.get(model)
    if known is None or known[0] != state:
        known = (state, _prove(model, [named_halves(layer) for layer in layers]))
        _known[model] = known
    return known[1]


def named_halves(layer: nn.Module) -> Sublayers:
    """The halves of a layer by the names of its children, unproven."""
    halves: dict[str, list[str]] = {"attention": [], "mlp": []}
    for name, child in layer.named_children():
        half, path = SPECIAL_NAMES.get(name, (_half(name), name))
        if half and isinstance(child, nn.ModuleList):
            halves[half] += [f"{path}.{index}" for index in range(len(child))]
        elif half:
            halves[half].append(path)
    return Sublayers(tuple(halves["attention"]), tuple(halves["mlp"]))


def output_parameters(layer: nn.Module, half: Literal["attention", "mlp"]) -> list[str]:
    """Names within the layer of the parameters that write the half's result, by their names alone."""
    names = []
    for path in getattr(named_halves(layer), half):
        for name, _ in layer.get_submodule(path).named_parameters():
            parts = {part.removesuffix("_bias") for part in (path.rpartition(".")[2], *name.split("."))}
            if parts & OUTPUT_MAPS or name in OUTPUT_BIASES:
                names.append(f"{path}.{name}")
    return names


def silence(module: nn.Module) -> RemovableHandle:
    """Let ``module`` run (and fill its cache) and then add nothing to the residual stream, until the handle is removed.

    Most modules return what is added; those that take the residual and add it themselves (Bloom, MPT) return it.
    """

    def add_nothing(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return with_state(output, silent_output(module, args, kwargs, output))

    return module.register_forward_hook(add_nothing, with_kwargs=True)


def silent_output(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
    """What ``module`` returns when it adds nothing to the residual stream, given what a forward hook gets."""
    signature = inspect.signature(module.forward)
    if "residual" in signature.parameters:  # it adds what it writes to the stream itself
        return signature.bind(*args, **kwargs).arguments["residual"]
    return torch.zeros_like(state_of(output))


def where(model: PreTrainedModel, layer: int) -> str:
    """How messages name a layer: its index and the architecture."""
    return f"layer {layer} of {text_config(model.config).model_type}"


@contextmanager
def probing(model: PreTrainedModel) -> Iterator[None]:
    """No gradients, no dropout, and the mode restored afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def probe_ids(model: PreTrainedModel, *, first: int = FIRST_IDS[0]) -> Tensor:
    """(1, S) token ids: ``first`` and its successors, then LAST_ID."""
    ids = torch.tensor([[*range(first, first + PROBE_LENGTH - 1), LAST_ID]], device=model.device)
    return ids % text_config(model.config).vocab_size


def _half(name: str) -> str:
    if any(word in name for word in NO_HALF):
        return ""
    for half, words in (("mlp", MLP_WORDS), ("attention", ATTENTION_WORDS)):
        if any(word in name for word in words):
            return half
    return ""


@dataclass
class _Trace:
    """What one run showed, by layer."""

    input_BSD: Tensor | None = None
    """State that the first layer gets; every other one gets the same."""
    returned_BSD: dict[int, Tensor] = field(default_factory=dict)
    """State that each layer returns."""
    adding: set[int] = field(default_factory=set)
    """Layers of which a half that is not silenced adds something."""
    contexts: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """Input (B, S, H * d) of each map that may be the heads' output projection, by the map's name."""
    num_heads: dict[int, int] = field(default_factory=dict)
    """Query heads."""

    def unchanged(self, index: int) -> bool:
        """Whether the layer passed its input on."""
        assert self.input_BSD is not None
        return torch.equal(self.input_BSD, self.returned_BSD[index])


class _HeadProbe(TorchFunctionMode):
    """Sees every softmax attention of four dimensions (B, H, S, .), whichever module computes it, and may scale what
    each head attends to by the head's own factor."""

    def __init__(self, trace: _Trace, *, scale: bool) -> None:
        super().__init__()
        self.trace, self.scale = trace, scale
        self.layer = -1
        """The layer whose token mixing runs; -1 = none does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if self.layer < 0 or name not in ("softmax", "scaled_dot_product_attention") or result.dim() != 4:
            return result
        # eager attention shows its weights (B, H, S, S), the fused call the contexts (B, H, S, d): scaling either
        # scales what the head hands on
        self.trace.num_heads[self.layer] = result.shape[1]
        return result * _scale(result.shape[1], result)[:, None, None] if self.scale else result


def _scale(num_heads: int, like: Tensor) -> Tensor:
    """(H,) The heads' factors."""
    return 0.5 ** (1 + torch.arange(num_heads, device=like.device) % SCALE_STEPS).to(like.dtype)


def _prove(model: PreTrainedModel, named: list[Sublayers]) -> tuple[Sublayers, ...]:
    """``named`` with what four runs show: whether the halves can be silenced, and where the heads are."""
    with probing(model):
        silent = _run(model, named, silenced=lambda halves: (*halves.attention, *halves.mlp))
        scaled = _run(model, named, silenced=lambda halves: halves.mlp, scale=True)
        # two inputs that end with the same token: without token mixing its state must be the same
        unmixed, unmixed_too = (
            _run(model, named, silenced=lambda halves: halves.attention, first=first) for first in FIRST_IDS
        )
    proven = []
    for index, halves in enumerate(named):
        refusal = _refusal(model, index, halves, silent, scaled, unmixed)
        refusal = refusal or _mixing(model, index, unmixed, unmixed_too)
        proven.append(replace(halves, refusal=refusal, **_heads(model, index, halves, silent, scaled)))
    return tuple(proven)


def _run(
    model: PreTrainedModel,
    named: list[Sublayers],
    *,
    silenced: Callable[[Sublayers], tuple[str, ...]],
    first: int = FIRST_IDS[0],
    scale: bool = False,
) -> _Trace:
    """What the layers do on one probe with the modules ``silenced`` names of each adding nothing."""
    trace = _Trace()
    probe = _HeadProbe(trace, scale=scale)
    with ExitStack() as stack:
        for index, (layer, halves) in enumerate(zip(decoder_layers(model), named, strict=True)):
            silent = silenced(halves)
            for name in silent:
                stack.enter_context(silence(layer.get_submodule(name)))
            heard = [name for name in (*halves.attention, *halves.mlp) if name not in silent]
            for handle in _watch(index, layer, halves, heard, trace, probe):
                stack.enter_context(handle)
        stack.enter_context(probe)
        model(input_ids=probe_ids(model, first=first), use_cache=False)
    return trace


def _watch(
    index: int, layer: nn.Module, halves: Sublayers, heard: Sequence[str], trace: _Trace, probe: _HeadProbe
) -> Iterator[RemovableHandle]:
    """Hooks on one layer that write into ``trace``: its input and output, whether its halves ``heard`` add something,
    and what its output projection may be reading.

    States are copied, because some layers write into their input.
    """

    def give_first_input(_: nn.Module, args: Any, kwargs: Any) -> Any:
        # every layer gets the first one's input, so that what one layer does wrong does not show in others
        input_BSD = trace.input_BSD if trace.input_BSD is not None else given_state(args, kwargs)
        trace.input_BSD, hidden_BSD = input_BSD.clone(), input_BSD.clone()
        return ((hidden_BSD, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden_BSD})

    def keep_output(_: nn.Module, args: Any, output: Any) -> None:
        trace.returned_BSD[index] = state_of(output).clone()

    def hear(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not torch.equal(state_of(output), silent_output(module, args, kwargs, output)):
            trace.adding.add(index)

    def keep_contexts(name: str, _: nn.Module, args: Any) -> None:
        trace.contexts.setdefault(index, {})[name] = args[0].clone()

    def enter(*_: Any) -> None:
        probe.layer = index

    def leave(*_: Any) -> None:
        probe.layer = -1

    # prepended: masks and skips that are in force from outside would otherwise hide the layer's own states
    yield layer.register_forward_pre_hook(give_first_input, with_kwargs=True, prepend=True)
    yield layer.register_forward_hook(keep_output, prepend=True)
    for name in heard:
        # appended: what is asked is whether the half adds something with all that is in force
        yield layer.get_submodule(name).register_forward_hook(hear, with_kwargs=True)
    for path in halves.attention:
        attention = layer.get_submodule(path)
        yield attention.register_forward_pre_hook(enter)
        yield attention.register_forward_hook(leave)
        for name, module in attention.named_modules():
            # linear maps that by their names may read the heads' contexts
            if name.rpartition(".")[2] in OUTPUT_PROJECTIONS and isinstance(module, nn.Linear | Conv1D):
                yield module.register_forward_pre_hook(partial(keep_contexts, f"{path}.{name}"), prepend=True)


def _refusal(
    model: PreTrainedModel, index: int, halves: Sublayers, silent: _Trace, no_mlp: _Trace, no_attention: _Trace
) -> str:
    """Why the halves that the names propose are not all that the layer does; empty if they are."""
    place = where(model, index)
    if not halves.attention and not halves.mlp:
        return f"{place}: shoal does not know where this architecture keeps attention and MLP; drop whole layers"
    if not halves.attention or not halves.mlp:
        only = (halves.attention or halves.mlp)[0]
        return f"{place}: has only one sublayer ({only}), so silencing it drops the layer; name the layer in prune.drop"
    if family(text_config(model.config).model_type).changed_residual:
        return ""
    # in all other families a layer that changes its input then has something that shoal does not know
    if not silent.unchanged(index):
        return (
            f"{place}: changes its input even with {', '.join(halves.attention + halves.mlp)} silenced (a bias after "
            "them, or a part that shoal does not know), so a half cannot be removed exactly; drop whole layers"
        )
    for half, other, trace in (("MLP", "attention", no_mlp), ("attention", "MLP", no_attention)):
        if index in trace.adding and trace.unchanged(index):
            return (
                f"{place}: the module that shoal takes for its {half} holds a part of its {other}, so a half cannot "
                "be removed exactly; drop whole layers"
            )
    return ""


def _mixing(model: PreTrainedModel, index: int, first: _Trace, second: _Trace) -> str:
    """Why silencing the attention is not enough: the last token's state depends on the other tokens."""
    assert first.input_BSD is not None
    assert second.input_BSD is not None
    tolerance = 32 * torch.finfo(first.input_BSD.dtype).eps  # experts work on groups of tokens: equal up to rounding
    before = _distance(first.input_BSD, second.input_BSD)
    if before <= tolerance < _distance(first.returned_BSD[index], second.returned_BSD[index]):
        return (
            f"{where(model, index)}: mixes tokens outside of the module that shoal takes for its attention, so a "
            "half cannot be removed exactly; drop whole layers"
        )
    return ""


def _distance(first: Tensor, second: Tensor) -> float:
    """Largest difference of the last token's states (B, S, ...), relative to the largest number in the first."""
    last_first, last_second = first[:, -1].float(), second[:, -1].float()
    return float((last_first - last_second).abs().max() / last_first.abs().max().clamp_min(1e-30))


def _heads(model: PreTrainedModel, index: int, halves: Sublayers, silent: _Trace, scaled: _Trace) -> dict[str, Any]:
    """The fields of Sublayers about single heads."""
    layer, place = decoder_layers(model)[index], where(model, index)
    num_heads, contexts = silent.num_heads.get(index, 0), silent.contexts.get(index, {})
    if not num_heads:
        how = "attn_implementation: sdpa or eager show them"
        return {"head_refusal": f"{place}: the heads of softmax attention are not visible ({how})"}
    if not contexts:
        return {"head_refusal": f"{place}: has no linear output projection over its heads that shoal knows"}
    followed = [name for name in contexts if _followed(contexts[name], scaled.contexts[index][name], num_heads)]
    if len(followed) != 1:
        return {"head_refusal": f"{place}: mixes its heads before the output projection, so none can be masked alone"}
    num_kv_heads = _num_kv_heads(model, layer.get_submodule(halves.attention[0]), num_heads)
    return {"projection": followed[0], "num_heads": num_heads, "num_kv_heads": num_kv_heads}


def _followed(context: Tensor, changed: Tensor, num_heads: int) -> bool:
    """Whether ``changed`` is ``context`` (both B, S, H * d) with every head's slice scaled as its head was."""
    if context.dim() != 3 or context.shape[-1] % num_heads:
        return False
    context_BSHd, changed_BSHd = (state.unflatten(-1, (num_heads, -1)) for state in (context, changed))
    expected_BSHd = context_BSHd * _scale(num_heads, context)[:, None]
    # a wrong slice is off by a factor of two; what is left are numbers too small for their format
    return torch.allclose(changed_BSHd, expected_BSHd, rtol=0.1, atol=torch.finfo(context.dtype).tiny)


def _num_kv_heads(model: PreTrainedModel, attention: nn.Module, num_heads: int) -> int:
    """By the model's own word."""
    for name in ("num_kv_heads", "num_key_value_heads", "kv_heads"):
        if told := getattr(attention, name, None):
            return told
    if groups := getattr(attention, "num_key_value_groups", None):
        return num_heads // groups
    return getattr(text_config(model.config), "num_key_value_heads", None) or num_heads
