"""Put layers of a donor in the place of the model's own, or anything between the two (arXiv:2510.02091: a distilled
model's layer in its base). The other direction is the run of the donor, with the model as its donor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from shoal.artifacts.plan import PlannedChange
from shoal.compress.edits.layer_edits import checked
from shoal.compress.edits.tensors import buffers, combined, put_tensors, refuse_overflow
from shoal.compress.surgery.cut_model import cut_model
from shoal.errors import UserError
from shoal.formatting import layers_text
from shoal.launch.verbs.run import Run, resolved
from shoal.models.anatomy import anatomy, text_config
from shoal.models.checkpoint_files import model_fingerprint
from shoal.models.load import load_model
from shoal.recipe.section import Section, Text

from .student import Edited, loaded_teacher, write_student

INDIFFERENT = (
    *("_name_or_path", "architectures", "dtype", "initializer_range", "max_position_embeddings", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size", "tie_word_embeddings", "transformers_version"),
)
"""Settings of a configuration in which a donor may differ, and all dropout."""


@dataclass(frozen=True)
class Settings(Section):
    """Layers become base + weight * (donor - base)."""

    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    """Layers, counted from 0."""
    donor: Text
    """Hub id, local path or demo:<name> of a model of the same shape."""
    donor_revision: str | None = None
    """Hub revision of the donor."""
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """0 = the model's own weights, 1 = the donor's; both exact."""


def work(run: Run, settings: Settings) -> str:
    """student/ and plan.json: the run's model with the donor's layers."""
    folder = resolved(settings.donor, settings.donor_revision)
    teacher, layers = loaded_teacher(run), tuple(sorted({*settings.layers}))
    donor = load_model(folder, attention=None, trust_remote_code=run.recipe.trust_remote_code)
    with swapped(teacher, donor, layers, weight=settings.weight):
        student = cut_model(teacher, (), share=True)
    local = settings.donor.startswith((".", "/", "~"))  # a card is read by strangers: no paths of one disk
    name = settings.donor.rstrip("/").rpartition("/")[2] if local else settings.donor
    words = f"layers {layers_text(layers)} swapped with {name} at weight {settings.weight:g}"
    change = PlannedChange("swap", words, layers)
    edited = Edited(student, change, lambda: swapped(teacher, donor, layers, weight=settings.weight))
    return write_student(run, "swap", settings, edited, teacher, {"donor": model_fingerprint(folder)})


@contextmanager
def swapped(
    model: PreTrainedModel, donor: PreTrainedModel, layers: Sequence[int], *, weight: float = 1.0
) -> Iterator[PreTrainedModel]:
    """``model`` with the tensors of ``layers`` at base + weight * (donor - base), until the block ends.

    Weights 0 and 1 are exact, and 1 copies nothing; others are calculated in float64 and rounded once to the stored
    dtype.

    Raises:
        UserError: models of different classes, settings, sizes or dtypes; a tensor that the model also uses in a layer
            that is not swapped.
    """
    _refuse_unlike(model, donor)
    before = put_tensors(model, _mixed(model, donor, layers, weight))
    try:
        yield model
    finally:
        put_tensors(model, before)


def _refuse_unlike(model: PreTrainedModel, donor: PreTrainedModel) -> None:
    """Weights trained with one class or one setting do not fit another."""
    ours, theirs = (_settings(side) for side in (model, donor))
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"swap: {name} is {theirs.get(name)!r} in the donor, but {ours.get(name)!r} in the model; give a donor "
                "of the model's own shape"
            )


def _settings(model: PreTrainedModel) -> dict[str, Any]:
    settings = {"class": type(model).__name__, **text_config(model.config).to_dict()}
    return {name: value for name, value in settings.items() if name not in INDIFFERENT and "dropout" not in name}


@torch.no_grad()
def _mixed(model: PreTrainedModel, donor: PreTrainedModel, layers: Sequence[int], weight: float) -> dict[str, Tensor]:
    """What ``model`` gets, by its names; at weight 1 the donor's own tensors."""
    ours, theirs = _stored(model), _stored(donor)
    checked(layers, len(anatomy(model).layers), "layer")
    prefixes = tuple(f"{anatomy(model).layers_name}.{layer}." for layer in layers)
    names = [name for name in ours if name.startswith(prefixes)]
    new: dict[int, Tensor] = {}  # by the model's own, so that what is tied stays one tensor
    for name in names:
        old, other = ours[name], theirs[name]
        if (old.shape, old.dtype) != (other.shape, other.dtype):
            raise UserError(
                f"swap: {name} is {other.dtype} {tuple(other.shape)} in the donor, but {old.dtype} {tuple(old.shape)} "
                "in the model; give a donor of the model's own shape and dtype"
            )
        if id(old) not in new:
            new[id(old)] = other if weight == 1 else _between(old, other, weight, where=f"swap: {name}")
    for name, tensor in ours.items():
        if id(tensor) in new and name not in names:
            other = next(one for one in names if ours[one] is tensor)
            raise UserError(f"swap: {other} is one tensor with {name}, which is not swapped; swap both or none")
    return {name: new[id(ours[name])] for name in names}


def _between(ours: Tensor, theirs: Tensor, weight: float, *, where: str) -> Tensor:
    mixed = combined([ours, theirs], [1 - weight, weight], where=where)
    refuse_overflow({where: mixed})
    # under two names it must stay a parameter or none
    return nn.Parameter(mixed, requires_grad=ours.requires_grad) if isinstance(ours, nn.Parameter) else mixed


def _stored(model: PreTrainedModel) -> dict[str, Tensor]:
    """Everything that a checkpoint holds, by all names that it has in the model."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **buffers(model, stored=True)}
