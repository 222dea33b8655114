"""One layer trained to stand for a run: its objective against whole models in float64, and what stays as it was."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from architectures import tiny_model as architectures_model
from model_outputs import logits
from tiny import KINDS, SHAPE, VOCAB_SIZE, tiny_model, tiny_moe
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from shoal.compress.edits.tensors import with_layers
from shoal.compress.surgery.cut_model import cut_model
from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.lab import replace as replacement
from shoal.lab.replace import Settings, TrainedLayer, train_replacement
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


def test_a_run_of_other_kinds_is_replaced_by_a_layer_of_the_firsts_kind() -> None:
    model = tiny_model("gemma3")
    trained = train_replacement(model, settings(1, 2, 3), some_rows(32), seed=0)
    student = with_layers(model, (2, 3), {1: trained.tensors})
    assert [layer_type == "full_attention" for layer_type in student.config.layer_types] == [False, False, False, True]
    assert decoder_layers(student)[1].get_submodule("self_attn").is_sliding


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


def test_a_start_that_has_no_layers_to_come_from_is_refused() -> None:
    model = tiny_model("llama")
    for layers, where in (((0, 1), "below"), ((4, 5), "above")):
        with pytest.raises(UserError, match=rf"lesa predicts from the layers on both sides, and there is none {where}"):
            train_replacement(model, settings(*layers, init="lesa"), some_rows(4), seed=0)
    mixed = architectures_model("qwen3_moe")
    with pytest.raises(UserError, match=r"layers 2 and 3 hold different tensors: the shape of mlp\."):
        train_replacement(mixed, settings(2, 3, init="mean"), some_rows(4), seed=0)


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
def test_equal_seeds_give_equal_bits_and_others_do_not() -> None:
    model = tiny_model("llama")
    torch.manual_seed(1)
    first = train_replacement(model, settings(2, 3), some_rows(24), seed=5)
    torch.manual_seed(2)
    again = train_replacement(model, settings(2, 3), some_rows(24), seed=5)
    assert same(first, again)
    assert (first.error, first.initial_error) == (again.error, again.initial_error)
    assert not same(first, train_replacement(model, settings(2, 3), some_rows(24), seed=6))


@pytest.mark.prove
def test_dropout_is_off_although_gpt2_has_it() -> None:
    model = tiny_gpt2()
    assert model.config.resid_pdrop > 0
    run = run_of(model, 1, 2, some_rows(2))
    layer = decoder_layers(model)[1]
    assert torch.equal(run.squared_errors(layer, torch.arange(2)), run.squared_errors(layer, torch.arange(2)))
    assert same(*(train_replacement(model, settings(1, 2), some_rows(8), seed=0) for _ in range(2)))


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
def test_steps_smaller_than_bfloat16_can_hold_are_not_lost() -> None:
    """With a learning rate under half a unit in the last place, plain bfloat16 weights would never move."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    norm = decoder_layers(model)[1].get_parameter("input_layernorm.weight")
    assert norm.min() > 0.5  # so that its units are 2**-8 of it or more
    trained = train_replacement(model, settings(1, 2, 3, learning_rate=4e-4), some_rows(160), seed=0)
    assert (trained.tensors["input_layernorm.weight"] != norm).float().mean() > 0.3


def test_the_target_of_a_run_that_ends_with_the_model_is_not_behind_its_norm() -> None:
    model = model_of("llama")
    rows = some_rows(2)
    _, _, target = run_of(model, 3, 5, rows).observe(torch.arange(2))
    decoder = model.get_decoder()
    inputs = {"input_ids": rows.input_ids_NS, "position_ids": rows.position_ids_NS.long(), "use_cache": False}
    after_norm = decoder(**inputs, output_hidden_states=True).hidden_states[-1]
    assert not torch.allclose(target, after_norm)
    torch.testing.assert_close(decoder.norm(target), after_norm)


def test_nothing_behind_the_run_is_computed() -> None:
    model = model_of("llama")
    called: list[int] = []
    for index, layer in enumerate(decoder_layers(model)):
        layer.register_forward_hook(lambda *_, index=index: called.append(index))
    model.get_decoder().norm.register_forward_hook(lambda *_: called.append(-1))
    run_of(model, 1, 3, some_rows(2)).observe(torch.arange(2))
    assert called == [0, 1, 2, 3]


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


@pytest.mark.prove
def test_progress_and_errors_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="shoal"):
        train_replacement(tiny_model("llama"), settings(1, 2, 3), some_rows(44), seed=0)
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0].startswith("replace: layers 1..3 by one: error of 1 alone 0.")
    assert messages[-2].startswith("replace: layers 1..3: step 11 of 11, error 0.")
    assert messages[-1].startswith("replace: layers 1..3 by one: error 0.")


