"""What can be taken out of a layer: its table; attention, MLP and heads silenced while a block runs, against forwards
written out by hand, and undone exactly.

Covers: shoal.components.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, get_args

import pytest
import torch
from architectures import ARCHITECTURES, census, tiny_model
from masked_models import (
    FAMILIES,
    attention_skipped,
    heads_masked,
    ids,
    kv_groups_masked,
    logits,
    mlp_skipped,
    text,
    tiny,
    with_heads,
)
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shoal.components import Component, ComponentPart, LayerEdit
from shoal.compress.edits.layer_edits import KINDS, components_of, in_force, layer_edits
from shoal.compress.edits.sublayers import sublayers
from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers
from shoal.recipe.measure import Operator as Swept

Operator = Callable[[PreTrainedModel, Sequence[int]], AbstractContextManager[PreTrainedModel]]
BOTH: dict[str, Operator] = {"attention": attention_skipped, "mlp": mlp_skipped}


def hooks(model: PreTrainedModel) -> int:
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules())


def by_hand(
    model: Any,
    input_ids: Tensor,
    *,
    no_attention: tuple[int, ...] = (),
    no_mlp: tuple[int, ...] = (),
    heads: Any = None,
) -> Tensor:
    """Logits (B, S, V) of a Llama in float64, from its definition, without the named halves and {layer: heads}."""
    weights = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}
    config = model.config
    num_heads, num_kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    length = input_ids.shape[1]
    frequencies = config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2).double() / size)
    angles = torch.outer(torch.arange(length).double(), frequencies).repeat(1, 2)

    def norm(hidden: Tensor, name: str) -> Tensor:
        return hidden * (hidden.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt() * weights[name]

    def rotated(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x * angles.cos() + torch.cat([-x[..., half:], x[..., :half]], -1) * angles.sin()

    hidden = weights["model.embed_tokens.weight"][input_ids]
    for layer in range(config.num_hidden_layers):
        own = {name.split(".", 3)[3]: w for name, w in weights.items() if name.startswith(f"model.layers.{layer}.")}
        normed = norm(hidden, f"model.layers.{layer}.input_layernorm.weight")
        query, key, value = (
            (normed @ own[f"self_attn.{name}_proj.weight"].T).unflatten(-1, (count, size)).transpose(1, 2)
            for name, count in (("q", num_heads), ("k", num_kv_heads), ("v", num_kv_heads))
        )
        contexts = []
        for head in range(num_heads):
            group = head * num_kv_heads // num_heads
            scores = rotated(query[:, head]) @ rotated(key[:, group]).mT / size**0.5
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
            context = scores.softmax(-1) @ value[:, group]
            contexts.append(0 * context if head in (heads or {}).get(layer, ()) else context)
        if layer not in no_attention:
            hidden = hidden + torch.cat(contexts, -1) @ own["self_attn.o_proj.weight"].T
        if layer not in no_mlp:
            normed = norm(hidden, f"model.layers.{layer}.post_attention_layernorm.weight")
            gate = functional.silu(normed @ own["mlp.gate_proj.weight"].T)
            hidden = hidden + (gate * (normed @ own["mlp.up_proj.weight"].T)) @ own["mlp.down_proj.weight"].T
    return norm(hidden, "model.norm.weight") @ weights["lm_head.weight"].T


@torch.no_grad()
def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_every_operator_equals_a_llama_written_by_hand() -> None:
    model = tiny("llama")
    assert_close(logits(model), by_hand(model, ids()))
    with attention_skipped(model, [0, 3]):
        assert_close(logits(model), by_hand(model, ids(), no_attention=(0, 3)))
        with mlp_skipped(model, [3, 5]), heads_masked(model, {1: [2]}):
            expected = by_hand(model, ids(), no_attention=(0, 3), no_mlp=(3, 5), heads={1: [2]})
            assert_close(logits(model), expected)
    for head in range(4):
        with heads_masked(model, {2: [head], 4: [0, head]}):
            assert_close(logits(model), by_hand(model, ids(), heads={2: [head], 4: [0, head]}))
    with kv_groups_masked(model, {2: [1]}):
        assert_close(logits(model), by_hand(model, ids(), heads={2: [2, 3]}))


@pytest.mark.parametrize("name", census(FAMILIES))
def test_a_skipped_half_adds_nothing_and_the_cache_stays_right(name: str) -> None:
    model = tiny(name)
    intact = logits(model)
    hooks_before = hooks(model)
    row = ARCHITECTURES[name]
    seen = {intact.sum().item()}
    for operator in BOTH.values():
        for layers in ([0], [2, len(decoder_layers(model)) - 1]):
            with operator(model, layers):
                seen.add(logits(model).sum().item())
                if layers == [0] and not row.cache:  # a KV cache measures the sequence by layer 0
                    cached, uncached = (text(model, use_cache=use, padded=not row.padding) for use in (True, False))
                    assert cached == uncached
            assert hooks(model) == hooks_before
            assert torch.equal(logits(model), intact)
    assert len(seen) == 5, "an operator without effect proves nothing"


@pytest.mark.parametrize("name", census(FAMILIES))
def test_a_masked_head_is_its_slice_of_the_projections_input(name: str) -> None:
    """The layer's projection is read with the slice zeroed, and everything before it is what it was."""
    model = tiny(name)
    layer, found = with_heads(model)
    projection: Any = decoder_layers(model)[layer].get_submodule(found.projection)
    seen: list[Tensor] = []
    handle = projection.register_forward_hook(lambda _, args, output: seen.extend([args[0].clone(), output.clone()]))
    logits(model)
    head = found.num_heads - 1
    with heads_masked(model, {layer: [head]}):
        logits(model)
    handle.remove()
    context, _, masked_context, output = (state.double() for state in seen)
    size = context.shape[-1] // found.num_heads
    expected = context.clone()
    expected[..., head * size : (head + 1) * size] = 0
    assert torch.equal(masked_context, expected)
    assert not torch.equal(masked_context, context)
    weight, bias = projection.weight.double(), projection.bias
    by_definition = expected @ (weight if isinstance(projection, Conv1D) else weight.T)
    assert_close(output, by_definition if bias is None else by_definition + bias.double())


