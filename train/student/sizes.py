"""Sizes of models that are built without their weights. B rows, S sequence, D hidden.

What autograd keeps is not a table's: the student runs once without data (torch's fake tensors) and the tensors saved
for the backward pass are counted, so that every family, precision, adapter and frozen layer is counted as it is.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedConfig, PreTrainedModel, masking_utils
from transformers.initialization import no_init_weights

from shoal.models.anatomy import anatomy, decoder_layers, text_config
from shoal.models.attention import implementation, without_kernels
from shoal.models.load import automatic_class, num_parameters

from ..objective.objective import final_hidden, output_head
from .lora import LINEAR


@dataclass(frozen=True)
class Kept:
    """Bytes that autograd keeps for the backward pass."""

    fixed: int = 0
    """Bytes whatever the batch: low-precision copies of the weights, tables of positions."""
    per_row: int = 0
    """Bytes per row of the micro-batch."""

    def of(self, rows: int) -> int:
        """For a micro-batch."""
        return self.fixed + rows * self.per_row


@dataclass(frozen=True)
class LayerSize:
    """One decoder layer."""

    parameters: int
    """Weights of the layer."""
    trained: int
    """Weights that are trained, adapters among them."""
    matrices: int
    """Weights of linear maps: two floating point operations each per token."""
    trained_matrices: int = 0
    """Trained weights of linear maps."""
    frozen_linear: int = 0
    """Weights of linear modules that are frozen and the teacher's."""
    kept: Kept = Kept()
    """Bytes that autograd keeps of the layer."""


@dataclass(frozen=True)
class ModelSize:
    """A model that was built without its weights."""

    parameters: int
    """Weights, tied ones counted once."""
    trained: int
    """Weights that are trained, adapters among them."""
    layers: tuple[LayerSize, ...]
    head: int
    """Weights of the map to the vocabulary."""
    head_trained: bool
    vocabulary: int
    """Rows of the map to the vocabulary."""
    hidden: int
    """Size of the hidden states."""
    state_bytes: int
    """Bytes of one number of the hidden states."""
    pair_flops: int
    """Floating point operations of one layer's attention per pair of tokens: scores and values, all heads."""
    frozen_linear: int = 0
    """Weights of linear modules and plain embeddings that are frozen and the teacher's; tied ones once."""
    outside: Kept = Kept()
    """Bytes that autograd keeps before the first layer and after the last one."""


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Models built and run here have shapes and no numbers, and take no memory.

    Modules are not moved: there is nothing to move, and torch cannot where something looks at a tensor without data.
    """
    unmoved = patch.object(nn.Module, "to", lambda module, *_args, **_kwargs: module)
    with unmoved, FakeTensorMode(allow_non_fake_inputs=True), no_init_weights():
        yield


def built(config: PreTrainedConfig, *, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The causal language model of ``config``, its weights whatever the surrounding context makes of them."""
    kernels = implementation(attention, config)
    model = automatic_class(config).from_config(copy.deepcopy(config), attn_implementation=kernels, dtype=dtype)
    model.tie_weights()  # is part of the initialisation that shapes_only leaves out
    return model


def teacher_size(config: PreTrainedConfig, *, attention: str = "sdpa") -> ModelSize:
    """Sizes of a model that nothing is trained of."""
    with shapes_only():
        model = built(config, dtype=torch.bfloat16, attention=without_kernels(attention, config)).requires_grad_(False)
        return _sizes(model)


