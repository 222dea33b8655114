"""Which channels and key-value groups stay: those that write most to the residual stream on calibration text.

A channel of an MLP, and the query heads that read one key-value head, are columns of a linear map W and what that map
reads there, x. Their score is the mean over tokens of ||W x||^2, the square of what would be missing without them, as
far as that does not depend on the others. It needs the mean of x x^T alone: of a channel the mean square of its
activation, times the square of its column's norm. Ranked within a layer, on the cut model, whose layers see states
without what was dropped.

Minitron (arXiv:2407.14679) takes the size of x alone, the mean over positions of |x| and its root mean square over
samples.

B batch, S sequence, D hidden, N tokens, U units of a layer, K columns of a unit.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shoal.artifacts.plan import KeptWidth, mask_of
from shoal.data.packing import PackedRows
from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers, text_config
from shoal.progress import each
from shoal.recipe.prune import Width

from ..edits.masks import Half
from ..edits.sublayers import where
from ..edits.tensors import put_tensors
from ..surgery.cut_model import kept_layers
from ..variants.layerwise import Call
from .calibration import Source, batches
from .fold import same_states
from .narrowing import Sizes, Units


@torch.no_grad()
def measure_width(
    source: Source, own: Sizes, drop: Sequence[int], settings: Width, rows: PackedRows
) -> dict[int, Units]:
    """What stays of every layer of the model of ``source`` but those of ``drop``.

    Each layer is run narrowed, and compared with itself with zeros in the places of what goes.

    Raises:
        UserError: states that are not finite, a family whose narrowed layers are other ones.
    """
    chosen: dict[int, Units] = {}
    waiting = list(batches(source, rows, settings.batch_size))
    for layer in each(kept_layers(source.layerwise.num_layers, drop), "prune: measuring width", unit="layers"):
        (prepared, state), module = waiting[-1], decoder_layers(source.model)[layer]
        sums_UKK: dict[Half, Tensor] = {}
        with ExitStack() as stack:
            for half, name in own.maps[layer].items():
                add = partial(_add, sums_UKK, half, own.counts[half][0])
                stack.enter_context(module.get_submodule(name).register_forward_pre_hook(add))
            for index, (batch, before) in enumerate(waiting):  # one at a time: states take most of the memory
                waiting[index] = batch, source.layerwise.run(layer, before, batch.calls[layer])
        chosen[layer] = {
            half: _largest(source, layer, module.get_submodule(own.maps[layer][half]), sums, own.counts[half][1])
            for half, sums in sums_UKK.items()
        }
        _refuse_another_layer(source, own, layer, chosen[layer], state, prepared.calls[layer])
    return chosen


def _add(sums_UKK: dict[Half, Tensor], half: Half, num_units: int, _: nn.Module, args: tuple[Any, ...]) -> None:
    """Add the sum of x x^T over the tokens of a batch, of which a unit's ``args[0]`` is x."""
    x_UKN = args[0].float().reshape(-1, num_units, args[0].shape[-1] // num_units).permute(1, 2, 0)
    with torch.autocast(x_UKN.device.type, enabled=False):  # a model's own half precision ends here
        found_UKK = (x_UKN @ x_UKN.mT).double()
    sums_UKK[half] = sums_UKK[half] + found_UKK if half in sums_UKK else found_UKK


def _largest(source: Source, layer: int, reader: Any, sums_UKK: Tensor, count: int) -> tuple[int, ...]:
    """The ``count`` units of which ``reader`` writes most; of equal ones the lower."""
    weight = reader.weight.detach().float()
    columns_UKD = (weight if isinstance(reader, Conv1D) else weight.mT).unflatten(0, sums_UKK.shape[:2])
    with torch.autocast(weight.device.type, enabled=False):
        scores_U = ((columns_UKD @ columns_UKD.mT).double() * sums_UKK).sum((1, 2))
    if not scores_U.isfinite().all():
        raise UserError(
            f"prune.width: the states of {where(source.model, layer)} are not finite in {source.model.dtype}; look for "
            "damaged weights, or leave prune.width out"
        )
    return tuple(sorted(scores_U.argsort(descending=True, stable=True)[:count].tolist()))


def _refuse_another_layer(source: Source, own: Sizes, layer: int, units: Units, hidden_BSD: Tensor, call: Call) -> None:
    module = decoder_layers(source.model)[layer]
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, part in own.parts[layer].items():
        tensors[name] = own.narrowed(tensors[name].detach(), part, units)
    text_config(own.model.config)._attn_implementation = text_config(source.model.config)._attn_implementation
    narrow = copy.deepcopy(decoder_layers(own.model)[layer])
    put_tensors(narrow, tensors, where=f"layer {layer}")
    with own.masked(source.model, {layer: units}):
        expected_BSD = source.layerwise.run(layer, hidden_BSD, call)
    problem = "gives another state than itself with zeros in the places of what goes"
    try:
        if same_states(call.of(narrow, hidden_BSD.clone()), expected_BSD, expected_BSD - hidden_BSD):
            return
    except RuntimeError as error:  # sizes that do not fit each other
        problem = f"cannot be run ({str(error).splitlines()[0]})"
    raise UserError(f"prune.width: {where(source.model, layer)}, narrowed, {problem}; leave prune.width out")


def as_kept(width: KeptWidth, chosen: Mapping[int, Units]) -> KeptWidth:
    """``width`` with what stays of every layer, as a plan has it."""
    masks = {half: tuple(mask_of(chosen[layer][half]) for layer in sorted(chosen)) for half in chosen[min(chosen)]}
    return replace(width, channels=masks.get("mlp", ()), groups=masks.get("attention", ()))