def test_a_layer_that_training_did_not_help_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    train_replacement(tiny_model("llama"), settings(1, 2, 3, learning_rate=1e-12), some_rows(4), seed=0)
    (record,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert "is no better than layer 1 as it is; raise num_tokens" in record.getMessage()


def test_a_training_that_diverges_is_refused() -> None:
    with pytest.raises(UserError, match=r"layers 1..2: the trained layer is not finite any more; lower learning_rate"):
        train_replacement(tiny_model("llama"), settings(1, 2, learning_rate=1e30), some_rows(44), seed=0)


def test_states_that_overflow_are_refused() -> None:
    model = tiny_model("llama").half()
    nn.init.constant_(decoder_layers(model)[2].get_parameter("mlp.down_proj.weight"), 60_000)
    with pytest.raises(UserError, match=r"layers 1..2: their states overflow in torch.float16; set dtype: bfloat16"):
        train_replacement(model, settings(1, 2), some_rows(4), seed=0)


def test_a_run_that_changes_nothing_is_refused() -> None:
    model = tiny_model("llama")
    for layer in (1, 2):
        for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            nn.init.zeros_(decoder_layers(model)[layer].get_parameter(name))
    with pytest.raises(
        UserError, match=r"layers 1..2: change nothing in any state, so there is nothing to train; drop"
    ):
        train_replacement(model, settings(1, 2), some_rows(4), seed=0)


def test_a_layer_that_remembers_is_refused() -> None:
    model = tiny_model("llama")
    counted: list[int] = []

    def drift(_: nn.Module, __: Any, output: Any) -> Tensor:
        counted.append(1)
        return output + len(counted)

    decoder_layers(model)[1].register_forward_hook(drift)
    with pytest.raises(UserError, match=r"layer 1 of this llama model gives another output when it is called again"):
        train_replacement(model, settings(1, 2), some_rows(4), seed=0)


def test_a_layer_that_shares_its_parameters_is_refused() -> None:
    model = tiny_model("llama")
    layers = decoder_layers(model)
    setattr(layers[5].get_submodule("mlp.up_proj"), "weight", layers[1].get_parameter("mlp.up_proj.weight"))  # noqa: B010
    with pytest.raises(UserError, match=r"layer 1: shares parameters with other layers"):
        train_replacement(model, settings(1, 2), some_rows(4), seed=0)


def test_a_quantised_layer_is_refused() -> None:
    model = tiny_model("llama")
    codes = nn.Parameter(torch.ones(48, 32, dtype=torch.int8), requires_grad=False)
    setattr(decoder_layers(model)[1].get_submodule("mlp.up_proj"), "weight", codes)  # noqa: B010
    with pytest.raises(UserError, match=r"replace: layer 1 is quantised and cannot be trained; give the full-precisi"):
        train_replacement(model, settings(1, 2), some_rows(4), seed=0)
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(UserError, match=r"replace: layer 1 is quantised"):
        train_replacement(model, settings(1, 2), some_rows(4), seed=0)


def test_a_table_of_integers_is_the_firsts() -> None:
    """DeepSeek-V4 routes the tokens of its first layers by one."""
    model = tiny_model("llama")
    for index, layer in enumerate(decoder_layers(model)):
        layer.register_buffer("table", torch.tensor([index]))
    assert train_replacement(model, settings(1, 2), some_rows(4), seed=0).tensors["table"].tolist() == [1]


def test_impossible_replacements_are_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(UserError, match=r"layers 4..6: this model's layers are 0..5"):
        train_replacement(model, settings(4, 5, 6), some_rows(4), seed=0)
    with pytest.raises(UserError, match=r"replace: 1 rows of 24 tokens, but one is needed to train on and one to test"):
        train_replacement(model, settings(1, 2), some_rows(1), seed=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gemma3", "qwen3_moe"])
def test_an_accelerator_learns_what_the_processor_learns(kind: str, dtype: torch.dtype) -> None:
    model = model_of(kind).to(dtype)
    expected = train_replacement(model, settings(1, 2, 3), some_rows(160), seed=0)
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    found = train_replacement(model.to(accelerator), settings(1, 2, 3), some_rows(160), seed=0)
    assert {tensor.device.type for tensor in found.tensors.values()} == {accelerator.type}
    assert found.initial_error == pytest.approx(expected.initial_error, rel=0.02)
    assert found.error == pytest.approx(expected.error, rel=0.05)
