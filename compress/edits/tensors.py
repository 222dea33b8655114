"""Tensors of decoder layers, put into a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers


@contextmanager
def tensors_in_place(model: PreTrainedModel, layers: Mapping[int, Mapping[str, Tensor]]) -> Iterator[PreTrainedModel]:
    """``model`` with the given tensors in the named layers until the block ends, when it has its own parameters back.

    Raises:
        UserError: a layer that shares parameters with others.
    """
    with ExitStack() as stack:
        for layer, tensors in layers.items():
            refuse_shared_parameters(model, layer)
            module = decoder_layers(model)[layer]
            stack.callback(put_tensors, module, put_tensors(module, tensors))
        yield model


def put_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make ``tensors`` the parameters and buffers of ``module`` that have their names, without a copy.

    Returns those that were there, of the same shapes and dtypes. What is a parameter already is put as it is.
    """
    places = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    for name, tensor in tensors.items():
        old = places[name]
        assert (old.shape, old.dtype) == (tensor.shape, tensor.dtype), f"{name} belongs to another layer"
    for name, tensor in tensors.items():
        old, (owner, _, leaf) = places[name], name.rpartition(".")
        if isinstance(old, nn.Parameter) and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
        setattr(module.get_submodule(owner), leaf, tensor)
    return {name: places[name] for name in tensors}


def refuse_shared_parameters(model: PreTrainedModel, layer: int) -> None:
    """Refuse a layer with a parameter that the model uses elsewhere too: new tensors would change other layers."""
    own = {id(parameter) for parameter in decoder_layers(model)[layer].parameters()}
    total = sum(id(parameter) in own for _, parameter in model.named_parameters(remove_duplicate=False))
    inside = len(list(decoder_layers(model)[layer].named_parameters(remove_duplicate=False)))
    if total > inside:
        raise UserError(
            f"layer {layer}: shares parameters with other layers of this {model.config.model_type} model, so it "
            "cannot have tensors of its own; choose other layers"
        )
