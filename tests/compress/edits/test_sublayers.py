"""Attention and MLP of a layer are found by name and proven by running; what only looks like them is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from architectures import tiny_model
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from shoal.compress.edits.sublayers import named_halves, silence, sublayers
from shoal.models.anatomy import decoder_layers

GROUPED = {"num_key_value_heads": 2}
FOUND: dict[tuple[str, int], tuple[tuple[str, ...], tuple[str, ...], str, int, int]] = {
    ("llama", 0): (("self_attn",), ("mlp",), "self_attn.o_proj", 4, 2),
    ("qwen3", 5): (("self_attn",), ("mlp",), "self_attn.o_proj", 4, 2),
    ("gemma3_text", 2): (("self_attn",), ("mlp",), "self_attn.o_proj", 4, 2),
    ("gpt2", 1): (("attn",), ("mlp",), "attn.c_proj", 4, 4),
    ("gpt_neo", 1): (("attn",), ("mlp",), "attn.attention.out_proj", 4, 4),
    ("gpt_neox", 3): (("attention",), ("mlp",), "attention.dense", 4, 4),
    ("gpt_bigcode", 3): (("attn",), ("mlp",), "attn.c_proj", 4, 1),
    ("opt", 0): (("self_attn",), ("fc2",), "self_attn.out_proj", 4, 4),
    ("bloom", 2): (("self_attention",), ("mlp",), "self_attention.dense", 4, 4),
    ("falcon", 4): (("self_attention",), ("mlp",), "self_attention.dense", 4, 2),
    ("falcon_h1", 4): (("mamba", "self_attn"), ("feed_forward",), "self_attn.o_proj", 4, 2),
    ("mixtral", 1): (("self_attn",), ("mlp",), "self_attn.o_proj", 4, 2),
    ("deepseek_v3", 5): (("self_attn",), ("mlp",), "self_attn.o_proj", 4, 4),
    ("granitemoehybrid", 0): (("mamba",), ("block_sparse_moe", "shared_mlp"), "", 0, 0),
    ("lfm2", 0): (("conv",), ("feed_forward",), "", 0, 0),
    ("lfm2", 1): (("self_attn",), ("feed_forward",), "self_attn.out_proj", 4, 2),
    ("qwen3_next", 0): (("linear_attn",), ("mlp",), "", 0, 0),
    ("dbrx", 1): (("norm_attn_norm.attn",), ("ffn",), "norm_attn_norm.attn.out_proj", 4, 2),
    ("nemotron_h", 2): (("mixer",), (), "mixer.o_proj", 4, 2),
}


def tiny(name: str, **settings: Any) -> PreTrainedModel:
    """The model of row ``name``, Llama's with two query heads per key-value head."""
    return tiny_model(name, **({**GROUPED, **settings} if name == "llama" else settings))


@pytest.mark.parametrize(("name", "layer"), FOUND, ids=str)
def test_halves_and_heads_are_found(name: str, layer: int) -> None:
    found = sublayers(tiny(name))[layer]
    halves = found.attention, found.mlp
    assert (*halves, found.projection, found.num_heads, found.num_kv_heads) == FOUND[name, layer]
    assert bool(found.refusal) == (not all(halves))
    assert bool(found.head_refusal) == (not found.projection)
    if found.projection:
        assert found.num_heads % found.num_kv_heads == 0


REFUSED = {
    ("mamba", 0): r"layer 0 of mamba: has only one sublayer \(mixer\).*name the layer in prune\.drop",
    ("rwkv", 1): r"layer 1 of rwkv: mixes tokens outside of the module that shoal takes for its attention",
    ("rwkv", 5): r"layer 5 of rwkv: mixes tokens outside",
    ("gpt_neox_japanese", 5): r"layer 5 of gpt_neox_japanese: changes its input even with attention, mlp silenced",
    ("inkling_text", 0): r"layer 0 of inkling_text: mixes tokens outside",
}
NO_HEADS = {
    ("diffllama", 0): r"layer 0 of diffllama: mixes its heads before the output projection",
    ("bitnet", 0): r"layer 0 of bitnet: mixes its heads before the output projection",
    ("lfm2", 0): r"layer 0 of lfm2: the heads of softmax attention are not visible",
    ("jetmoe", 0): r"layer 0 of jetmoe: has no linear output projection over its heads that shoal knows",
}


