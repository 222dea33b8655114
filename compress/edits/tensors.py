"""Tensors of decoder layers: put into a model or its student, compared, and merged into one layer."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers

from ..surgery.cut_model import cut_model, kept_layers, layer_traits

log = logging.getLogger(__name__)

PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def merged_layer(model: PreTrainedModel, start: int, factors: Sequence[float]) -> dict[str, Tensor]:
    """Every parameter and every stored buffer of the layer that stands for those from ``start`` on, each times its
    factor; the factors add up to 1.

    It is one sum in float64, rounded to the stored dtype at its end. Experts are matched by their index. What a family
    keeps per layer outside its layers (Gemma 3n's embeddings) stays the first layer's.

    Raises:
        UserError: a run outside the model, layers of different kinds or shapes, tensors shared with other layers, or
            that differ and are not of floating point, an overflow.
    """
    run = check_run(model, start, len(factors))
    refuse_different_kinds(model, run)
    tensors = [layer_tensors(model, layer) for layer in run]
    where = {name: f"merge: {name} of layers {start}..{run[-1]}" for name in tensors[0]}
    merged = {name: combined([own[name] for own in tensors], factors, where=where[name]) for name in where}
    refuse_overflow({where[name]: tensor for name, tensor in merged.items()})
    return merged


def laco_factors(length: int) -> tuple[float, ...]:
    """The first layer plus the differences of all others to it (Yang et al. 2024, arXiv:2402.11187, equation 1):
    theta* = theta_l + sum_{k=1..m} (theta_{l+k} - theta_l), m = length - 1. The authors' code subtracts the running sum
    instead, which keeps nothing but the last layer."""
    return (2.0 - length, *[1.0] * (length - 1))


def with_layers(
    model: PreTrainedModel, drop: Sequence[int], layers: Mapping[int, Mapping[str, Tensor]], *, share: bool = False
) -> PreTrainedModel:
    """A new model without the layers ``drop``, in which the named ``layers`` have the given tensors.

    All indices are those of ``model``, which stays as it is; ``share`` is that of cut_model, and the given tensors are
    never copied.

    Raises:
        UserError: a cut that cut_model refuses; a layer that shares parameters with others.
    """
    for layer in layers:
        refuse_shared_parameters(model, layer)
    student = cut_model(model, drop, share=share)
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
    places = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    for name, tensor in tensors.items():
        old = places[name]
        assert (old.shape, old.dtype) == (tensor.shape, tensor.dtype), f"{name} belongs to another layer"
    for name, tensor in tensors.items():
        old, (owner, _, leaf) = places[name], name.rpartition(".")
        if isinstance(old, nn.Parameter) and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
        setattr(module.get_submodule(owner), leaf, tensor)
    return {name: places[name] for name in tensors}


def check_run(model: PreTrainedModel, start: int, length: int) -> range:
    """The indices of ``length`` layers from ``start`` on."""
    last = len(decoder_layers(model)) - 1
    if length < 1 or start < 0 or start + length - 1 > last:
        raise UserError(f"layers {start}..{start + length - 1}: this model has the layers 0 to {last}; name only these")
    return range(start, start + length)


def refuse_different_kinds(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Compare classes and plain attributes (attention kind, window, experts or not, ...) of layers, their shapes and
    what they compute from the configuration."""
    first, *others = layers
    expected = _kind(model, first)
    for layer in others:
        traits = _kind(model, layer)
        for trait in sorted(expected.keys() | traits.keys(), key=lambda name: (name.count("."), name)):
            if expected.get(trait) != traits.get(trait):
                raise UserError(
                    f"layers {first} and {layer} are of different kinds: {trait} is {expected.get(trait)!r} in one "
                    f"and {traits.get(trait)!r} in the other; choose layers of one kind"
                )


def layer_tensors(model: PreTrainedModel, layer: int) -> dict[str, Tensor]:
    """Parameters and stored buffers of one decoder layer by their names in it; the model's own storage."""
    refuse_shared_parameters(model, layer)
    module = decoder_layers(model)[layer]
    return {name: tensor.detach() for name, tensor in module.state_dict(keep_vars=True).items()}


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


def _kind(model: PreTrainedModel, layer: int) -> dict[str, object]:
    module = decoder_layers(model)[layer]
    shapes = {f"shape of {name}": shape for name, shape in shapes_of(model, layer).items()}
    computed = {
        f"computed {name}": buffer.tolist()
        for name, buffer in buffers(module, stored=False).items()
        if not buffer.is_meta
    }
    return {**layer_traits(module, layer), **shapes, **computed}


def shapes_of(model: PreTrainedModel, layer: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's parameters and stored buffers."""
    return {name: tuple(tensor.shape) for name, tensor in decoder_layers(model)[layer].state_dict().items()}


def buffers(module: nn.Module, *, stored: bool) -> dict[str, Tensor]:
    """Those that a checkpoint holds, or those that are computed from the configuration."""
    names = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if (name in names) == stored}


def combined(tensors: Sequence[Tensor], factors: Sequence[float], *, where: str) -> Tensor:
    """The weighted sum of ``tensors``, added up in float64; equal ones that are not of floating point as they are.

    Raises:
        UserError: others that are not of floating point; the message begins with ``where``.
    """
    if not tensors[0].is_floating_point():  # a table of the routing, for instance, or quantised weights
        if all(torch.equal(tensors[0], other) for other in tensors[1:]):
            return tensors[0].clone()
        raise UserError(f"{where} is {tensors[0].dtype} and differs; only floating-point numbers can be merged")
    # a factor of 0 is left out rather than multiplied: the merge of two by LaCo is then the second bit by bit
    (factor, tensor), *others = [pair for pair in zip(factors, tensors, strict=True) if pair[0] != 0]
    total = factor * tensor.double()
    for factor, tensor in others:
        total.add_(tensor.double(), alpha=factor)
    return total.to(tensors[0].dtype)


def refuse_overflow(sums: Mapping[str, Tensor]) -> None:
    """Raises UserError: a sum that is not finite; the message begins with its name. A GPU is asked once for all."""
    are_finite = torch.stack([tensor.isfinite().all() for tensor in sums.values()]).tolist()
    for (where, tensor), is_finite in zip(sums.items(), are_finite, strict=True):
        if not is_finite:
            raise UserError(f"{where} is not finite in {tensor.dtype}; choose factors nearer to 0..1, or fewer layers")
