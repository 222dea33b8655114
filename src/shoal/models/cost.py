"""What a model costs to keep and to run, told from its configuration alone: no weight is loaded.

The model is built without data, and a few tokens without data run through it. Shapes of parameters and of the cache
come out as they would with data, so that they are transformers' own and not a table's. What running takes is a stated
expectation: see decode_bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, cache_utils

from shoal.errors import UserError
from shoal.models.anatomy import anatomy, text_config
from shoal.models.load import num_parameters

PROBE_TOKENS = (2, 3)
"""Lengths of two inputs whose caches are compared: what has grown grows with every token."""


@dataclass(frozen=True)
class LayerCache:
    """Content of one slot of the cache for one sequence."""

    token_bytes: int
    """Bytes for every token: keys and values, or the latent in their place that transformers and vLLM keep of
    multi-head latent attention; with it the keys of an indexer."""
    max_tokens: int | None
    """Tokens that are kept at most, where a window bounds them."""
    state_bytes: int
    """Bytes whatever the length: states of convolutions, linear attention and state spaces."""

    def num_bytes(self, num_tokens: int) -> int:
        """Bytes for one sequence of ``num_tokens``."""
        return self.state_bytes + self.token_bytes * min(num_tokens, self.max_tokens or num_tokens)


@dataclass(frozen=True)
class Cost:
    """One model's size. Counts are exact."""

    num_layers: int
    num_parameters: int
    """Parameters, tied ones counted once."""
    active_parameters: int
    """Parameters read to write one token of text: of routed experts those that a token is sent to, of embeddings
    nothing (single rows), weights that several layers share once per layer, and the head."""
    cache: tuple[LayerCache, ...] | None
    """Cache by slot; None where transformers cannot run this family without data, or keeps another kind of cache."""

    def cache_bytes(self, num_tokens: int) -> int:
        """Bytes that the cache of one sequence of ``num_tokens`` takes."""
        assert self.cache is not None
        return sum(slot.num_bytes(num_tokens) for slot in self.cache)


def model_cost(model: PreTrainedModel) -> Cost:
    """The cost of ``model``, which without_data made and which cannot be run afterwards.

    Raises:
        UserError: layers that are not one list, or a mixture of experts of which it is not known how many a token is
            sent to.
    """
    parts = anatomy(model)
    # the module that holds the list of layers, and what comes before and after it but the head
    decoder = model.get_submodule(parts.layers_name.rpartition(".")[0])
    return Cost(
        num_layers=text_config(model.config).num_hidden_layers,
        num_parameters=num_parameters(model),
        active_parameters=active_weights(model),
        cache=_cache(decoder),
    )


def active_weights(model: PreTrainedModel) -> int:
    """Parameters of ``model``, the head's among them, that are read to write one token.

    Raises:
        UserError: as model_cost.
    """
    parts = anatomy(model)
    decoder = model.get_submodule(parts.layers_name.rpartition(".")[0])
    return active_parameters(decoder) + (num_parameters(parts.head) if parts.head is not None else 0)


def decode_bytes(cost: Cost, *, bytes_per_parameter: float, num_tokens: int, batch_size: int = 1) -> float:
    """Bytes read from memory to write one token of each of ``batch_size`` sequences, after ``num_tokens`` others.

    With few sequences every weight is used a few times per step only, so that reading them, and the cache, is what
    takes the time.
    """
    cache = cost.cache_bytes(num_tokens) if cost.cache else 0
    return cost.active_parameters * bytes_per_parameter + batch_size * cache


def active_parameters(decoder: nn.Module) -> int:
    """Parameters of a layer, or of all and what is around them but the head, that are read to write one token."""
    # by module and with repetition: what several layers share is read by each of them
    modules = dict(decoder.named_modules(remove_duplicate=False))
    return sum(
        parameter.numel()
        if experts is None or parameter.dim() < 2  # one tensor holds all routed experts, one after the other
        else parameter.numel() // (experts[1] or parameter.shape[0]) * experts[0]
        for name, module in modules.items()
        if not isinstance(module, nn.Embedding)
        for experts in [_enclosing_experts(name, modules)]
        for parameter in module.parameters(recurse=False)
    )


def _enclosing_experts(name: str, modules: dict[str, nn.Module]) -> tuple[int, int | None] | None:
    """(experts per token, experts) of the mixture that the module ``name`` belongs to, None outside of one.

    Transformers 5 keeps a mixture's routed experts in one module called `experts`, beside a router that knows top_k.
    """
    parts = name.split(".")
    if "experts" not in parts:
        return None
    depth = parts.index("experts")
    experts, block = modules[".".join(parts[: depth + 1])], modules[".".join(parts[:depth])]
    for module in (block, *block.children()):
        if isinstance(top_k := getattr(module, "top_k", None), int):
            return top_k, getattr(experts, "num_experts", None)
    raise UserError(
        f"{name}: the number of experts per token is unknown, so shoal cannot estimate the cost of this model; run "
        "without --dry-run, or set eval.speed: false"
    )


def _cache(decoder: nn.Module) -> tuple[LayerCache, ...] | None:
    for name, module in decoder.named_modules():
        if name.rpartition(".")[2] == "experts":
            module.forward = lambda hidden_states, *_, **__: hidden_states  # routing reads numbers, and there are none
    short, long = PROBE_TOKENS
    try:
        before, after = (_slots(decoder, num_tokens) for num_tokens in PROBE_TOKENS)
    except (RuntimeError, ValueError):  # an operation that reads numbers, or shapes that are made by numbers
        return None
    if before is None or after is None:
        return None
    layer_caches = []
    for old, new in zip(before, after, strict=True):
        # what a longer input adds grows with every token; the rest is there whatever the length
        token_bytes = (_num_bytes(new) - _num_bytes(old)) // (long - short)
        window = getattr(new, "sliding_window", None)
        layer_caches.append(
            LayerCache(
                token_bytes=token_bytes,
                max_tokens=window - 1 if window else None,  # what is kept between two tokens
                state_bytes=_num_bytes(old) - short * token_bytes,
            )
        )
    return tuple(layer_caches)


@torch.no_grad()
def _slots(decoder: nn.Module, num_tokens: int) -> list[Any] | None:
    with torch.device("meta"):
        input_ids = torch.zeros(1, num_tokens, dtype=torch.long)
        output: Any = decoder(input_ids=input_ids, use_cache=True)
    cache = getattr(output, "past_key_values", None) or getattr(output, "cache_params", None)
    slots = getattr(cache, "layers", None)
    # a family's own kind of slot may compress what it keeps, and then tokens do not cost the same
    known = slots and all(type(slot).__module__ == cache_utils.__name__ for slot in slots)
    return list(slots) if slots and known else None


def _num_bytes(slot: Any) -> int:
    total = 0
    for value in vars(slot).values():
        for tensor in value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]:
            if isinstance(tensor, Tensor) and tensor.dim() > 2:
                total += tensor.nbytes
    return total
