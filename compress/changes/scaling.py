"""Layers that write a constant times what they wrote, as a change of a model."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import ClassVar

from transformers import PreTrainedModel

from shoal.artifacts.plan import PlannedChange, PruningPlan
from shoal.errors import UserError
from shoal.formatting import layers_text
from shoal.models.anatomy import decoder_layers
from shoal.recipe.prune import ScaleLayer

from ..edits.tensors import tensors_in_place
from ..surgery.teacher import Teacher
from .change import NewTensors, Tensors
from .compensation import as_stored
from .fit import refuse_quantised
from .fold import output_names


@dataclass(frozen=True)
class Scaling:
    """Attention and MLP of the named layers write ``factor`` times as much."""

    SECTION: ClassVar[str] = "prune.scale_layer"
    IS_ROUNDED: ClassVar[bool] = False

    settings: ScaleLayer
    calibration: None = None

    def sizes(self, teacher: Teacher, plan: PruningPlan) -> Teacher:
        """The teacher as it is: no size changes."""
        refuse_quantised(teacher.folder, teacher.config)
        if gone := sorted({*self.settings.layers} - {*plan.keep}):
            raise UserError(f"{self.SECTION}.layers: layer {gone[0]} does not stay; name layers that do")
        return teacher

    def tensors(self, teacher: Teacher, plan: PruningPlan, *, seed: int) -> NewTensors:
        """The output maps of the layers times the factor."""
        model, layers = teacher.load(), self.settings.layers
        names = {layer: tuple(output_names(model, layer)) for layer in layers}

        def load(layer: int) -> Tensors:
            own = decoder_layers(model)[layer]
            return {name: own.get_parameter(name).detach() * self.settings.factor for name in names[layer]}

        words = f"layers {layers_text(layers)} times {self.settings.factor:g}"
        change = PlannedChange("scale_layer", words, layers)
        return NewTensors(replace(plan, changes=(*plan.changes, change)), names, load)

    def in_force(self, model: PreTrainedModel, new: NewTensors) -> AbstractContextManager[object]:
        """The new tensors in the places of the old."""
        return tensors_in_place(model, {layer: as_stored(model, layer, new) for layer in new.names})

    def words(self, teacher: PreTrainedModel, plan: PruningPlan) -> str:
        """Layers and factor."""
        return f"scaling: layers {layers_text(self.settings.layers)} times {self.settings.factor:g}"