@pytest.mark.parametrize(("name", "layer"), REFUSED, ids=str)
def test_layers_that_cannot_be_halved_say_why(name: str, layer: int) -> None:
    assert re.match(REFUSED[name, layer], sublayers(tiny_model(name))[layer].refusal)


@pytest.mark.parametrize(("name", "layer"), NO_HEADS, ids=str)
def test_heads_that_cannot_be_told_apart_say_why(name: str, layer: int) -> None:
    found = sublayers(tiny_model(name))[layer]
    assert re.match(NO_HEADS[name, layer], found.head_refusal)
    assert not found.refusal


def altered(forward: Callable[..., Tensor], **children: nn.Module) -> tuple[str, str]:
    """What is refused of a Llama whose layer 2 runs ``forward`` and has more ``children``, but not of layer 1."""
    model = tiny("llama")
    layer = decoder_layers(model)[2]
    for name, child in children.items():
        layer.add_module(name, child)
    layer.forward = MethodType(forward, layer)
    found = sublayers(model)
    assert not found[1].refusal
    return found[2].refusal, found[2].head_refusal


def attention(layer: Any, hidden: Tensor, **rest: Any) -> Tensor:
    return layer.self_attn(hidden_states=layer.input_layernorm(hidden), **rest)[0]


def mlp(layer: Any, hidden: Tensor) -> Tensor:
    return layer.mlp(layer.post_attention_layernorm(hidden))


def test_a_part_that_is_no_half_is_noticed() -> None:
    def shifted(layer: Any, hidden_states: Tensor, **rest: Any) -> Tensor:
        hidden_states = hidden_states + attention(layer, hidden_states, **rest)
        return hidden_states + mlp(layer, hidden_states) + 1e-6

    refusal, _ = altered(shifted)
    assert re.match(r"layer 2 of llama: changes its input even with self_attn, mlp silenced", refusal)


@pytest.mark.parametrize(("name", "other"), [("attn_gain", "MLP"), ("mlp_gain", "attention")])
def test_a_half_that_holds_a_part_of_the_other_is_noticed(name: str, other: str) -> None:
    def gained(layer: Any, hidden_states: Tensor, **rest: Any) -> Tensor:
        mixed = attention(layer, hidden_states, **rest)
        hidden_states = hidden_states + (layer.mlp_gain(mixed) if hasattr(layer, "mlp_gain") else mixed)
        added = mlp(layer, hidden_states)
        return hidden_states + (layer.attn_gain(added) if hasattr(layer, "attn_gain") else added)

    assert re.search(rf"holds a part of its {other}", altered(gained, **{name: nn.Identity()})[0])


@pytest.mark.parametrize("order", [[3, 2, 1, 0], [0, 2, 1, 3]], ids=str)
def test_heads_in_another_order_are_noticed(order: list[int]) -> None:
    def reordered(*args: Any, **kwargs: Any) -> Any:
        context_BSHd, weights = sdpa_attention_forward(*args, **kwargs)
        return context_BSHd[:, :, order], weights

    AttentionInterface.register("reordered", reordered)
    model = tiny("llama")
    model.config._attn_implementation = "reordered"
    assert "mixes its heads" in sublayers(model)[0].head_refusal


def test_the_proof_runs_once_and_leaves_no_trace() -> None:
    model = tiny("llama").train()
    runs: list[int] = []
    counter = model.get_decoder().register_forward_pre_hook(lambda *_: runs.append(1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = sublayers(model)
    assert sublayers(model) is first
    assert len(runs) == 4
    counter.remove()
    assert all(one.training for one in model.modules())
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    decoder_layers(model)[0] = decoder_layers(tiny("llama", seed=1))[0]
    assert sublayers(model) is not first


@pytest.mark.parametrize("name", ["opt", "gpt2", "bloom", "llama"])
def test_a_silenced_half_leaves_the_residual_alone(name: str) -> None:
    """Bloom's halves take the residual and add it themselves; OPT's MLP has no module."""
    model = tiny(name)
    layer = decoder_layers(model)[3]
    halves = named_halves(layer)
    states: list[Tensor] = []

    def keep(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        states.extend(
            [(args or (kwargs["hidden_states"],))[0].clone(), output[0] if isinstance(output, tuple) else output]
        )

    handles = [layer.register_forward_hook(keep, with_kwargs=True)]
    handles += [silence(layer.get_submodule(path)) for path in (*halves.attention, *halves.mlp)]
    with torch.no_grad():
        model(input_ids=torch.arange(10, 30)[None])
    assert torch.equal(states[0], states[1])
    for handle in handles:
        handle.remove()
