"""New tensors of layers in the places of stored ones, so that a student is copied though some of its numbers are new.

transformers renames and merges tensors while it loads, and knows the way back; the files' own names and forms stay.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from shoal.models.anatomy import anatomy, decoder_layers
from shoal.models.checkpoint_files import StoredTensor
from shoal.models.load import FLOATS

from .stored_names import NotByCopy


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def stored_form(model: PreTrainedModel, layer: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` of a layer, by their names in it, as the files of ``model`` hold them, by their names there."""
    prefix = f"{anatomy(model).layers_name}.{layer}."
    return revert_weight_conversion(model, {prefix + name: tensor for name, tensor in tensors.items()})


def stored_places(
    model: PreTrainedModel, layer: int, names: Collection[str], stored: Mapping[str, StoredTensor]
) -> tuple[str, ...]:
    """The stored names of a layer's tensors ``names``; ``model`` may be without weights.

    Raises:
        NotByCopy: they are no whole tensors of the files.
    """
    own = dict(decoder_layers(model)[layer].named_parameters())
    forms = stored_form(model, layer, {name: own[name].detach() for name in names})
    for name, tensor in forms.items():
        place = stored.get(name)
        if place is None or place.shape != tuple(tensor.shape) or place.dtype not in FLOATS:
            raise NotByCopy(f"{name} of layer {layer}, which changes, is not stored in one piece under that name")
    return tuple(forms)


@dataclass
class ChangedTensors:
    """Tensors that the student's files hold instead of the teacher's, by their names there; one layer in memory."""

    model: PreTrainedModel
    """The teacher, which may be without weights."""
    load: Callable[[int], Mapping[str, Tensor]]
    """A layer's new tensors, by their names in it."""
    places: Mapping[str, tuple[int, str, str]]
    """Name in the student's files -> layer of the teacher, name in the teacher's files, and dtype there."""
    _held: tuple[int, dict[str, Tensor]] = field(default=(-1, {}), repr=False)

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def __getitem__(self, name: str) -> memoryview:
        layer, stored_name, dtype = self.places[name]
        if self._held[0] != layer:
            self._held = (-1, {})  # let go before the next one is loaded
            self._held = (layer, stored_form(self.model, layer, self.load(layer)))
        return as_bytes(self._held[1][stored_name].to("cpu", FLOATS[dtype]).contiguous())


def changed_tensors(
    model: PreTrainedModel,
    layers: Mapping[int, Collection[str]],
    load: Callable[[int], Mapping[str, Tensor]],
    stored: Mapping[str, StoredTensor],
    names: Mapping[str, str],
) -> ChangedTensors:
    """The tensors of ``layers`` (their names within) that ``load`` gives, in the places of ``stored`` ones.

    ``names``: stored name -> its name in the student.

    Raises:
        NotByCopy: as stored_places does.
    """
    places = {
        names[name]: (layer, name, stored[name].dtype)
        for layer, own in layers.items()
        for name in stored_places(model, layer, own, stored)
    }
    return ChangedTensors(model, load, places)
