"""Fewer channels and key-value groups in every layer, as a change of a model: those stay that write most to the
residual stream on calibration text.

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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shoal.artifacts.plan import KeptWidth, Plan, indices_of, mask_of
from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers, text_config
from shoal.models.checkpoint_files import StoredTensor
from shoal.models.load import FLOATS, num_parameters
from shoal.progress import each
from shoal.recipe.measure import Measure
from shoal.recipe.prune import Width

from ..edits.layer_edits import Half
from ..edits.sublayers import where
from ..edits.tensors import put_tensors
from ..metrics.metric import Calibration
from ..surgery.copying import stored_places
from ..surgery.cut_model import kept_layers
from ..surgery.narrow_config import NARROW, kept_width
from ..surgery.quantised import without_quantization
from ..surgery.stored_names import NotByCopy, load_without_data
from ..surgery.teacher import Teacher
from ..variants.layerwise import Call
from .calibration import MOST_TOKENS, Source, batches, calibrating, in_words, needed_bytes
from .change import InForce, NewTensors, Tensors
from .fold import same_states
from .narrowing import Part, Sizes, Units, sizes_of

Place = tuple[Path, StoredTensor, Part]
"""File and place of a tensor that becomes smaller, and what of it stays."""


@dataclass(frozen=True)
class Narrowing:
    """As many channels and key-value groups in every layer as the section says, those that write most."""

    IS_ROUNDED: ClassVar[bool] = True  # sums over fewer terms are rounded otherwise

    settings: Width

    def num_tokens(self, teacher: PreTrainedModel, plan: Plan, settings: Measure) -> int:
        """One row: more make the choice surer, and none is too little."""
        return max(settings.sequence_length, min(settings.num_tokens, MOST_TOKENS))

    def sizes(self, teacher: Teacher, plan: Plan) -> Teacher:
        """Configuration and tensors as small as they will be: from their start on, where their bytes have a place."""
        own = self._sizes(teacher)
        places = (place for layer in self._places(teacher, own).values() for place in layer.values())
        parts = {(file, tensor.start): part for file, tensor, part in places}

        def shorter(file: Path, tensor: StoredTensor) -> StoredTensor:
            part = parts.get((file, tensor.start))
            if part is None:
                return tensor
            before, after = own.counts[part.half]
            shape = [size // before * after if dim == part.dim else size for dim, size in enumerate(tensor.shape)]
            end = tensor.start + (tensor.end - tensor.start) // before * after
            return replace(tensor, shape=tuple(shape), end=end)

        shards = [
            replace(shard, tensors={name: shorter(shard.file, tensor) for name, tensor in shard.tensors.items()})
            for shard in teacher.shards
        ]
        return replace(teacher, config=own.config, shards=shards)

    def tensors(self, teacher: Teacher, plan: Plan, text: Calibration, before: InForce | None) -> NewTensors:
        """The slices that stay, read from the files one layer at a time."""
        own, width = self._sizes(teacher), kept_width(teacher.config, self.settings)
        with calibrating(teacher, text.rows.input_ids_NS.numel(), section=NARROW) as source:
            units = measure_width(source, own, plan.drop, text)
        places = self._places(teacher, own)

        def load(layer: int) -> Tensors:
            return {
                name: own.narrowed(_read(file, tensor), part, units[layer])
                for name, (file, tensor, part) in places[layer].items()
            }

        def of_later(layer: int, tensors: Tensors) -> Tensors:
            parts = own.parts[layer]
            return {
                name: own.narrowed(tensor, parts[name], units[layer]) if name in parts else tensor
                for name, tensor in tensors.items()
            }

        names = {layer: tuple(places[layer]) for layer in plan.keep}
        kept = as_kept(width, units)
        # zeros in the places of what goes by the plan, so that it is proven too
        masked = partial(own.masked, units=units_of(kept, plan.keep))
        return NewTensors(replace(plan, width=kept), names, load, masked, of_later)

    def words(self, teacher: PreTrainedModel, plan: Plan, num_tokens: int) -> str:
        """Text, memory and time."""
        needed = in_words(needed_bytes(teacher, num_tokens), 2.0 * num_parameters(teacher) * num_tokens)
        return f"width: chosen on {num_tokens:,} tokens, {needed}"

    def _sizes(self, teacher: Teacher) -> Sizes:
        return sizes_of(teacher.folder, teacher.config, kept_width(teacher.config, self.settings))

    def _places(self, teacher: Teacher, own: Sizes) -> dict[int, dict[str, Place]]:
        """Layer -> name of a parameter in it -> where it is stored."""
        stored, files = teacher.stored, {name: shard.file for shard in teacher.shards for name in shard.tensors}
        places: dict[int, dict[str, Place]] = {}
        try:
            model, _ = load_without_data(without_quantization(teacher.config)[0], teacher.shapes)
            for layer, parts in own.parts.items():
                places[layer] = {}
                for parameter, part in parts.items():
                    names = stored_places(model, layer, [parameter], stored)
                    if len(names) != 1:
                        raise NotByCopy(f"{parameter} of layer {layer} is stored in {len(names)} pieces")
                    places[layer][parameter] = files[names[0]], stored[names[0]], part
        except NotByCopy as reason:
            raise UserError(f"{teacher.folder}: cannot be narrowed file by file: {reason}; remove {NARROW}") from reason
        return places


def _read(file: Path, stored: StoredTensor) -> Tensor:
    """One tensor, in memory of its own."""
    with file.open("rb") as handle:
        handle.seek(stored.start)
        data = bytearray(handle.read(stored.end - stored.start))
    return torch.frombuffer(data, dtype=FLOATS[stored.dtype]).view(stored.shape)


@torch.no_grad()
def measure_width(source: Source, own: Sizes, drop: Sequence[int], text: Calibration) -> dict[int, Units]:
    """What stays of every layer of the model of ``source`` but those of ``drop``.

    Each layer is run narrowed, and compared with itself with zeros in the places of what goes.

    Raises:
        UserError: states that are not finite, a family whose narrowed layers are other ones.
    """
    chosen: dict[int, Units] = {}
    waiting = list(batches(source, text.rows, text.batch_size))
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
            f"{NARROW}: the states of {where(source.model, layer)} are not finite in {source.model.dtype}; check the "
            f"weights for damage, or remove {NARROW}"
        )
    return tuple(sorted(scores_U.argsort(descending=True, stable=True)[:count].tolist()))


def _refuse_another_layer(source: Source, own: Sizes, layer: int, units: Units, hidden_BSD: Tensor, call: Call) -> None:
    module = decoder_layers(source.model)[layer]
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, part in own.parts[layer].items():
        tensors[name] = own.narrowed(tensors[name].detach(), part, units)
    text_config(own.model.config)._attn_implementation = text_config(source.model.config)._attn_implementation
    narrow = copy.deepcopy(decoder_layers(own.model)[layer])
    put_tensors(narrow, tensors)
    with own.masked(source.model, {layer: units}):
        expected_BSD = source.layerwise.run(layer, hidden_BSD, call)
    problem = "gives another state than the layer with zeros in the removed places"
    try:
        if same_states(call.of(narrow, hidden_BSD.clone()), expected_BSD, expected_BSD - hidden_BSD):
            return
    except RuntimeError as error:  # sizes that do not fit each other
        problem = f"cannot be run ({str(error).splitlines()[0]})"
    raise UserError(f"{NARROW}: {where(source.model, layer)}, narrowed, {problem}; remove {NARROW}")


def units_of(width: KeptWidth, keep: Sequence[int]) -> dict[int, Units]:
    """What ``width`` says to stay of every layer of ``keep``."""
    masks: dict[Half, tuple[str, ...]] = {"mlp": width.channels, "attention": width.groups}
    return {
        layer: {half: indices_of(kept[place]) for half, kept in masks.items() if kept}
        for place, layer in enumerate(keep)
    }


def as_kept(width: KeptWidth, chosen: Mapping[int, Units]) -> KeptWidth:
    """``width`` with what stays of every layer, as a plan has it."""
    masks = {half: tuple(mask_of(chosen[layer][half]) for layer in sorted(chosen)) for half in chosen[min(chosen)]}
    return replace(width, channels=masks.get("mlp", ()), groups=masks.get("attention", ()))
