"""Silence attention, MLP or heads of a student's layers for good: their output projections become zero.

0 * x adds nothing wherever x is finite, so the student gives the same bits there as its teacher with the operator in
force. Neither memory nor time is saved: see unsaved_parameters.

H query heads, d size of a head.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shoal.components import LayerEdit
from shoal.compress.edits.masks import Half, checked, with_halves, with_heads
from shoal.compress.edits.sublayers import adds_something, output_parameters, probe_ids, probing, sublayers, where
from shoal.compress.edits.tensors import PLAIN_DTYPES, put_tensors
from shoal.errors import UserError
from shoal.models.anatomy import anatomy, decoder_layers


@torch.no_grad()
def zero_half(half: Half, model: PreTrainedModel, layers: Collection[int]) -> list[str]:
    """Let the attention or MLP of ``layers`` add nothing for good; the names of the parameters that became zero.

    They are new tensors: what ``model`` shares with its teacher stays as it is there. A context or expert that is not
    finite gives NaN (0 * inf), where half_silenced gives zero.

    Raises:
        UserError: as half_silenced does; a half whose output weights shoal does not know, that are quantised, or
            that other layers use too. The model is then as it was.
    """
    names: list[str] = []
    for layer in layers:
        outputs = output_parameters(model, layer, with_halves(model, layer), half)
        if not outputs:
            raise UserError(
                f"{where(model, layer)}: shoal does not know which weights write its {half}'s output; drop whole layers"
            )
        names += [f"{_name_of(model, layer)}.{name}" for name in outputs]
    names = list(dict.fromkeys(names))
    _refuse_unzeroable(model, names)
    zeros = {name: torch.zeros_like(model.get_parameter(name)) for name in names}
    before = put_tensors(model, zeros, where="zero")
    if loud := _loud_layers(model, layers, half):
        put_tensors(model, before, where="zero")
        raise UserError(
            f"{where(model, loud[0])}: its {half} writes something even with {names[0]} and the like zeroed, so that a "
            "checkpoint cannot hold it silenced; drop whole layers"
        )
    return names


@torch.no_grad()
def zero_heads(model: PreTrainedModel, heads: Mapping[int, Sequence[int]]) -> list[str]:
    """Zero what output projections read from single query heads (layer -> heads); the names of the changed parameters.

    A bias of the projection stays: it belongs to no head.

    Raises:
        UserError: an index that is no layer or no head, a layer whose heads cannot be masked alone, or a projection
            that is quantised or that other layers use too.
    """
    masked: dict[str, Tensor] = {}
    for layer, named in heads.items():
        halves = with_heads(model, layer)
        checked(named, halves.num_heads, f"{where(model, layer)}: head")
        projection = decoder_layers(model)[layer].get_submodule(halves.projection)
        name = f"{_name_of(model, layer)}.{halves.projection}.weight"
        _refuse_unzeroable(model, [name])
        weight = model.get_parameter(name).detach().clone()
        # (D, H * d) of a linear map, (H * d, D) of GPT-2's
        inputs_dim = 0 if isinstance(projection, Conv1D) else 1
        weight.unflatten(inputs_dim, (halves.num_heads, -1)).index_fill_(
            inputs_dim, torch.tensor(list(named), device=weight.device), 0
        )
        masked[name] = weight
    put_tensors(model, masked, where="zero_heads")
    return list(masked)


def unsaved_parameters(model: PreTrainedModel, edits: Iterable[tuple[int, LayerEdit]]) -> int:
    """Parameters of ``model`` that no longer matter after ``edits`` but stay in the file and are still computed with.

    All of a skipped attention or MLP; of a masked head its share of the output projection. Layers are ``model``'s.

    Raises:
        UserError: as the operators do.
    """
    whole: dict[int, int] = {}  # by id: a parameter that several modules use is idle once
    shares: dict[int, int] = {}
    for layer, edit in edits:
        module = decoder_layers(model)[layer]
        if edit.part in ("attention", "mlp"):
            halves = with_halves(model, layer)
            names = halves.attention if edit.part == "attention" else halves.mlp_holders
            parameters = (parameter for name in names for parameter in module.get_submodule(name).parameters())
            whole |= {id(parameter): parameter.numel() for parameter in parameters}
        elif edit.part == "head":
            halves = with_heads(model, layer)
            weight = module.get_submodule(halves.projection).weight
            assert isinstance(weight, Tensor)
            shares[id(weight)] = weight.numel() * len(edit.indices) // halves.num_heads
    return sum((shares | whole).values())


def _loud_layers(model: PreTrainedModel, layers: Collection[int], half: Half) -> list[int]:
    """Those of ``layers`` whose half still adds something, on a few tokens."""
    loud: list[int] = []

    def listen(layer: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if adds_something(module, args, kwargs, output):
            loud.append(layer)

    with ExitStack() as stack, probing(model):
        for layer in layers:
            for name in getattr(sublayers(model)[layer], half):
                module = decoder_layers(model)[layer].get_submodule(name)
                stack.enter_context(
                    module.register_forward_hook(partial(listen, layer), with_kwargs=True, prepend=True)
                )
        model(input_ids=probe_ids(model), use_cache=False)
    return loud


def _refuse_unzeroable(model: PreTrainedModel, names: Sequence[str]) -> None:
    changed = {id(model.get_parameter(name)): name for name in names}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in changed and name not in names:
            raise UserError(
                f"{changed[id(parameter)]}: is also {name}, so zeroing it would change other layers too; "
                "drop whole layers"
            )
    for name in names:
        if (dtype := model.get_parameter(name).dtype) not in PLAIN_DTYPES:
            raise UserError(f"{name}: is stored as {dtype}, which is quantised; give the full-precision model")


def _name_of(model: PreTrainedModel, layer: int) -> str:
    return f"{anatomy(model).layers_name}.{layer}"


def zero_for_good(student: PreTrainedModel, edits: Iterable[tuple[int, LayerEdit]]) -> list[str]:
    """Let ``student`` do without what ``edits`` take out; returns the names of the parameters that became zero.

    Raises:
        UserError: as the two above.
    """
    zeroed: list[str] = []
    for layer, edit in edits:
        if edit.part == "head":
            zeroed += zero_heads(student, {layer: edit.indices})
        else:
            assert edit.part in ("attention", "mlp"), f"{edit.part} is not taken out by zeros"
            zeroed += zero_half(edit.part, student, [layer])
    return zeroed
