"""Merged layers against the formulae written out; what cannot stand for each other is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from model_outputs import logits
from tiny import KINDS, NUM_LAYERS, tiny_model, tiny_moe
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BambaConfig, PreTrainedModel

from shoal.compress.edits.tensors import laco_factors, layer_tensors, merged_layer, tensors_in_place, with_layers
from shoal.compress.surgery.cut_model import skipped
from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers

ALIKE = {"llama": (0, 4), "llama_tied": (2, 4), "qwen2": (3, 3), "qwen3": (1, 5), "gemma3": (3, 2)}
"""A run of layers of one kind in every family: first layer and length."""


def parameters(model: PreTrainedModel, layer: int) -> dict[str, Tensor]:
    return dict(decoder_layers(model)[layer].named_parameters())


def merge_run(model: PreTrainedModel, start: int, length: int) -> PreTrainedModel:
    """The student in which one layer stands for a run."""
    merged = merged_layer(model, start, laco_factors(length))
    return with_layers(model, range(start + 1, start + length), {start: merged})


def laco(run: Sequence[Tensor]) -> Tensor:
    """The formula as it is printed, in float64."""
    first, *others = [tensor.double() for tensor in run]
    return first + sum((other - first for other in others), torch.zeros_like(first))


def laco_as_released(run: Sequence[Tensor]) -> Tensor:
    """What the authors' code computes: the base of every difference is the sum so far."""
    total, *others = [tensor.double() for tensor in run]
    for other in others:
        total = total + (other - total)
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_laco_is_the_printed_formula_for_every_parameter(kind: str, dtype: torch.dtype) -> None:
    model = tiny_model(kind, dtype=dtype)
    start, length = ALIKE[kind]
    student = merge_run(model, start, length)
    run = [parameters(model, layer) for layer in range(start, start + length)]
    for name, found in parameters(student, start).items():
        expected = laco([own[name] for own in run])
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize(("length", "same"), [(2, True), (3, False), (4, False)])
def test_laco_differs_from_the_released_code_beyond_two_layers(length: int, same: bool) -> None:
    model = tiny_model("llama")
    merged = merged_layer(model, 1, laco_factors(length))
    run = [parameters(model, layer) for layer in range(1, 1 + length)]
    for name, found in merged.items():
        released = laco_as_released([own[name] for own in run])
        torch.testing.assert_close(released, run[-1][name].double())  # it keeps the last layer and nothing else
        assert torch.equal(found, run[-1][name]) == same


def test_rounding_happens_once_and_at_the_end() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    values = (256.0, 1.0, 1.0, 1.0)  # bfloat16 cannot hold 257: added one by one in it the ones would vanish
    for layer, value in enumerate(values):
        nn.init.constant_(decoder_layers(model)[layer].get_parameter("mlp.up_proj.weight"), value)
    merged = merged_layer(model, 0, (1, 2, -3, 1))
    assert (merged["mlp.up_proj.weight"] == 256).all()
    merged = merged_layer(model, 0, (0.25, 0.25, 0.25, 0.25))
    assert (merged["mlp.up_proj.weight"] == torch.tensor(64.75).bfloat16()).all()


def test_routers_and_experts_are_merged_by_their_index() -> None:
    model = tiny_moe()
    merged = merged_layer(model, 1, laco_factors(3))
    assert {name for name in merged if "experts" in name or "gate" in name}
    for name, found in merged.items():
        expected = laco([parameters(model, layer)[name] for layer in (1, 2, 3)])
        torch.testing.assert_close(found, expected.float(), rtol=2e-7, atol=1e-9)


def test_stored_buffers_are_merged_and_computed_ones_stay() -> None:
    model = tiny_model("llama")
    for layer in (1, 2, 3):
        decoder_layers(model)[layer].register_buffer("offset", torch.tensor([float(layer)]))
        decoder_layers(model)[layer].register_buffer("table", torch.arange(3), persistent=False)
    assert merged_layer(model, 1, laco_factors(3))["offset"].item() == 1 + (2 - 1) + (3 - 1)
    assert "table" not in merged_layer(model, 1, laco_factors(3))
    decoder_layers(model)[3].get_buffer("table").add_(1)
    with pytest.raises(UserError, match=r"layers 1 and 3 are of different kinds: computed table is "):
        merged_layer(model, 1, laco_factors(3))


