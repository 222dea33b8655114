"""What makes up for dropped layers without training, as a change of a model."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from shoal.artifacts.plan import Plan
from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers, text_config
from shoal.models.checkpoint_files import CLOSED_GAPS
from shoal.recipe.prune import Compensate

from ..edits.tensors import tensors_in_place
from ..surgery.config_cut import uncut_layers
from ..surgery.teacher import Teacher
from .calibration import calibrating, in_words, needed_bytes, refuse_quantised
from .change import NewTensors
from .fit import compensate, needed_features


@dataclass(frozen=True)
class Compensation:
    """Factors and corrections for every gap, in the weights of layers that stay."""

    SECTION: ClassVar[str] = "prune.compensate"
    IS_ROUNDED: ClassVar[bool] = False

    calibration: Compensate

    def sizes(self, teacher: Teacher, plan: Plan) -> Teacher:
        """The teacher as it is: no size changes."""
        refuse_quantised(teacher.folder, teacher.config, section=self.SECTION)
        if 0 in plan.drop:
            raise UserError(
                f"{self.SECTION}: layer 0 is dropped, and no layer below it is left whose weights could make up for "
                f"it; keep it, or leave {self.SECTION} out"
            )
        return teacher

    def tensors(self, teacher: Teacher, plan: Plan, *, seed: int) -> NewTensors:
        """What is fitted, gap by gap."""
        with calibrating(teacher, self.calibration, section=self.SECTION, seed=seed) as (source, rows):
            found = compensate(source, plan.drop, self.calibration, rows)
        uncut = uncut_layers(teacher.config, text_config(teacher.config).num_hidden_layers)
        closed = [
            asdict(replace(gap, first=uncut[gap.first], last=uncut[gap.last])) for gap in found.gaps if gap.is_closed
        ]
        before = getattr(teacher.config, CLOSED_GAPS, None) or ()
        return NewTensors(
            replace(plan, gaps=found.gaps),
            {layer: tuple(tensors) for layer, tensors in found.layers.items()},
            found.layers.__getitem__,
            {CLOSED_GAPS: [*before, *closed]} if closed else {},
        )

    def in_force(self, model: PreTrainedModel, new: NewTensors) -> AbstractContextManager[object]:
        """The new tensors in the places of the old."""
        return tensors_in_place(model, {layer: as_stored(model, layer, new) for layer in new.names})

    def words(self, teacher: PreTrainedModel, plan: Plan) -> str:
        """Method and memory."""
        needed = needed_bytes(
            teacher, self.calibration, num_features=needed_features(teacher, plan.drop, self.calibration)
        )
        return f"compensation: {self.calibration.method}, {self.calibration.num_tokens:,} tokens, {in_words(needed)}"


def as_stored(model: PreTrainedModel, layer: int, new: NewTensors) -> dict[str, Tensor]:
    """The new tensors of a layer of ``model``, in the precision of those that they replace."""
    own = dict(decoder_layers(model)[layer].named_parameters())
    return {name: tensor.to("cpu", own[name].dtype) for name, tensor in new.load(layer).items()}
