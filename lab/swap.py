"""Put layers of a donor in the place of the model's own, or anything between the two (arXiv:2510.02091: a distilled
model's layer in its base). The other direction is the run of the donor, with the model as its donor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from shoal.artifacts.plan import PlannedChange
from shoal.compress.surgery.cut_model import cut_model
from shoal.formatting import layers_text
from shoal.launch.verbs.run import Run, resolved
from shoal.models.checkpoint_files import model_fingerprint
from shoal.models.load import load_model
from shoal.recipe.section import Section, Text

from .edits.student import Edited, loaded_teacher, write_student
from .edits.swapping import Part, swapped


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
