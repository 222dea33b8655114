"""Merge neighbouring decoder layers into one; put new tensors into the layers of a student."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers

from ..surgery.cut_model import cut_model, kept_layers, layer_traits

log = logging.getLogger(__name__)

Method = Literal["laco", "weighted"]
LARGEST_GROWTH = 1.5
"""Layers near each other give 1; those that have nothing in common 1.7 (three of them), 2.6 (four), 3.6 (five)."""


@torch.no_grad()
def merged_layer(
    model: PreTrainedModel,
    start: int,
    length: int,
    *,
    method: Method = "laco",
    weights: Sequence[float] | None = None,
    warn: bool = True,
) -> dict[str, Tensor]:
    """Every parameter and every stored buffer of the layer that stands for ``length`` layers from ``start`` on.

    `laco` is the first layer plus the differences of all others to it (Yang et al. 2024, arXiv:2402.11187, equation 1):
    theta* = theta_l + sum_{k=1..m} (theta_{l+k} - theta_l), m = length - 1. The authors' code subtracts the running sum
    instead, which keeps nothing but the last layer. `weighted` is sum_k w_k theta_{l+k}; without ``weights`` the mean.
    Both are linear, so they are one sum in float64, rounded to the stored dtype at its end. Experts are matched by
    their index. What a family keeps per layer outside its layers (Gemma 3n's embeddings) stays the first layer's.
    ``warn``: log where the merged weights grow far beyond those of the layers; for those who only try.

    Raises:
        UserError: a run outside the model, layers of different kinds or shapes, tensors shared with other layers, or
            that differ and are not of floating point, weights that do not fit or do not add up to 1, an overflow.
    """
    factors = _factors(length, method, weights)
    run = check_run(model, start, length)
    refuse_different_kinds(model, run)
    tensors = [layer_tensors(model, layer) for layer in run]
    merged = {
        name: combined([own[name] for own in tensors], factors, where=f"merge: {name} of layers {start}..{run[-1]}")
        for name in tensors[0]
    }
    if overflown := [name for name, tensor in merged.items() if not tensor.isfinite().all()]:
        raise UserError(
            f"merge of layers {start}..{run[-1]}: {overflown[0]} is not finite in {merged[overflown[0]].dtype}; "
            "merge fewer layers, or load the model with dtype: float32"
        )
    grown = _size(merged) / _size(tensors[0])
    if warn and grown > LARGEST_GROWTH:
        log.warning(
            "merge of layers %d..%d: the merged weights are %.1f times as large as those of layer %d, since the layers "
            "are far from each other; that is often worse than dropping them: evaluate it, or use method: weighted",
            *(start, run[-1], grown, start),
        )
    return merged


def with_layers(
    model: PreTrainedModel,
    drop: Sequence[int],
    layers: Mapping[int, Mapping[str, Tensor]],
    *,
    inserted: Mapping[int, Mapping[str, Tensor]] = MappingProxyType({}),
    share: bool = False,
) -> PreTrainedModel:
    """A new model without the layers ``drop``, in which the named ``layers`` have the given tensors.

    After each layer that ``inserted`` names comes a new one of its kind, with the tensors given there. All indices are
    those of ``model``, which stays as it is; ``share`` is that of cut_model, and the given tensors are never copied.

    Raises:
        UserError: a cut that cut_model refuses; a layer that is dropped as well; tensors that have no place in it.
    """
    dropped = set(drop)
    if gone := sorted(layers.keys() & dropped):
        raise UserError(f"layer {gone[0]}: is dropped and given new tensors at once; do one of them")
    for layer in (*layers, *inserted):
        check_run(model, layer, 1)
        refuse_shared_parameters(model, layer)
    student = cut_model(model, drop, insert=inserted.keys(), share=share)
    keep = kept_layers(len(decoder_layers(model)), drop, inserted.keys())
    for layer, tensors in layers.items():
        put_tensors(decoder_layers(student)[keep.index(layer)], tensors, where=f"layer {layer}")
    for layer, tensors in inserted.items():
        put_tensors(decoder_layers(student)[keep.index(layer) + 1], tensors, where=f"new layer after {layer}")
    return student


@contextmanager
def tensors_in_place(model: PreTrainedModel, layers: Mapping[int, Mapping[str, Tensor]]) -> Iterator[PreTrainedModel]:
    """``model`` with the given tensors in the named layers until the block ends, when it has its own parameters back.

    Raises:
        UserError: tensors that have no place in their layer, a layer that shares parameters with others.
    """
    with ExitStack() as stack:
        for layer, tensors in layers.items():
            check_run(model, layer, 1)
            refuse_shared_parameters(model, layer)
            module, where = decoder_layers(model)[layer], f"layer {layer}"
            own = put_tensors(module, tensors, where=where)
            stack.callback(put_tensors, module, own, where=where)
        yield model


def put_tensors(module: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> dict[str, Tensor]:
    """Make ``tensors`` the parameters and buffers of ``module`` that have their names, without a copy.

    Returns those that were there. What is a parameter already is put as it is.

    Raises:
        UserError: a name, shape or dtype that the module has not; the message begins with ``where``.
    """
    places = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    for name, tensor in tensors.items():
        old = places.get(name)
        if old is None:
            raise UserError(f"{where}: has no tensor {name}; these tensors are another layer's")
        if (old.shape, old.dtype) != (tensor.shape, tensor.dtype):
            raise UserError(
                f"{where}: {name} is {old.dtype} {tuple(old.shape)}, but {tensor.dtype} {tuple(tensor.shape)} is to "
                "take its place; these tensors are another layer's"
            )
    for name, tensor in tensors.items():
        old, (owner, _, leaf) = places[name], name.rpartition(".")
        if isinstance(old, nn.Parameter) and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
        setattr(module.get_submodule(owner), leaf, tensor)
    return {name: places[name] for name in tensors}


def check_run(model: PreTrainedModel, start: int, length: int) -> range:
    """The indices of ``length`` layers from ``start`` on.

    Raises:
        UserError: some of them are no layers of the model.
    """
    last = len(decoder_layers(model)) - 1
    if length < 1 or start < 0 or start + length - 1 > last:
        raise UserError(f"layers {start}..{start + length - 1}: this model's layers are 0..{last}; name only these")
    return range(start, start + length)


def mean_of_layers(model: PreTrainedModel, layers: Sequence[int]) -> dict[str, Tensor]:
    """Every parameter and every stored buffer of a layer that is the mean of ``layers``, whatever attention they have.

    Raises:
        UserError: as refuse_different_shapes; tensors that are shared with other layers, or that differ and are not of
            floating point.
    """
    refuse_different_shapes(model, layers)
    tensors = [layer_tensors(model, layer) for layer in layers]
    where = " and ".join(map(str, layers))
    factors = (1 / len(layers),) * len(layers)
    return {
        name: combined([own[name] for own in tensors], factors, where=f"mean: {name} of layers {where}")
        for name in tensors[0]
    }


def refuse_different_shapes(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Refuse layers of which no tensors can be calculated together.

    Raises:
        UserError: naming the first tensor that one of them lacks or has in another shape.
    """
    first, *others = layers
    expected = _shapes(model, first)
    for layer in others:
        own = _shapes(model, layer)
        if differing := sorted(name for name in expected.keys() | own.keys() if expected.get(name) != own.get(name)):
            name = differing[0]
            shapes = f"{expected.get(name)} in one and {own.get(name)} in the other"
            raise UserError(
                f"layers {first} and {layer} hold different tensors: the shape of {name} is {shapes}, so that no "
                "weights can be calculated from both; choose another init"
            )


def refuse_different_kinds(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Compare classes and plain attributes (attention kind, window, experts or not, ...) of layers, and their shapes.

    Raises:
        UserError: one that is not the same in all of them.
    """
    first, *others = layers
    expected = _kind(model, first)
    for layer in others:
        traits = _kind(model, layer)
        for trait in sorted(expected.keys() | traits.keys(), key=lambda name: (name.count("."), name)):
            if expected.get(trait) != traits.get(trait):
                raise UserError(
                    f"layers {first} and {layer} are of different kinds: {trait} is {expected.get(trait)!r} in one and "
                    f"{traits.get(trait)!r} in the other; only layers of one kind can stand for each other"
                )
        computed = buffers(decoder_layers(model)[layer], stored=False)  # part of its kind
        for name, buffer in buffers(decoder_layers(model)[first], stored=False).items():
            if not buffer.is_meta and not torch.equal(buffer, computed[name]):
                raise UserError(
                    f"layers {first} and {layer} are of different kinds: their computed {name} differs; "
                    "only layers of one kind can stand for each other"
                )


def layer_tensors(model: PreTrainedModel, layer: int) -> dict[str, Tensor]:
    """Parameters and stored buffers of one decoder layer by their names in it; the model's own storage.

    Raises:
        UserError: one that other layers use too.
    """
    refuse_shared_parameters(model, layer)
    module = decoder_layers(model)[layer]
    return {name: tensor.detach() for name, tensor in module.state_dict(keep_vars=True).items()}


def refuse_shared_parameters(model: PreTrainedModel, layer: int) -> None:
    """Refuse a layer with a parameter that the model uses elsewhere too: new tensors would change other layers.

    Raises:
        UserError: there is one.
    """
    own = {id(parameter) for parameter in decoder_layers(model)[layer].parameters()}
    total = sum(id(parameter) in own for _, parameter in model.named_parameters(remove_duplicate=False))
    inside = len(list(decoder_layers(model)[layer].named_parameters(remove_duplicate=False)))
    if total > inside:
        raise UserError(
            f"layer {layer}: shares parameters with other layers of this {model.config.model_type} model, "
            "so it cannot get tensors of its own; choose other layers"
        )


def _kind(model: PreTrainedModel, layer: int) -> dict[str, object]:
    module = decoder_layers(model)[layer]
    shapes = {f"shape of {name}": shape for name, shape in _shapes(model, layer).items()}
    return {**layer_traits(module, layer), **shapes}


def _shapes(model: PreTrainedModel, layer: int) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in decoder_layers(model)[layer].state_dict().items()}


def buffers(module: nn.Module, *, stored: bool) -> dict[str, Tensor]:
    """Those that a checkpoint holds, or those that are computed from the configuration."""
    names = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if (name in names) == stored}


def _factors(length: int, method: Method, weights: Sequence[float] | None) -> tuple[float, ...]:
    """What each layer of the run counts for; they add up to 1."""
    if length < 2:
        raise UserError(f"merge of {length} layers: takes at least two")
    if method == "laco":
        if weights is not None:
            raise UserError("merge: weights have no effect on laco; leave them out, or choose method weighted")
        return (2.0 - length, *[1.0] * (length - 1))
    if method != "weighted":
        raise UserError(f"merge: {method!r} is no method; there is laco and weighted")
    if weights is None:
        return (1 / length,) * length
    if len(weights) != length:
        raise UserError(f"merge: has {len(weights)} weights for {length} layers; give one per layer")
    if not math.isclose(sum(weights), 1, abs_tol=1e-6):  # NaN and infinity are not close either
        raise UserError(f"merge: weights add up to {sum(weights):g}; let them add up to 1")
    return tuple(weights)


def _size(tensors: Mapping[str, Tensor]) -> float:
    """Euclidean norm of all matrices together."""
    return math.hypot(*(tensor.float().norm().item() for tensor in tensors.values() if tensor.ndim > 1))


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
