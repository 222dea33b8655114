"""Sublayers zeroed for good: the same bits as with the operator in force, on disk too, and zero they stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from masked_models import (
    FAMILIES,
    attention_skipped,
    heads_masked,
    kv_groups_masked,
    logits,
    mlp_skipped,
    text,
    tiny,
    with_heads,
)
from transformers import AutoModelForCausalLM

from shoal.components import Component
from shoal.compress.edits.layer_edits import heads_of_groups, layer_edits
from shoal.compress.surgery.cut_model import cut_model
from shoal.errors import UserError
from shoal.lab.edits.skip import zero_half, zero_heads
from shoal.models.anatomy import decoder_layers
from shoal.models.checkpoint_files import ZEROED_WEIGHTS
from shoal.train.student.trainable import keep_zeros

WRITERS = {
    "llama": ({"self_attn.o_proj.weight"}, {"mlp.down_proj.weight"}),
    "gpt2": ({"attn.c_proj.weight", "attn.c_proj.bias"}, {"mlp.c_proj.weight", "mlp.c_proj.bias"}),
    "opt": ({"self_attn.out_proj.weight", "self_attn.out_proj.bias"}, {"fc2.weight", "fc2.bias"}),
    "gpt_oss": (
        {"self_attn.o_proj.weight", "self_attn.o_proj.bias"},
        {"mlp.experts.down_proj", "mlp.experts.down_proj_bias"},
    ),
    "deepseek_v3": (
        {"self_attn.o_proj.weight"},
        {"mlp.experts.down_proj", "mlp.shared_experts.down_proj.weight"},
    ),
    "granitemoehybrid": (
        {"mamba.out_proj.weight"},
        {"block_sparse_moe.experts.down_proj", "shared_mlp.output_linear.weight"},
    ),
    "jetmoe": (
        {"self_attention.experts.output_linear.weight", "self_attention.experts.bias"},
        {"mlp.output_linear.weight", "mlp.bias"},
    ),
    "dbrx": ({"norm_attn_norm.attn.out_proj.weight"}, {"ffn.experts.mlp.w2"}),
}


@pytest.mark.prove
@pytest.mark.parametrize("name", FAMILIES)
def test_zeroed_weights_give_the_bits_of_the_operator_in_force(name: str, tmp_path: Path) -> None:
    teacher = tiny(name)
    last = len(decoder_layers(teacher)) - 1
    layer, _ = with_heads(teacher)
    with attention_skipped(teacher, [0, 3]), mlp_skipped(teacher, [2, last]), heads_masked(teacher, {layer: [1, 3]}):
        expected, expected_text = logits(teacher), text(teacher, use_cache=True, padded=False)
    intact = logits(teacher)
    student = cut_model(teacher, (), share=True)
    names = [
        *zero_half("attention", student, [0, 3]),
        *zero_half("mlp", student, [2, last]),
        *zero_heads(student, {layer: [1, 3]}),
    ]
    assert torch.equal(logits(student), expected)
    assert torch.equal(logits(teacher), intact), "the teacher's storage is the student's no more"

    old, new = dict(teacher.named_parameters()), dict(student.named_parameters())
    assert {key for key in new if not torch.equal(old[key], new[key])} == {key for key in names if old[key].any()}
    kept = [key for key in new if key not in names and "per_layer" not in key]  # Gemma3n's tables are cut by columns
    assert all(new[key].data_ptr() == old[key].data_ptr() for key in kept)
    assert all(new[key].requires_grad == old[key].requires_grad for key in names)

    student.save_pretrained(tmp_path)
    reloaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(reloaded), expected)
    assert text(reloaded, use_cache=True, padded=False) == expected_text
    assert set(names) <= dict(reloaded.named_parameters()).keys()


@pytest.mark.prove
@pytest.mark.parametrize("name", WRITERS)
def test_the_weights_that_write_a_half_become_zero_and_no_others(name: str) -> None:
    attention, mlp = WRITERS[name]
    model = tiny(name)
    layer = 0 if name == "granitemoehybrid" else len(decoder_layers(model)) - 1
    prefix = next(key for key, module in model.named_modules() if module is decoder_layers(model)[layer])
    assert set(zero_half("attention", model, [layer])) == {f"{prefix}.{key}" for key in attention}
    assert set(zero_half("mlp", model, [layer])) == {f"{prefix}.{key}" for key in mlp}
    for key in (*attention, *mlp):
        assert not model.get_parameter(f"{prefix}.{key}").any()


@pytest.mark.prove
@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon"])
def test_zeroed_groups_are_masked_groups(name: str) -> None:
    model = tiny(name)
    layer, found = with_heads(model)
    group = found.num_kv_heads - 1
    with kv_groups_masked(model, {layer: [group]}):
        expected = logits(model)
    (changed,) = zero_heads(model, {layer: heads_of_groups(model, layer, [group])})
    assert torch.equal(logits(model), expected)
    zeros = (model.get_parameter(changed) == 0).float().mean().item()
    assert zeros == pytest.approx(1 / found.num_kv_heads)


@pytest.mark.parametrize("name", ["gpt_oss", "gpt2", "deepseek_v3"])
def test_zeros_stay_zero_in_training(name: str) -> None:
    student = tiny(name)
    layer, _ = with_heads(student)
    names = [
        *zero_half("mlp", student, [1, 4]),
        *zero_half("attention", student, [2]),
        *zero_heads(student, {layer: [1]}),
    ]
    setattr(student.config, ZEROED_WEIGHTS, names)
    keep_zeros(student)
    zeros = {key: student.get_parameter(key) == 0 for key in names}
    before = {key: parameter.detach().clone() for key, parameter in student.named_parameters()}
    optimizer = torch.optim.AdamW(
        [parameter for parameter in student.parameters() if parameter.requires_grad], lr=0.01, weight_decay=0.1
    )
    for _ in range(2):
        optimizer.zero_grad()
        student(input_ids=torch.arange(5, 25)[None]).logits.square().mean().backward()
        optimizer.step()
    for key in names:
        parameter = student.get_parameter(key)
        assert not parameter[zeros[key]].any()
        assert zeros[key].all() == torch.equal(parameter, before[key])
    assert not torch.equal(before[names[-1]], student.get_parameter(names[-1])), "the other heads learn"


@pytest.mark.prove
def test_what_cannot_be_zeroed_is_refused_before_anything_changes() -> None:
    model = tiny("llama")
    with pytest.raises(UserError, match=r"layer 6: is out of range"):
        zero_half("attention", model, [0, 6])
    with pytest.raises(UserError, match=r"layer 2 of llama: head 4: is out of range"):
        zero_heads(model, {2: [0, 4]})
    with pytest.raises(UserError, match=r"key-value head 2: is out of range"):
        layer_edits([Component((2,), "kv_group", 2)], model)
    with pytest.raises(UserError, match=r"layer 0 of mamba: is one sublayer only"):
        zero_half("mlp", tiny("mamba"), [0])
    with pytest.raises(UserError, match=r"layer 1 of ctrl: shoal does not know which weights write its mlp's output"):
        zero_half("mlp", tiny("ctrl"), [1])
    assert all(parameter.any() for parameter in model.parameters())
