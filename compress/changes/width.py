"""Fewer channels and key-value heads in every layer, as a change of a model."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.artifacts.plan import PruningPlan, indices_of
from shoal.errors import UserError
from shoal.models.checkpoint_files import StoredTensor
from shoal.models.load import FLOATS
from shoal.recipe.prune import Width

from ..surgery.changed_tensors import stored_places
from ..surgery.narrow_config import kept_width
from ..surgery.quantised import without_quantization
from ..surgery.stored_names import NotByCopy, load_without_data
from ..surgery.teacher import Teacher
from .calibration import calibrating, in_words, needed_bytes
from .change import NewTensors, Tensors
from .narrowing import NARROW, Part, Sizes, Units, sizes_of
from .units import as_kept, measure_width

Place = tuple[Path, StoredTensor, Part]
"""File and place of a tensor that becomes smaller, and what of it stays."""


@dataclass(frozen=True)
class Narrowing:
    """As many channels and key-value groups in every layer as the section says, those that write most."""

    SECTION: ClassVar[str] = NARROW
    IS_ROUNDED: ClassVar[bool] = True  # sums over fewer terms are rounded otherwise

    calibration: Width

    def sizes(self, teacher: Teacher, plan: PruningPlan) -> Teacher:
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

    def tensors(self, teacher: Teacher, plan: PruningPlan, *, seed: int) -> NewTensors:
        """The slices that stay, read from the files one layer at a time."""
        own, width = self._sizes(teacher), kept_width(teacher.config, self.calibration)
        with calibrating(teacher, self.calibration, section=self.SECTION, seed=seed) as (source, rows):
            units = measure_width(source, own, plan.drop, self.calibration, rows)
        places = self._places(teacher, own)

        def load(layer: int) -> Tensors:
            return {
                name: own.narrowed(_read(file, tensor), part, units[layer])
                for name, (file, tensor, part) in places[layer].items()
            }

        names = {layer: tuple(places[layer]) for layer in plan.keep}
        return NewTensors(replace(plan, width=as_kept(width, units)), names, load)

    def in_force(self, model: PreTrainedModel, new: NewTensors) -> AbstractContextManager[object]:
        """Zeros in the places of what goes."""
        width = new.plan.width
        assert width is not None
        masks = {"mlp": width.channels, "attention": width.groups}
        units: dict[int, Units] = {
            layer: {half: indices_of(kept[place]) for half, kept in masks.items() if kept}  # pyright: ignore[reportAssignmentType]
            for place, layer in enumerate(new.plan.keep)
        }
        return sizes_of(Path(str(model.name_or_path)), model.config, width).masked(model, units)

    def words(self, teacher: PreTrainedModel, plan: PruningPlan) -> str:
        """Text and memory."""
        asked = self.calibration
        return f"width: chosen on {asked.num_tokens:,} tokens, {in_words(needed_bytes(teacher, asked))}"

    def _sizes(self, teacher: Teacher) -> Sizes:
        return sizes_of(teacher.folder, teacher.config, kept_width(teacher.config, self.calibration))

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
            raise UserError(
                f"{teacher.folder}: cannot be narrowed file by file: {reason}; leave {self.SECTION} out"
            ) from reason
        return places


def _read(file: Path, stored: StoredTensor) -> Tensor:
    """One tensor, in memory of its own."""
    with file.open("rb") as handle:
        handle.seek(stored.start)
        data = bytearray(handle.read(stored.end - stored.start))
    return torch.frombuffer(data, dtype=FLOATS[stored.dtype]).view(stored.shape)
