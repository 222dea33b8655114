"""One layer trained to stand for a run: its objective against whole models in float64, and what stays as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from model_outputs import logits
from tiny import KINDS, SHAPE, VOCAB_SIZE, tiny_model, tiny_moe
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from shoal.compress.edits.tensors import with_layers
from shoal.compress.surgery.cut_model import cut_model
from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.lab.edits import replace as replacement
from shoal.lab.edits.replace import Settings, TrainedLayer, train_replacement
from shoal.models.anatomy import decoder_layers

LENGTH = 24
BORDER = 10
"""Where every row's second document begins."""


def tiny_gpt2() -> PreTrainedModel:
    """Whose default configuration has dropout."""
    names = {"n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 64, "vocab_size": VOCAB_SIZE}
    settings: dict[str, Any] = names | {name: SHAPE[name] for name in ("bos_token_id", "eos_token_id")}
    return AutoModelForCausalLM.from_config(GPT2Config(initializer_range=0.1, **settings)).eval()


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    made = {"gpt2": tiny_gpt2, "qwen3_moe": tiny_moe}
    return made[kind]() if kind in made else tiny_model(kind)


FAMILIES = (*(kind for kind in KINDS if kind != "llama_tied"), "gpt2", "qwen3_moe")


def some_rows(number: int, *, seed: int = 0) -> PackedRows:
    input_ids = torch.randint(0, 256, (number, LENGTH), generator=torch.Generator().manual_seed(seed))
    position_ids = torch.arange(LENGTH).repeat(number, 1)
    position_ids[:, BORDER:] -= BORDER
    return PackedRows(input_ids.int(), position_ids.int())


def settings(*layers: int, **overrides: Any) -> Settings:
    return Settings(layers, **({"batch_size": 4, "learning_rate": 3e-3} | overrides))


def state_after_all_layers(model: Any, rows: PackedRows) -> Tensor:
    """What a whole model makes of ``rows``; its final norm must have been taken out."""
    return model.get_decoder()(
        input_ids=rows.input_ids_NS, position_ids=rows.position_ids_NS.long(), use_cache=False
    ).last_hidden_state


def up_to(model: PreTrainedModel, last: int) -> PreTrainedModel:
    """``model`` in float64 without the layers behind ``last`` and without its final norm."""
    short = cut_model(model, range(last + 1, len(decoder_layers(model)))).double()
    short.set_experts_implementation("eager")  # the grouped kernel knows no float64
    decoder = short.get_decoder()
    setattr(decoder, "ln_f" if hasattr(decoder, "ln_f") else "norm", nn.Identity())
    return short


def run_of(model: PreTrainedModel, first: int, last: int, rows: PackedRows) -> replacement._Run:
    return replacement._Run(model, rows, first, last)


@pytest.mark.prove
@pytest.mark.parametrize("layers", [(2, 3, 4), (0, 1)], ids=str)
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_objective_is_that_of_whole_models(kind: str, layers: tuple[int, ...]) -> None:
    """Value and gradient against a student that calls the layer by itself, and a teacher that ends after the run."""
    model, rows = model_of(kind), some_rows(3)
    first, last = layers[0], layers[-1]
    student = up_to(cut_model(model, layers[1:]), first)
    expected = (
        (state_after_all_layers(student, rows) - state_after_all_layers(up_to(model, last), rows)).square().mean()
    )
    expected.backward()
    layer = copy.deepcopy(decoder_layers(model)[first])
    found = run_of(model, first, last, rows).squared_errors(layer, torch.arange(3)).mean()
    found.backward()
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-7)
    for name, reference in decoder_layers(student)[first].named_parameters():
        assert reference.grad is not None
        scale = reference.grad.abs().max().item()
        torch.testing.assert_close(
            layer.get_parameter(name).grad, reference.grad.float(), rtol=1e-3, atol=1e-5 * scale, msg=name
        )
    assert expected > 1e-4


@pytest.mark.prove
@pytest.mark.parametrize("kind", FAMILIES)
def test_training_beats_dropping_and_the_first_layer_alone_on_unseen_rows(kind: str) -> None:
    model = model_of(kind)
    rows = some_rows(160)
    trained = train_replacement(model, settings(1, 2, 3), rows, seed=0)
    assert trained.error < 0.85 * min(1, trained.initial_error)
    # the same figures from the outside
    _, held_out = replacement._split(rows, 160, seed=0)
    rows = PackedRows(rows.input_ids_NS[held_out[0]], rows.position_ids_NS[held_out[0]])
    target = state_after_all_layers(up_to(model, 3), rows)
    shorter = {
        "trained": up_to(with_layers(model, (2, 3), {1: trained.tensors}), 1),
        "first": up_to(cut_model(model, (2, 3)), 1),
        "none": up_to(cut_model(model, (1, 2, 3)), 0),
    }
    errors = {name: (state_after_all_layers(short, rows) - target).square().mean() for name, short in shorter.items()}
    assert trained.error == pytest.approx((errors["trained"] / errors["none"]).item(), rel=1e-4)
    assert trained.initial_error == pytest.approx((errors["first"] / errors["none"]).item(), rel=1e-4)


