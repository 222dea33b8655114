"""Put another model's layers in the place of a model's own, or anything between the two.

This is the replacement of arXiv 2510.02091 (a distilled model's layer in its base): weight 1 is the donor, 0 the
model itself. The other direction is the call with the models exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shoal.errors import UserError
from shoal.models.anatomy import anatomy, text_config

from ..surgery.cut_model import layer_traits
from .masks import checked
from .tensors import PLAIN_DTYPES, buffers, put_tensors

Part = Literal["embeddings", "norm", "head"]

POSITION_SETTINGS = ("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor", "alibi")
SCALE_SETTINGS = (
    *("embedding_multiplier", "scale_emb", "scale_embedding"),
    *("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier"),
    *("final_logit_softcapping", "output_logit_soft_cap"),
)
"""Of the configuration, beside what the modules themselves show."""
ANOTHER_DONOR = "give a donor of the model's own shape"
_NOT_SWAPPABLE = f"; weights trained with the one do not fit the other: {ANOTHER_DONOR}"


@contextmanager
def swapped(
    model: PreTrainedModel,
    donor: PreTrainedModel,
    layers: Sequence[int],
    *,
    weight: float = 1.0,
    parts: Sequence[Part] = (),
) -> Iterator[PreTrainedModel]:
    """``model`` with the tensors of ``layers`` and ``parts`` at base + weight * (donor - base), until the block ends.

    ``parts``: `head` is the output head, `norm` the final norm, `embeddings` all other weights outside of the layers.
    With all layers and parts at weight 1 the model is the donor. Weights 0 and 1 are exact, and 1 copies nothing
    but what is tied in the donor only; others are calculated in float64 and rounded once to the stored dtype.

    Raises:
        UserError: models of different classes, sizes or dtypes; layers of different kinds (attention kind, norm
            epsilon, ...); different position encodings; a tensor that the model also uses outside of what is swapped,
            as tied embeddings are where only one of `embeddings` and `head` is named.
    """
    before = put_tensors(model, _mixed(model, donor, layers, weight, parts), where="swap")
    try:
        yield model
    finally:
        put_tensors(model, before, where="swap")


def refuse_unswappable(
    model: PreTrainedModel, donor: PreTrainedModel, layers: Sequence[int], parts: Sequence[Part]
) -> list[str]:
    """The names of the tensors to be swapped. Both models may be without data; buffers without are not compared.

    Raises:
        UserError: as swapped does, but for numbers that overflow.
    """
    ours, theirs = _stored(model), _stored(donor)
    names = _swapped_names(model, ours, layers, parts)
    _refuse_different_models(model, donor, layers, parts)
    _refuse_different_tensors(names, ours, theirs)
    if alone := sorted(set(_swapped_names(donor, theirs, layers, parts)) - ours.keys()):
        raise UserError(f"swap: the donor has a tensor {alone[0]}, which the model has not{_NOT_SWAPPABLE}")
    _refuse_different_buffers(model, donor, layers)
    _refuse_partial_ties(names, ours, theirs)
    return names


@torch.no_grad()
def _mixed(
    model: PreTrainedModel, donor: PreTrainedModel, layers: Sequence[int], weight: float, parts: Sequence[Part]
) -> dict[str, Tensor]:
    """What ``model`` gets, by its names; at weight 1 the donor's own tensors, at weight 0 nothing."""
    names, ours, theirs = refuse_unswappable(model, donor, layers, parts), _stored(model), _stored(donor)
    if weight == 0:
        return {}
    # what is tied in the model stays one tensor, put under both names; what is tied in the donor only becomes two
    by_pair: dict[tuple[int, int], Tensor] = {}
    taken: set[int] = set()
    for name in names:
        pair = id(ours[name]), id(theirs[name])
        if pair in by_pair:
            continue
        if weight != 1:
            by_pair[pair] = _between(name, ours[name], theirs[name], weight)
        else:
            # a tensor of the donor that is there already and taken once goes in as it is
            as_it_is = pair[1] not in taken and theirs[name].device == model.device
            copied = theirs[name].detach().to(model.device, copy=pair[1] in taken)
            by_pair[pair] = theirs[name] if as_it_is else _like(theirs[name], copied)
            taken.add(pair[1])
    return {name: by_pair[id(ours[name]), id(theirs[name])] for name in names}


