"""A student whose tensors are the teacher's stored ones, copied under new names without building a model.

New tensors of layers stand in the places of stored ones. transformers renames and merges tensors while it loads, and
knows the way back; the files' own names and forms stay.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from shoal.atomic_files import write_json
from shoal.formatting import bytes_text
from shoal.models.anatomy import anatomy, decoder_layers
from shoal.models.checkpoint_files import WRITING, StoredTensor, copy_beside, json_or_empty
from shoal.models.load import FLOATS
from shoal.progress import doing

from .cut_model import refuse_changed_layers
from .quantised import SIDE_FILES, LayerNames, cut_stored_config, renumbered, without_quantization
from .shards import Changed, NewShard, compare_shards, new_shards, write_shards
from .stored_names import (
    Loading,
    NotByCopy,
    find_layers,
    load_without_data,
    modules_inside,
    other_towers,
    student_names,
)
from .teacher import Teacher

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Copy:
    """A student that can be written without building it."""

    teacher: Teacher
    config: PreTrainedConfig
    """Configuration of the student."""
    shards: list[NewShard]
    side_files: dict[str, object]
    """Settings of the quantisation that lie beside config.json: file name -> content."""

    @property
    def names(self) -> dict[str, str]:
        """Stored name -> name in the student's files."""
        return {old: new for shard in self.shards for old, new in shard.tensors.items()}


def planned_copy(
    teacher: Teacher, plain: PreTrainedConfig, skeleton: PreTrainedModel, loading: Loading, keep: Sequence[int]
) -> Copy:
    """What there is to copy of the ``teacher``, of which ``skeleton`` is the model of ``plain`` without its weights.

    Raises:
        NotByCopy: the files cannot be told apart by layers.
        UserError: as cut_config.
    """
    prefix, model_prefix = find_layers(teacher.shapes, skeleton, plain), f"{anatomy(skeleton).layers_name}."
    num_layers = len(decoder_layers(skeleton))
    names = student_names(teacher.shapes, prefix=prefix, num_layers=num_layers, keep=keep)
    layer_names = LayerNames(
        prefixes=tuple({prefix, model_prefix}),
        others=frozenset(other_towers(teacher.shapes, {prefix, model_prefix})),
        modules=tuple(
            sorted(modules_inside(teacher.shapes, prefix) | modules_inside(skeleton.state_dict(), model_prefix))
        ),
    )
    config = cut_stored_config(teacher.config, keep, layer_names)
    config.architectures = config.architectures or [type(skeleton).__name__]
    shapes = {names[name]: shape for name, shape in teacher.shapes.items() if name in names}
    student, student_loading = load_without_data(without_quantization(config)[0], shapes)
    # of multi-token prediction, which transformers ignores by the teacher's numbers, neither says anything
    own = student_loading.renumbered((model_prefix, prefix), range(len(keep)))
    refuse_changed_layers(skeleton, student, keep)
    if difference := own.difference(loading.renumbered((model_prefix, prefix), keep)):
        raise NotByCopy(f"of the stored tensors, {difference} in the student")
    side_files = {
        name: renumbered(settings, keep, layer_names, where=name)
        for name in SIDE_FILES
        if (settings := json_or_empty(teacher.folder / name))
    }
    shards = new_shards(teacher.shards, names)
    log.info(
        "prune: copying %s of %s unchanged, without building the model",
        *(bytes_text(sum(shard.num_bytes for shard in some)) for some in (shards, teacher.shards)),
    )
    return Copy(teacher, config, shards, side_files)


def write_copy(copy: Copy, folder: Path, changed: Changed) -> None:
    """Write ``copy`` to ``folder``, with other bytes for what is ``changed``, and read it back."""
    write_shards(copy.shards, folder, changed)
    with doing("prune: reading the copied files back"):
        compare_shards(copy.shards, folder, changed)
    copy.config.save_pretrained(folder)
    for name, content in copy.side_files.items():
        write_json(folder / name, content)
    if (copy.teacher.folder / WRITING).is_file():
        copy_beside(copy.teacher.folder, folder, (WRITING,))
    else:  # what transformers does where the settings are still in config.json
        GenerationConfig.from_pretrained(
            copy.teacher.folder, config_file_name="config.json", _from_model_config=True
        ).save_pretrained(folder)


def stored_form(model: PreTrainedModel, layer: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` of a layer, by their names in it, as the files of ``model`` hold them, by their names there."""
    prefix = f"{anatomy(model).layers_name}.{layer}."
    return revert_weight_conversion(model, {prefix + name: tensor for name, tensor in tensors.items()})


def stored_places(
    model: PreTrainedModel, layer: int, names: Collection[str], stored: Mapping[str, StoredTensor]
) -> tuple[str, ...]:
    """The stored names of a layer's tensors ``names``; ``model`` may be without weights."""
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
        tensor = self._held[1][stored_name].to("cpu", FLOATS[dtype]).contiguous()
        return tensor.reshape(-1).view(torch.uint8).numpy().data


def changed_tensors(
    model: PreTrainedModel,
    layers: Mapping[int, Collection[str]],
    load: Callable[[int], Mapping[str, Tensor]],
    stored: Mapping[str, StoredTensor],
    names: Mapping[str, str],
) -> ChangedTensors:
    """The tensors of ``layers`` (their names within) that ``load`` gives, in the places of ``stored`` ones.

    ``names``: stored name -> its name in the student."""
    places = {
        names[name]: (layer, name, stored[name].dtype)
        for layer, own in layers.items()
        for name in stored_places(model, layer, own, stored)
    }
    return ChangedTensors(model, load, places)