@pytest.mark.prove
@pytest.mark.parametrize("init", ["first", "mean", "lesa"])
def test_training_starts_from_what_is_asked_for(init: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of layers that are affine in depth the mean of 2..3 and what 1 and 4 predict are one layer, half between them."""
    model, starts = tiny_model("llama"), []
    layers = decoder_layers(model)
    for depth, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            parameter.data.copy_(layers[0].get_parameter(name).data * (1 + 0.1 * depth))
    monkeypatch.setattr(replacement, "_fit", lambda layer, *_, **__: starts.append(copy.deepcopy(layer)))
    train_replacement(model, settings(2, 3, init=init), some_rows(12), seed=0)
    for name, parameter in starts[0].named_parameters():
        expected = layers[0].get_parameter(name).double() * (1.2 if init == "first" else 1.25)
        torch.testing.assert_close(parameter.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.prove
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_teacher_is_left_as_it_was(dtype: torch.dtype) -> None:
    model = model_of("gemma3").to(dtype).requires_grad_(False)
    before = {name: (tensor, tensor.clone()) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    intact = logits(model)
    train_replacement(model, settings(1, 2), some_rows(12), seed=0)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor is before[name][0]
        assert torch.equal(tensor, before[name][1])
        assert tensor.grad is None
        assert not tensor.requires_grad
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert torch.equal(logits(model), intact)


def same(one: TrainedLayer, other: TrainedLayer) -> bool:
    assert one.tensors.keys() == other.tensors.keys()
    return all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


@pytest.mark.prove
@pytest.mark.parametrize("kind", ["gemma3", "qwen3_moe"])
def test_a_bfloat16_teacher_trains_in_float32_and_saves_bfloat16(kind: str) -> None:
    rows, chosen = some_rows(80), settings(1, 2, 3)
    full = train_replacement(model_of(kind), chosen, rows, seed=0)
    model = model_of(kind).bfloat16()
    trained = train_replacement(model, chosen, rows, seed=0)
    assert {tensor.dtype for tensor in trained.tensors.values()} == {torch.bfloat16}
    assert trained.error == pytest.approx(full.error, rel=0.1)
    student = with_layers(model, (2, 3), {1: trained.tensors})
    assert logits(student).isfinite().all()


@pytest.mark.prove
def test_every_training_row_is_used_once_and_no_held_out_row_is_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[bool, list[int]] = {True: [], False: []}
    observe = replacement._Run.squared_errors

    def noted(run: replacement._Run, layer: nn.Module | None, batch: Tensor) -> Tensor:
        seen[torch.is_grad_enabled()] += batch.tolist()
        return observe(run, layer, batch)

    monkeypatch.setattr(replacement._Run, "squared_errors", noted)
    train_replacement(tiny_model("llama"), settings(1, 2), some_rows(37), seed=3)
    train, held_out = sorted(seen[True]), set(seen[False])
    assert len(held_out) == 2
    assert sorted([*train, *held_out]) == list(range(37))


def test_a_training_that_diverges_is_refused() -> None:
    with pytest.raises(UserError, match=r"layers 1..2: the trained layer is not finite any more; lower learning_rate"):
        train_replacement(tiny_model("llama"), settings(1, 2, learning_rate=1e30), some_rows(44), seed=0)


def test_a_run_that_changes_nothing_is_refused() -> None:
    model = tiny_model("llama")
    for layer in (1, 2):
        for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            nn.init.zeros_(decoder_layers(model)[layer].get_parameter(name))
    with pytest.raises(UserError, match=r"layers 1..2: change nothing in any state"):
        train_replacement(model, settings(1, 2), some_rows(4), seed=0)


def test_impossible_replacements_are_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(UserError, match=r"layers 4..6: this model's layers are 0..5"):
        train_replacement(model, settings(4, 5, 6), some_rows(4), seed=0)
    with pytest.raises(UserError, match=r"replace: 1 rows of 24 tokens, but one is needed to train on and one to test"):
        train_replacement(model, settings(1, 2), some_rows(1), seed=0)