def _between(name: str, ours: Tensor, theirs: Tensor, weight: float) -> Tensor:
    if ours.dtype not in PLAIN_DTYPES:
        if torch.equal(ours, theirs.to(ours.device)):
            return ours
        raise UserError(f"{name}: is stored as {ours.dtype}, of which there is nothing between; swap at weight 1")
    base = ours.double()
    mixed = (base + weight * (theirs.to(ours.device).double() - base)).to(ours.dtype)
    if not mixed.isfinite().all():
        raise UserError(f"{name}: is not finite in {ours.dtype} at weight {weight:g}; choose one nearer to 0..1")
    return _like(ours, mixed)


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    """``values`` as what ``tensor`` is, a parameter or none: under two names it must stay one of them."""
    return nn.Parameter(values, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


def _stored(model: PreTrainedModel) -> dict[str, Tensor]:
    """Everything that a checkpoint holds, by all names that it has in the model."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **buffers(model, stored=True)}


def _swapped_names(
    model: PreTrainedModel, stored: Mapping[str, Tensor], layers: Sequence[int], parts: Sequence[Part]
) -> list[str]:
    known = anatomy(model)
    checked(layers, len(known.layers), "layer")
    if unknown := set(parts) - {"embeddings", "norm", "head"}:
        raise UserError(f"swap: {min(unknown)!r} is no part; there is embeddings, norm and head")
    prefixes = {f"{known.layers_name}.{layer}." for layer in layers}

    def part_of(name: str) -> Part | None:
        if name.startswith(f"{known.layers_name}."):
            return None
        if known.head_name and name.startswith(f"{known.head_name}."):
            return "head"
        return "norm" if known.final_norm_name and name.startswith(f"{known.final_norm_name}.") else "embeddings"

    return [name for name in stored if name.startswith(tuple(prefixes)) or part_of(name) in parts]


def _refuse_different_models(
    model: PreTrainedModel, donor: PreTrainedModel, layers: Sequence[int], parts: Sequence[Part]
) -> None:
    if type(model) is not type(donor):
        raise UserError(
            f"swap: the donor is a {type(donor).__name__}, the model a {type(model).__name__}; {ANOTHER_DONOR}"
        )
    ours, theirs = anatomy(model), anatomy(donor)
    if len(ours.layers) != len(theirs.layers):
        raise UserError(
            f"swap: the donor has {len(theirs.layers)} layers, the model {len(ours.layers)}; {ANOTHER_DONOR}"
        )
    settings = (*POSITION_SETTINGS, *(SCALE_SETTINGS if parts else ()))
    for name in settings:
        our, their = (getattr(text_config(side.config), name, None) for side in (model, donor))
        _refuse(f"{name} of the configuration", our, their)
    for layer in layers:
        old, new = (_kind(side.layers[layer], layer) for side in (ours, theirs))
        for trait in sorted(old.keys() | new.keys(), key=lambda name: (name.count("."), name)):
            _refuse(f"layer {layer}: {trait.lstrip('.')}", old.get(trait), new.get(trait))
    if "norm" in parts and ours.final_norm and theirs.final_norm:
        old, new = (_kind(norm, 0) for norm in (ours.final_norm, theirs.final_norm))
        for trait in old:
            _refuse(f"the final norm: {trait.lstrip('.')}", old[trait], new.get(trait))


def _refuse_different_buffers(model: PreTrainedModel, donor: PreTrainedModel, layers: Sequence[int]) -> None:
    """Of those that are computed from the configuration, in the swapped layers and outside of all layers."""
    ours = anatomy(model)
    layer_prefixes = tuple(f"{ours.layers_name}.{layer}." for layer in range(len(ours.layers)) if layer not in layers)
    computed = buffers(donor, stored=False)
    for name, buffer in buffers(model, stored=False).items():
        if name.startswith(layer_prefixes):
            continue
        other = computed.get(name)
        if other is None or buffer.shape != other.shape or not _is_equal(buffer, other):
            raise UserError(
                f"swap: {name}, computed from the configuration, is another one in the donor{_NOT_SWAPPABLE}"
            )


def _is_equal(buffer: Tensor, other: Tensor) -> bool:
    return buffer.is_meta or other.is_meta or torch.equal(buffer, other.to(buffer.device))


def _refuse(what: str, ours: Any, theirs: Any) -> None:
    if ours != theirs:
        raise UserError(f"swap: {what} is {theirs!r} in the donor, but {ours!r} in the model{_NOT_SWAPPABLE}")


def _kind(module: nn.Module, index: int) -> dict[str, Any]:
    """Classes and plain attributes; dropout, which acts in training only, aside."""
    traits = layer_traits(module, index)
    return {name: value for name, value in traits.items() if "dropout" not in name}


def _refuse_different_tensors(names: Sequence[str], ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    for name in names:
        old, new = ours[name], theirs.get(name)
        if new is None or old.shape != new.shape:
            shape = "missing" if new is None else f"of shape {tuple(new.shape)}"
            raise UserError(
                f"swap: {name} is {shape} in the donor, and of shape {tuple(old.shape)} in the model; {ANOTHER_DONOR}"
            )
        if old.dtype != new.dtype:
            raise UserError(
                f"swap: {name} is {new.dtype} in the donor, and {old.dtype} in the model; "
                "save or load one of them in the other's dtype first"
            )


def _refuse_partial_ties(names: Sequence[str], ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    first: dict[int, str] = {}
    for name in names:
        other = first.setdefault(id(ours[name]), name)
        if theirs[name] is not theirs[other]:
            raise UserError(
                f"swap: {other} and {name} are one tensor in the model, but two in the donor; swap neither of them, or "
                f"{ANOTHER_DONOR}"
            )
    for name, tensor in ours.items():
        other = first.get(id(tensor))
        if other is not None and name not in names:
            raise UserError(
                f"swap: {other} is one tensor with {name}, which is not swapped; swap both of them or none "
                "(tied embeddings: parts: [embeddings, head])"
            )
