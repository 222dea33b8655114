"""Put layers of a donor in the place of the model's own, or anything between the two (arXiv:2510.02091: a distilled
model's layer in its base). The other direction is the run of the donor, with the model as its donor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from shoal.artifacts.plan import PlannedChange
from shoal.compress.edits.masks import checked
from shoal.compress.edits.tensors import buffers, combined, put_tensors
from shoal.compress.surgery.cut_model import cut_model
from shoal.errors import UserError
from shoal.formatting import layers_text
from shoal.launch.verbs.run import Run, resolved
from shoal.models.anatomy import anatomy, text_config
from shoal.models.checkpoint_files import model_fingerprint
from shoal.models.load import load_model
from shoal.recipe.section import Section, Text

from .student import Edited, loaded_teacher, write_student

Part = Literal["embeddings", "norm", "head"]
INDIFFERENT = (
    *(
        "_name_or_path",
        "architectures",
        "dtype",
        "initializer_range",
        "max_position_embeddings",
        "transformers_version",
    ),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "vocab_size"),
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
    parts: tuple[Part, ...] = ()
    """Parts of the model that are swapped besides layers."""


def work(run: Run, settings: Settings) -> str:
    """student/ and plan.json: the run's model with the donor's layers."""
    folder = resolved(settings.donor, settings.donor_revision)
    teacher, layers = loaded_teacher(run), tuple(sorted({*settings.layers}))
    donor = load_model(folder, attention=None, trust_remote_code=run.recipe.trust_remote_code)
    with swapped(teacher, donor, layers, weight=settings.weight, parts=settings.parts):
        student = cut_model(teacher, (), share=True)
    local = settings.donor.startswith((".", "/", "~"))  # a card is read by strangers: no paths of one disk
    name = settings.donor.rstrip("/").rpartition("/")[2] if local else settings.donor
    parts = "".join(f" and {part}" for part in settings.parts)
    words = f"layers {layers_text(layers)}{parts} swapped with {name} at weight {settings.weight:g}"
    first = (0,) if "embeddings" in settings.parts else ()  # nothing is the teacher's any more
    change = PlannedChange("swap", words, tuple(sorted({*layers, *first})))
    edited = Edited(
        student,
        change,
        lambda: swapped(teacher, donor, layers, weight=settings.weight, parts=settings.parts),
    )
    return write_student(run, "swap", settings, edited, teacher, {"donor": model_fingerprint(folder)})


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
    With all layers and parts at weight 1 the model is the donor. Weights 0 and 1 are exact, and 1 copies nothing;
    others are calculated in float64 and rounded once to the stored dtype.

    Raises:
        UserError: models of different classes, settings, sizes or dtypes; a tensor that the model also uses outside of
            what is swapped, as tied embeddings are where only one of `embeddings` and `head` is named.
    """
    _refuse_unlike(model, donor)
    before = put_tensors(model, _mixed(model, donor, layers, weight, parts), where="swap")
    try:
        yield model
    finally:
        put_tensors(model, before, where="swap")


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
def _mixed(
    model: PreTrainedModel, donor: PreTrainedModel, layers: Sequence[int], weight: float, parts: Sequence[Part]
) -> dict[str, Tensor]:
    """What ``model`` gets, by its names; at weight 1 the donor's own tensors."""
    ours, theirs = _stored(model), _stored(donor)
    names = _swapped_names(model, ours, layers, parts)
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
            raise UserError(
                f"swap: {other} is one tensor with {name}, which is not swapped; swap both of them or none "
                "(tied embeddings: parts: [embeddings, head])"
            )
    return {name: new[id(ours[name])] for name in names}


def _between(ours: Tensor, theirs: Tensor, weight: float, *, where: str) -> Tensor:
    mixed = combined([ours, theirs], [1 - weight, weight], where=where)
    # under two names it must stay a parameter or none
    return nn.Parameter(mixed, requires_grad=ours.requires_grad) if isinstance(ours, nn.Parameter) else mixed


def _stored(model: PreTrainedModel) -> dict[str, Tensor]:
    """Everything that a checkpoint holds, by all names that it has in the model."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **buffers(model, stored=True)}


def _swapped_names(
    model: PreTrainedModel, stored: dict[str, Tensor], layers: Sequence[int], parts: Sequence[Part]
) -> list[str]:
    known = anatomy(model)
    checked(layers, len(known.layers), "layer")
    prefixes = tuple(f"{known.layers_name}.{layer}." for layer in layers)

    def part_of(name: str) -> Part | None:
        if name.startswith(f"{known.layers_name}."):
            return None
        if known.head_name and name.startswith(f"{known.head_name}."):
            return "head"
        return "norm" if known.final_norm_name and name.startswith(f"{known.final_norm_name}.") else "embeddings"

    return [name for name in stored if name.startswith(prefixes) or part_of(name) in parts]
