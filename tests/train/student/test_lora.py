"""LoRA: where adapters go, what is trained, and the plain checkpoint that they become."""

from typing import Any

import pytest
import torch
from architectures import tiny_model as tiny_architecture
from cut_students import names, plan
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers
from shoal.recipe.distill import Lora
from shoal.train.student.frozen import finished_state, stored_names
from shoal.train.student.lora import add_adapters, remove_adapters
from shoal.train.student.trainable import trained_parts

CUT = plan(3, num_layers=7)
IDS = torch.arange(5, 25)[None]
RANK_3 = Lora(r=3, lora_alpha=7.5)


def adapted(kind: str, lora: Lora = RANK_3, trainable: str = "near_gaps", **overrides: Any) -> tuple[Any, list[str]]:
    student = (tiny_architecture if kind == "gpt2" else tiny_model)(kind, **overrides)
    cut = plan(3, num_layers=len(decoder_layers(student)) + 1)
    return student, add_adapters(student, lora, trained_parts(trainable, cut), seed=1)


def move_adapters(student: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "gpt2"])
def test_adapters_become_a_plain_checkpoint_that_computes_what_they_did(kind, tmp_path) -> None:
    plain = (tiny_architecture if kind == "gpt2" else tiny_model)(kind)
    plain.save_pretrained(tmp_path / "student")
    student, chosen = adapted(kind)
    assert torch.equal(logits(student), logits(plain)), "adapters add nothing before their first step"
    assert names(student) == {f"{name}.lora_{part}.default.weight" for name in chosen for part in "AB"}
    assert type(student) is type(plain)
    move_adapters(student)
    expected, state = logits(student), student.state_dict()
    assert not torch.allclose(expected, logits(plain), atol=1e-3)

    wanted = {name for name in state if name not in student.all_tied_weights_keys}
    finished = finished_state(
        student, {name: state[name] for name in wanted}, tmp_path / "student", dtype=torch.float32
    )
    changed = {f"{name}.weight" for name in chosen}
    for name, tensor in plain.state_dict().items():
        if name in finished:
            assert torch.equal(finished[name], tensor) == (name not in changed), name
    remove_adapters(student)
    assert student.state_dict().keys() == plain.state_dict().keys()
    student.save_pretrained(tmp_path / "distilled", state_dict=finished)
    assert not list((tmp_path / "distilled").glob("adapter*"))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "distilled")
    torch.testing.assert_close(logits(reloaded), expected, rtol=1e-4, atol=1e-5)
    assert not any("lora" in name for name, _ in reloaded.named_modules())


def test_the_merge_is_exact_where_numbers_are(tmp_path) -> None:
    student, (name, *_) = adapted("llama", Lora(r=2, lora_alpha=3.0))
    weight = student.get_parameter(f"{name}.base_layer.weight")
    remembered = weight.detach().clone()
    student.save_pretrained(tmp_path, state_dict={f"{name}.weight": remembered})
    state = student.state_dict()
    down, up = (state[f"{name}.lora_{part}.default.weight"] for part in "AB")
    down.copy_(torch.arange(down.numel()).view_as(down) % 7 - 3)
    up.copy_(torch.arange(up.numel()).view_as(up) % 5 / 4)
    expected = (remembered.double() + 1.5 * up.double() @ down.double()).float()
    assert torch.equal(finished_state(student, state, tmp_path, dtype=torch.float32)[f"{name}.weight"], expected)


@pytest.mark.slow
def test_adapters_go_where_layers_are_trained_and_nowhere_else() -> None:
    student, chosen = adapted("llama", num_hidden_layers=12)
    assert {name.rpartition(".")[0] for name in chosen} == {
        f"model.layers.{layer}.{half}" for layer in (2, 3) for half in ("self_attn", "mlp")
    }
    assert len(chosen) == 14
    assert {name.partition(".lora_")[0] for name in names(student)} == set(chosen)
    _, chosen = adapted("llama", Lora(target_modules=("q_proj", "mlp.down_proj")), "all")
    assert chosen == [
        f"model.layers.{layer}.{name}" for layer in range(6) for name in ("self_attn.q_proj", "mlp.down_proj")
    ]


def test_adapters_beside_4_bit_weights_are_merged_into_the_stored_ones(tmp_path) -> None:
    bitsandbytes: Any = pytest.importorskip("bitsandbytes", reason="needs the extra qlora")
    plain = tiny_model("llama", dtype=torch.bfloat16)
    plain.save_pretrained(tmp_path)
    student, lora = tiny_model("llama", dtype=torch.bfloat16).float(), Lora(r=3, load_in_4bit=True)
    with pytest.raises(UserError, match=r"LlamaForCausalLM stores model\.layers\.0\.self_attn\.q_proj\.weight under"):
        add_adapters(student, lora, trained_parts("near_gaps", CUT), seed=0)
    chosen = add_adapters(student, lora, trained_parts("near_gaps", CUT), seed=0, stored=stored_names(tmp_path))
    inside = [module for module in student.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(inside) == 6 * 7
    assert all(module.weight.dtype == torch.uint8 for module in inside)
    assert names(student) == {f"{name}.lora_{part}.default.weight" for name in chosen for part in "AB"}
    student.to("cpu")  # pyright: ignore[reportArgumentType] - which is not where it is put beside a GPU
    assert logits(student).isfinite().all()  # a look at it before training goes on
    student.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        student(input_ids=IDS, labels=IDS).loss.backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert gradients.keys() == names(student)
    assert gradients[f"{chosen[0]}.lora_B.default.weight"].any()

    move_adapters(student)
    state = student.state_dict()
    finished = finished_state(student, state, tmp_path, dtype=torch.bfloat16)
    assert finished.keys() == plain.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        owner = name.removesuffix(".weight")
        expected = tensor
        if owner in chosen:
            down, up = (state[f"{owner}.lora_{part}.default.weight"] for part in "AB")
            expected = (tensor.float() + 32 / 3 * (up @ down)).bfloat16()
        torch.testing.assert_close(finished[name], expected, rtol=0.01 if owner in chosen else 0, atol=0)
