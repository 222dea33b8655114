"""What makes up for dropped layers without training, as a change of a model."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.artifacts.plan import Plan
from shoal.errors import UserError
from shoal.models.anatomy import decoder_layers, text_config
from shoal.models.checkpoint_files import CLOSED_GAPS
from shoal.models.load import loaded_dtype, without_data
from shoal.recipe.measure import Measure
from shoal.recipe.prune import Compensate

from ..edits.tensors import tensors_in_place
from ..metrics.metric import Calibration
from ..surgery.config_cut import uncut_layers
from ..surgery.teacher import Teacher
from .calibration import MOST_TOKENS, calibrating, in_words, needed_bytes, refuse_quantised
from .change import InForce, NewTensors, Tensors
from .fit import ENOUGH_FOR_FACTORS, compensate, needed_features, needed_tokens, operations
from .fold import COMPENSATE, LEAVE_OUT


@dataclass(frozen=True)
class Compensation:
    """Factors and corrections for every gap, in the weights of layers that stay."""

    IS_ROUNDED: ClassVar[bool] = False

    settings: Compensate

    def num_tokens(self, teacher: PreTrainedModel, plan: Plan, settings: Measure) -> int:
        """Enough for every feature that a correction is fitted to, and for rows that are held out."""
        most = ENOUGH_FOR_FACTORS if self.settings.method == "scale" else MOST_TOKENS
        needed = needed_tokens(needed_features(teacher, plan.drop, self.settings), settings.sequence_length)
        return max(needed, min(settings.num_tokens, most))

    def sizes(self, teacher: Teacher, plan: Plan) -> Teacher:
        """The teacher as it is: no size changes."""
        refuse_quantised(teacher.folder, teacher.config, section=COMPENSATE)
        if 0 in plan.drop:
            raise UserError(
                f"{COMPENSATE}: layer 0 is dropped, so no layer below it can be corrected; keep it, or {LEAVE_OUT}"
            )
        return teacher

    def tensors(self, teacher: Teacher, plan: Plan, text: Calibration, before: InForce | None) -> NewTensors:
        """What is fitted, gap by gap."""
        num_tokens = text.rows.input_ids_NS.numel()
        flop = operations(without_data(teacher.config), plan.drop, self.settings, num_tokens)
        with calibrating(teacher, num_tokens, section=COMPENSATE, flop=flop) as source:
            found = compensate(source, plan.drop, self.settings, text, before)
        uncut = uncut_layers(teacher.config, text_config(teacher.config).num_hidden_layers)
        closed = [
            asdict(replace(gap, first=uncut[gap.first], last=uncut[gap.last])) for gap in found.gaps if gap.is_closed
        ]
        already = getattr(teacher.config, CLOSED_GAPS, None) or ()
        stored = loaded_dtype(teacher.config, "stored", teacher.shards)

        def in_force(model: PreTrainedModel) -> AbstractContextManager[object]:
            # a model in a wider precision than the files has the numbers of the files
            rounded = None if model.dtype == stored else stored
            new = {layer: as_stored(model, layer, own, rounded=rounded) for layer, own in found.layers.items()}
            return tensors_in_place(model, new)

        return NewTensors(
            replace(plan, gaps=found.gaps),
            {layer: tuple(tensors) for layer, tensors in found.layers.items()},
            found.layers.__getitem__,
            in_force,
            settings={CLOSED_GAPS: [*already, *closed]} if closed else {},
        )

    def words(self, teacher: PreTrainedModel, plan: Plan, num_tokens: int) -> str:
        """Method, memory and time."""
        features = needed_features(teacher, plan.drop, self.settings)
        flop = operations(teacher, plan.drop, self.settings, num_tokens)
        needed = in_words(needed_bytes(teacher, num_tokens, num_features=features), flop)
        return f"compensation: {self.settings.method}, {num_tokens:,} tokens, {needed}"


def as_stored(
    model: PreTrainedModel, layer: int, tensors: Tensors, *, rounded: torch.dtype | None = None
) -> dict[str, Tensor]:
    """New ``tensors`` of a layer of ``model``, in the precision of those that they replace; ``rounded`` to another one
    before."""
    own = dict(decoder_layers(model)[layer].named_parameters())
    return {name: tensor.to("cpu", rounded or own[name].dtype).to(own[name].dtype) for name, tensor in tensors.items()}
