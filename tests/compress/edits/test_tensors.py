"""Tensors of layers in a model or its student; the model has its own again afterwards."""

from __future__ import annotations

import pytest
import torch
from model_outputs import logits
from tiny import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from shoal.compress.edits.tensors import tensors_in_place
from shoal.compress.surgery.cut_model import cut_model, skipped
from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers


def tensors(model: PreTrainedModel, layer: int, *, factor: float = 1.0) -> dict[str, Tensor]:
    return {name: factor * tensor for name, tensor in decoder_layers(model)[layer].state_dict().items()}


def test_parameters_shared_with_other_layers_are_refused() -> None:
    model = tiny_model("llama")
    layers = decoder_layers(model)
    setattr(layers[5].get_submodule("mlp.up_proj"), "weight", layers[2].get_parameter("mlp.up_proj.weight"))  # noqa: B010
    shares = r"layer 5: shares parameters with other layers of this llama model"
    with pytest.raises(UserError, match=shares), tensors_in_place(model, {5: {}}):
        pass


def test_tensors_in_place_are_the_student_with_layers_skipped_and_leave_the_teacher_as_it_was() -> None:
    model = tiny_model("gemma3")
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    intact = logits(model)
    made = {3: tensors(model, 3, factor=0.5)}
    with tensors_in_place(model, made), skipped(model, (4,)):
        changed = logits(model)
        assert not torch.equal(changed, intact)
    with tensors_in_place(model, made):
        student = cut_model(model, (4,), share=True)
    assert torch.equal(logits(student), changed)
    assert torch.equal(logits(model), intact)
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]  # an optimizer would find its own parameters
        assert torch.equal(parameter, before[name][1])
