"""Tensors of decoder layers, put into a model or its student."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers

from ..surgery.cut_model import cut_model, kept_layers


def with_layers(
    model: PreTrainedModel, drop: Sequence[int], layers: Mapping[int, Mapping[str, Tensor]]
) -> PreTrainedModel:
    """A new model without the layers ``drop``, in which the named ``layers`` have the given tensors.

    All indices are those of ``model``, which stays as it is. No tensor is copied: the new model shares its own with it.

    Raises:
        UserError: a cut that cut_model refuses; a layer that shares parameters with others.
    """
    for layer in layers:
        refuse_shared_parameters(model, layer)
    student = cut_model(model, drop, share=True)
    keep = kept_layers(len(decoder_layers(model)), drop)
    for layer, tensors in layers.items():
        put_tensors(decoder_layers(student)[keep.index(layer)], tensors)
    return student


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