@pytest.mark.parametrize(
    ("model", "run", "message"),
    [
        (
            lambda: tiny_model("gemma3"),
            (1, 2),
            r"layers 1 and 2 are of different kinds: self_attn.is_sliding is True in one and False",
        ),
        (
            lambda: tiny_model("qwen2"),
            (2, 2),
            r"layers 2 and 3 are of different kinds: self_attn.layer_type is 'full_attention' in one and 'sliding_",
        ),
        (
            lambda: tiny_moe(mlp_only_layers=[2]),
            (1, 2),
            r"mlp.class is 'Qwen3MoeSparseMoeBlock' in one and 'Qwen3MoeMLP' in the other; choose layers of one kind",
        ),
    ],
)
def test_layers_of_different_kinds_are_refused(model: Any, run: tuple[int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        merged_layer(model(), run[0], laco_factors(run[1]))


def test_mamba_and_attention_layers_are_refused() -> None:
    config = BambaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_indices=[1],
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=4,
        mamba_chunk_size=8,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=r"layers 0 and 1 are of different kinds"):
        merged_layer(model, 0, laco_factors(2))


def test_layers_of_different_shapes_are_refused() -> None:
    model = tiny_model("llama")
    setattr(decoder_layers(model)[2].get_submodule("mlp.up_proj"), "weight", nn.Parameter(torch.ones(40, 32)))  # noqa: B010
    with pytest.raises(
        UserError, match=r"shape of mlp.up_proj.weight is \(48, 32\) in one and \(40, 32\) in the other"
    ):
        merged_layer(model, 1, laco_factors(2))


def test_parameters_shared_with_other_layers_are_refused() -> None:
    model = tiny_model("llama")
    layers = decoder_layers(model)
    setattr(layers[5].get_submodule("mlp.up_proj"), "weight", layers[2].get_parameter("mlp.up_proj.weight"))  # noqa: B010
    with pytest.raises(UserError, match=r"layer 2: shares parameters with other layers of this llama model"):
        merged_layer(model, 1, laco_factors(2))
    with pytest.raises(UserError, match=r"layer 5: shares parameters"):
        with_layers(model, (), {5: {}})


def test_tensors_that_are_no_floating_point_stay_where_equal_and_are_refused_where_not() -> None:
    model = tiny_model("llama")
    for layer in decoder_layers(model):
        layer.register_buffer("codes", torch.ones(2, dtype=torch.int8))
    merged = merged_layer(model, 1, laco_factors(2))["codes"]
    assert merged.dtype == torch.int8
    assert torch.equal(merged, torch.ones(2, dtype=torch.int8))
    decoder_layers(model)[2].get_buffer("codes").add_(1)
    with pytest.raises(UserError, match=r"codes of layers 1..2 is torch.int8 and differs; only floating-point numbers"):
        merged_layer(model, 1, laco_factors(2))


def test_overflow_is_refused() -> None:
    model = tiny_model("llama", dtype=torch.float16)
    for layer, value in {1: -30_000.0, 2: 30_000.0, 3: 30_000.0}.items():
        nn.init.constant_(decoder_layers(model)[layer].get_parameter("mlp.up_proj.weight"), value)
    with pytest.raises(UserError, match=r"mlp.up_proj.weight of layers 1..3 is not finite in torch.float16"):
        merged_layer(model, 1, laco_factors(3))


def test_own_tensors_of_a_layer_put_back_change_no_bit() -> None:
    model = tiny_model("qwen2")
    student = with_layers(model, (), {layer: layer_tensors(model, layer) for layer in range(NUM_LAYERS)})
    assert torch.equal(logits(student), logits(model))


def test_tensors_in_place_are_the_student_with_layers_skipped_and_leave_the_teacher_as_it_was() -> None:
    model = tiny_model("gemma3")
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    intact = logits(model)
    made = {3: merged_layer(model, 3, laco_factors(2))}
    with tensors_in_place(model, made), skipped(model, (4,)):
        assert torch.equal(logits(model), logits(merge_run(tiny_model("gemma3"), 3, 2)))
    assert torch.equal(logits(model), intact)
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]  # an optimizer would find its own parameters
        assert torch.equal(parameter, before[name][1])