def student_size(
    config: PreTrainedConfig,
    *,
    sequence_length: int,
    prepare: Callable[[PreTrainedModel], object],
    dtype: torch.dtype = torch.float32,
    autocast: bool = True,
    attention: str = "sdpa",
    changed: Collection[int] = (),
) -> ModelSize:
    """Sizes of the student, and what autograd keeps of one row of ``sequence_length`` tokens per layer.

    ``prepare`` freezes what is not trained and adds what else is. The row holds several documents, as packed rows do:
    masks then are tensors. flash makes none: for it the row is one document. ``changed`` layers are not the
    teacher's, trained or not.

    Raises:
        RuntimeError: the family looks at numbers while it runs, as mixtures of experts may.
    """
    one_document = patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    with shapes_only():
        model = built(config, dtype=dtype, attention=without_kernels(attention, config))
        prepare(model)
        model.train()
        with one_document if attention == "flash" else contextlib.nullcontext():
            of_one_row, state_bytes = _kept(model, 1, sequence_length, autocast=autocast)
            of_two_rows, _ = _kept(model, 2, sequence_length, autocast=autocast)
        *layers, outside = (Kept(2 * a - b, b - a) for a, b in zip(of_one_row, of_two_rows, strict=True))
        sizes = _sizes(model, changed)
    counted = tuple(replace(layer, kept=kept) for layer, kept in zip(sizes.layers, layers, strict=True))
    return replace(sizes, layers=counted, outside=outside, state_bytes=state_bytes)


def _kept(model: PreTrainedModel, rows: int, length: int, *, autocast: bool) -> tuple[list[int], int]:
    """Bytes saved for the backward pass by each layer and, last, outside of them; and a hidden number's bytes."""
    layers = decoder_layers(model)
    totals, where = [0] * (len(layers) + 1), [len(layers)]
    seen: dict[int, Tensor] = {}  # the tensors too: an address may be used again once its owner is gone
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and storage._cdata not in seen:
            seen[storage._cdata] = tensor
            totals[where[0]] += storage.nbytes()
        return tensor

    handles = []
    for index, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(lambda *_, index=index: where.__setitem__(0, index)))
        handles.append(layer.register_forward_hook(lambda *_: where.__setitem__(0, len(layers))))
    ids = torch.zeros(rows, length, dtype=torch.long)
    positions = (torch.arange(length) % max(2, length // 2)).repeat(rows, 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden_BSD = final_hidden(model, ids, positions)
    for handle in handles:
        handle.remove()
    return totals, hidden_BSD.element_size()


def _sizes(model: PreTrainedModel, changed: Collection[int] = ()) -> ModelSize:
    config, head = text_config(model.config), output_head(model)
    heads = getattr(config, "num_attention_heads", 0)
    width = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
    layers = tuple(_layer_size(layer, index in changed) for index, layer in enumerate(decoder_layers(model)))
    outside = _outside(model)
    return ModelSize(
        parameters=num_parameters(model),
        trained=_trained(model.parameters()),
        layers=layers,
        head=head.weight.numel(),
        head_trained=head.weight.requires_grad,
        vocabulary=head.weight.shape[0],
        hidden=config.hidden_size,
        state_bytes=head.weight.element_size(),
        pair_flops=4 * heads * width,
        frozen_linear=sum(layer.frozen_linear for layer in layers)
        + sum(p.numel() for p, kinds in outside.items() if not p.requires_grad and kinds <= {*LINEAR, nn.Embedding}),
    )


def _layer_size(layer: nn.Module, is_changed: bool) -> LayerSize:
    matrices = [p for p in layer.parameters() if p.dim() > 1]
    linear = {p for module in layer.modules() if type(module) in LINEAR for p in module.parameters(recurse=False)}
    return LayerSize(
        num_parameters(layer),
        _trained(layer.parameters()),
        sum(p.numel() for p in matrices),
        trained_matrices=_trained(matrices),
        frozen_linear=0 if is_changed else sum(p.numel() for p in linear if not p.requires_grad),
    )


def _outside(model: PreTrainedModel) -> dict[nn.Parameter, set[type[nn.Module]]]:
    """Parameters that no layer has, and the kinds of the modules that do: a tied one has two."""
    inside = {p for layer in anatomy(model).layers for p in layer.parameters()}
    owners: dict[nn.Parameter, set[type[nn.Module]]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter not in inside:
                owners.setdefault(parameter, set()).add(type(module))
    return owners


def _trained(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
