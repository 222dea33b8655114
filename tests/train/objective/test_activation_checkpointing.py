"""Selective checkpointing: what is kept, what is computed again, and that no number changes."""

from collections import Counter
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tiny import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainingArguments
from trl.models.utils import unwrap_model_for_generation

from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers
from shoal.train.objective.activation_checkpointing import checkpointing_kept, recompute_selectively


class Calls(TorchDispatchMode):
    """Counts what is really computed."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.counts[operation.overloadpacket.__name__] += 1
        return operation(*args, **(kwargs or {}))


def run(kind, tmp_path, settings):
    """Loss, gradients, and what the backward pass computed."""
    student = tiny_model(kind).train()
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    if settings is not None:
        arguments.activation_checkpointing_kwargs = dict(settings)
        recompute_selectively(student, arguments)
        # as the Trainer does
        student.activation_checkpointing_enable(
            activation_checkpointing_kwargs=arguments.activation_checkpointing_kwargs or None,
            every_n_layers=1,
            offload=False,
        )
    ids = torch.arange(24).reshape(2, 12)
    with torch.autocast("cpu", torch.bfloat16):
        loss = student(input_ids=ids, labels=ids, use_cache=False).loss
    with Calls() as calls:
        loss.backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return loss, gradients, calls.counts


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_products_are_kept_all_else_is_computed_again_and_no_bit_changes(kind, tmp_path):
    loss, gradients, calls = run(kind, tmp_path, None)
    again, gradients_again, calls_again = run(kind, tmp_path, {"selective": True})
    _, _, whole_layers = run(kind, tmp_path, {"use_reentrant": False})
    assert torch.equal(loss, again)
    assert gradients.keys() == gradients_again.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_again[name]), name
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert (calls_again["mm"], calls_again[attention]) == (calls["mm"], 0)
    assert whole_layers["mm"] > calls["mm"]
    assert whole_layers[attention] == 6
    assert calls_again["rsqrt"] > calls["rsqrt"]


def test_reentrant_checkpointing_is_refused_and_without_the_key_nothing_changes(tmp_path):
    student = tiny_model("llama")
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        activation_checkpointing_kwargs={"selective": True, "use_reentrant": True},
    )
    with pytest.raises(UserError, match="use_reentrant"):
        recompute_selectively(student, arguments)
    arguments.activation_checkpointing_kwargs = {"use_reentrant": True}
    recompute_selectively(student, arguments)
    assert "activation_checkpointing_enable" not in vars(student)


def test_checkpointing_of_some_layers_stays_so_where_text_is_written() -> None:
    student: Any = tiny_model("llama")
    student.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=2, offload=True)
    layers = decoder_layers(student)
    before = [(layer.gradient_checkpointing, layer._gradient_checkpointing_func) for layer in layers]
    assert {on for on, _ in before} == {True, False}
    with checkpointing_kept(student), unwrap_model_for_generation(student, Accelerator(cpu=True)):
        assert not student.is_gradient_checkpointing
    assert [(layer.gradient_checkpointing, layer._gradient_checkpointing_func) for layer in layers] == before
