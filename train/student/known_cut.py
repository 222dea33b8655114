"""What is known of how a student in memory was cut from its teacher: its own configuration says most of it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.plan import ClosedGap, KeptWidth, Plan
from shoal.errors import UserError
from shoal.models.anatomy import CHANNELS, anatomy, decoder_layers, text_config
from shoal.models.checkpoint_files import CLOSED_GAPS, KEPT_LAYERS
from shoal.recipe.messages import checked
from shoal.recipe.section import Layers, Section

Drop = Collection[int] | Plan


@dataclass(frozen=True)
class _Given(Section):
    drop: Layers


def refuse_swapped(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuse a teacher that is pruned where the student is not."""
    is_cut = [hasattr(model.config, KEPT_LAYERS) for model in (student, teacher)]
    if is_cut == [False, True] and len(decoder_layers(student)) > len(decoder_layers(teacher)):
        raise UserError("the teacher is pruned by shoal, and the student is not; pass the pruned model first")


def known_plan(student: PreTrainedModel, teacher: PreTrainedModel, drop: Drop | None) -> Plan | None:
    """The plan that leads from ``teacher`` to ``student``: ``drop``, or what the student's configuration says.

    What makes up for dropped layers, and how wide layers are, is that of a plan that says so, else what the
    configuration says. None = neither tells which layers are gone.

    Raises:
        UserError: layers that are none, or do not lead to the student.
    """
    num_layers, kept = len(decoder_layers(teacher)), len(decoder_layers(student))
    known = _dropped(student, teacher, num_layers)
    cut = known if drop is None else drop
    if cut is None:
        return None
    plan = cut
    if not isinstance(plan, Plan):
        layers = checked(_Given, {"drop": plan}, source="shoal.DistillationTrainer").drop
        plan = Plan(Provenance({}), num_layers, tuple(sorted(layers)), reason="given by the caller")
    wrong = [*plan.contradictions()]
    if plan.num_layers != num_layers or len(plan.keep) != kept:
        wrong.append(
            f"drop: would leave {len(plan.keep)} of {plan.num_layers} layers, but the teacher has {num_layers} and "
            f"the student {kept}"
        )
    if known is not None and plan.drop != known:
        wrong.append(f"drop: {list(plan.drop)} contradicts the student's config, which lists {list(known)} as dropped")
    if wrong:
        raise UserError(f"{wrong[0]}; pass the layers that were dropped, such as drop=plan.drop, or remove drop")
    plan = plan if plan.gaps else replace(plan, gaps=_closed_gaps(student, teacher, plan.drop))
    return plan if plan.width else replace(plan, width=known_width(student, teacher))


def known_width(student: PreTrainedModel, teacher: PreTrainedModel) -> KeptWidth | None:
    """How wide the layers of the student are by its configuration, where the teacher's have another width. Weights are
    not looked at: sharded ones are empty."""
    ours, theirs = text_config(student.config), text_config(teacher.config)
    channels = next((field for field in CHANNELS if isinstance(getattr(ours, field, None), int)), None)
    narrower = None if channels is None else _other(getattr(ours, channels), getattr(theirs, channels, None))
    fewer, heads = "num_key_value_heads", "num_attention_heads"
    groups = _other(*(getattr(own, fewer, None) or getattr(own, heads, None) for own in (ours, theirs)))
    return None if (narrower, groups) == (None, None) else KeptWidth(narrower, groups)


def _other(own: int | None, teachers: int | None) -> int | None:
    return None if own == teachers else own


def refuse_other_layers(student: PreTrainedModel, teacher: PreTrainedModel, num_layers: int) -> None:
    """Refuse a student whose lowest ``num_layers`` layers, which the plan says to be the teacher's, are not. Sharded
    weights are empty, and not looked at."""
    if not num_layers:
        return
    ours, theirs = anatomy(student), anatomy(teacher)
    parts = [(f"its layer {layer}", ours.layers[layer], theirs.layers[layer]) for layer in range(num_layers)]
    for name, own, other in [("the embeddings", ours.embeddings, theirs.embeddings), *parts]:
        others = {} if other is None else dict(other.named_parameters())
        for leaf, weight in () if own is None else own.named_parameters():
            if leaf not in others or not _holds_the_same(weight.data, others[leaf].data):
                raise UserError(
                    f"model: the weights of {name} differ from the teacher's, but no change is known. If the model was "
                    "edited, pass drop=Plan.load(...) with its plan.json; if it was trained before, set trainable "
                    "to 'layers' or 'all'"
                )


def _dropped(student: PreTrainedModel, teacher: PreTrainedModel, num_layers: int) -> tuple[int, ...] | None:
    """The teacher's layers that the student lacks by its configuration; None = that says nothing of this teacher."""
    kept = getattr(student.config, KEPT_LAYERS, None)
    if kept is None or len(kept) != len(decoder_layers(student)):
        return None
    uncut = _uncut(teacher, num_layers)
    if not set(kept) <= set(uncut):
        return None
    return tuple(layer for layer, number in enumerate(uncut) if number not in kept)


def _uncut(teacher: PreTrainedModel, num_layers: int) -> list[int]:
    """The uncut model's number of every layer of the teacher."""
    return list(getattr(teacher.config, KEPT_LAYERS, None) or range(num_layers))


def _closed_gaps(student: PreTrainedModel, teacher: PreTrainedModel, drop: Collection[int]) -> tuple[ClosedGap, ...]:
    """What the student makes up for of the layers that the teacher still has, in the teacher's numbers."""
    place = {number: layer for layer, number in enumerate(_uncut(teacher, len(decoder_layers(teacher))))}
    gaps = [ClosedGap(**gap) for gap in getattr(student.config, CLOSED_GAPS, None) or ()]
    gaps = [
        replace(gap, first=place[gap.first], last=place[gap.last])
        for gap in gaps
        if gap.first in place and gap.last in place
    ]
    return tuple(sorted((gap for gap in gaps if gap.last in drop), key=lambda gap: gap.first))


def _holds_the_same(own: Tensor, other: Tensor) -> bool:
    """Whether two weights are equal, as far as the one of fewer bits can tell."""
    if not (own.numel() and other.numel()):
        return True
    other = other.to(own.device)
    same = own.shape == other.shape
    return same and (torch.equal(own, other.to(own.dtype)) or torch.equal(own.to(other.dtype), other))