def test_everything_is_undone_after_an_error_and_in_any_nesting() -> None:
    model = tiny("llama")
    intact, before = logits(model), hooks(model)
    with attention_skipped(model, [1]):
        outer = logits(model)
        with (
            pytest.raises(KeyError),
            mlp_skipped(model, [1]),
            heads_masked(model, {0: [1]}),
            attention_skipped(model, [1]),
        ):
            raise KeyError
        assert torch.equal(logits(model), outer)
        with pytest.raises(UserError), mlp_skipped(model, [2, 6]):
            pass
        assert torch.equal(logits(model), outer)
    assert torch.equal(logits(model), intact)
    assert hooks(model) == before


def contexts(model: PreTrainedModel, layer: int, run: Callable[[], object]) -> list[Tensor]:
    """What the layer's projection reads in each call, by head: (B, S, H, d)."""
    found = sublayers(model)[layer]
    seen: list[Tensor] = []
    projection = decoder_layers(model)[layer].get_submodule(found.projection)
    with projection.register_forward_hook(
        lambda _, args, __: seen.append(args[0].unflatten(-1, (found.num_heads, -1)))
    ):
        run()
    return seen


@pytest.mark.parametrize(
    ("name", "operate", "message"),
    [
        ("mamba", lambda model: attention_skipped(model, [1]), "layer 1 of mamba: has only one sublayer"),
        ("rwkv", lambda model: mlp_skipped(model, [1]), "layer 1 of rwkv: mixes tokens outside"),
        ("lfm2", lambda model: heads_masked(model, {0: [0]}), "layer 0 of lfm2: the heads"),
        ("diffllama", lambda model: kv_groups_masked(model, {0: [0]}), "layer 0 of diffllama: mixes its heads"),
    ],
)
def test_layers_without_exact_halves_are_refused(name: str, operate: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(UserError, match=message), operate(tiny(name)):
        pass


def test_every_part_has_a_row_and_is_an_operator_of_sweeps() -> None:
    assert set(KINDS) == set(get_args(ComponentPart)) > set(get_args(Swept))


def test_an_operator_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="no operator 'neuron'"):
        components_of("neuron", tiny_model("llama"))


def test_components_become_one_edit_per_layer_and_part() -> None:
    taken = (
        Component((4,), "kv_group", 1),
        *(Component((layer,), "mlp") for layer in (2, 1)),
        *(Component((4,), "head", head) for head in (2, 0)),
        Component((2,), "attention"),
    )
    assert layer_edits(taken, tiny_model("llama", num_key_value_heads=2)) == (
        (1, LayerEdit("mlp")),
        (2, LayerEdit("attention")),
        (2, LayerEdit("mlp")),
        (4, LayerEdit("head", (0, 2, 3))),
    )


def test_a_donor_is_left_to_whoever_has_it() -> None:
    model: Any = tiny_model("llama")
    with in_force(model, [(1, LayerEdit("donor"))]):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
