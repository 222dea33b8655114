"""Carry out a plan's edits: on the teacher while a block runs, and for good in a student.

Both keep the order that shoal.recipe.edits names: swaps, then what makes layers, then skips and masks. What is
saved is proven against the teacher with the edits in force, so that neither way can be wrong alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from shoal.artifacts.plan import PruningPlan
from shoal.components import LayerEdit
from shoal.data.sources import load_texts, pack
from shoal.errors import UserError
from shoal.models.anatomy import text_config
from shoal.models.checkpoint_files import ZEROED_WEIGHTS, read_shards
from shoal.models.load import load_config, loaded_dtype, num_parameters, without_data
from shoal.recipe.edits import Edit, Insert, Merge, Replace, Swap, components, edited_layers, insertions
from shoal.runtime import device

from ..surgery.cut_model import cut_model, skipped
from ..surgery.quantised import without_quantization
from .growing import inserted_in_place, new_layers, refuse_impossible_insertion
from .layer_edits import in_force, layer_edits, zero_for_good
from .merging import (
    check_run,
    merged_layer,
    refuse_different_kinds,
    refuse_shared_parameters,
    tensors_in_place,
    with_layers,
)
from .replacement import refuse_impossible_start, train_replacement
from .swapping import refuse_unswappable, swapped
from .zeroing import unsaved_parameters

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Materials:
    """What edits need besides the teacher and the plan."""

    donors: Mapping[int, PreTrainedModel]
    """The models that swaps take from, by index of the edit."""
    layers: Mapping[int, Mapping[str, Tensor]]
    """Tensors of merged and replaced layers, by the teacher's index."""
    inserted: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)
    """Tensors of new layers, by the teacher's layer that each comes after."""


NOTHING_MADE = Materials({}, {})
"""For a plan without edits."""


def refuse_impossible_edits(
    teacher_folder: Path, edits: Sequence[Edit], donors: Mapping[int, Path], *, trust_remote_code: bool = False
) -> None:
    """Refuse what configurations and headers alone show to be impossible, before any weight is read.

    Heads, and halves that cannot be taken out, show only when the model runs.

    Raises:
        UserError: a quantised model, a run of layers of different kinds, a donor that does not fit, rows longer than
            the model's positions.
    """
    if not edits:
        return
    teacher = _without_weights(teacher_folder, trust_remote_code=trust_remote_code)
    positions = getattr(text_config(teacher.config), "max_position_embeddings", None)
    for index, edit in enumerate(edits):
        match edit:
            case Swap():
                donor = _without_weights(donors[index], trust_remote_code=trust_remote_code)
                refuse_unswappable(teacher, donor, edit.layers, edit.parts)
            case Merge():
                refuse_different_kinds(teacher, check_run(teacher, edit.layers[0], len(edit.layers)))
                for layer in edit.layers:
                    refuse_shared_parameters(teacher, layer)
            case Replace():
                refuse_shared_parameters(teacher, edit.layers[0])
                refuse_impossible_start(teacher, edit)
                if positions is not None and edit.sequence_length > positions:
                    raise UserError(
                        f"prune.edits.{index}.sequence_length: {edit.sequence_length} is more than the {positions} "
                        f"positions of {teacher_folder}; lower it"
                    )
            case Insert():
                refuse_impossible_insertion(teacher, edit)


def _without_weights(folder: Path, *, trust_remote_code: bool) -> PreTrainedModel:
    config, quantisation = without_quantization(load_config(folder, trust_remote_code=trust_remote_code))
    if quantisation:
        raise UserError(f"{folder}: is quantised, so its layers cannot be edited; give the full-precision model")
    return without_data(config, dtype=loaded_dtype(config, shards=read_shards(folder)))


def materials(
    teacher: PreTrainedModel, plan: PruningPlan, donors: Mapping[int, PreTrainedModel], tokenizer: Any, *, seed: int
) -> Materials:
    """Merge and train what the plan asks for, on the teacher with its swaps in force.

    Raises:
        UserError: donors, runs, data, heads or halves that do not fit.
    """
    # what is impossible is refused before anything is trained
    with in_force(teacher, layer_edits(components(plan.edits), teacher)):
        pass
    if any(isinstance(edit, Replace | Insert) for edit in plan.edits):
        cut_model(teacher, plan.drop, insert=insertions(plan.edits), share=True)
    layers: dict[int, Mapping[str, Tensor]] = {}
    inserted: dict[int, Mapping[str, Tensor]] = {}
    with _swaps(teacher, plan, donors):
        for edit in plan.edits:
            first = edited_layers(edit)[0]
            if isinstance(edit, Merge):
                layers[first] = merged_layer(teacher, first, len(edit.layers), method=edit.method, weights=edit.weights)
            elif isinstance(edit, Replace):
                layers[first] = _trained(teacher, edit, tokenizer, seed=seed)
            elif isinstance(edit, Insert):
                inserted |= new_layers(teacher, edit, seed=seed)
    return Materials(donors, layers, inserted)


def _trained(teacher: Any, edit: Replace, tokenizer: Any, *, seed: int) -> dict[str, Tensor]:
    """On the accelerator where there is one; the teacher comes back."""
    texts = [(source, load_texts(source, max_characters=16 * edit.num_tokens)) for source in edit.data]
    rows = pack(texts, tokenizer, sequence_length=edit.sequence_length, num_tokens=edit.num_tokens, seed=seed)
    home = teacher.device
    trained = train_replacement(teacher.to(device()), edit, rows, seed=seed)
    teacher.to(home)
    return {name: tensor.to(home) for name, tensor in trained.tensors.items()}


@contextmanager
def edited(teacher: PreTrainedModel, plan: PruningPlan, new_weights: Materials) -> Iterator[PreTrainedModel]:
    """``teacher`` with everything that ``plan`` does to it in force, until the block ends.

    Where new layers write something, it runs without a cache only, which has no slots for them.
    """
    writing = {layer: tensors for layer, tensors in new_weights.inserted.items() if layer not in _silent(plan)}
    with ExitStack() as stack:
        stack.enter_context(_swaps(teacher, plan, new_weights.donors))
        stack.enter_context(tensors_in_place(teacher, new_weights.layers))
        stack.enter_context(inserted_in_place(teacher, writing))
        stack.enter_context(in_force(teacher, layer_edits(components(plan.edits), teacher)))
        stack.enter_context(skipped(teacher, plan.drop))
        yield teacher


def edited_student(teacher: PreTrainedModel, plan: PruningPlan, new_weights: Materials) -> PreTrainedModel:
    """A new model that is ``teacher`` after ``plan``; the two share what was not changed.

    Raises:
        UserError: a cut or an edit that the architecture cannot express.
    """
    with _swaps(teacher, plan, new_weights.donors):
        student = with_layers(teacher, plan.drop, new_weights.layers, inserted=new_weights.inserted, share=True)
    place = {layer: plan.keep.index(layer) for layer in plan.keep}
    # of an edited teacher's zeros those are left that no swap, merge or training has filled
    zeroed = [
        name for name in getattr(student.config, ZEROED_WEIGHTS, None) or () if not student.get_parameter(name).all()
    ]
    edits = layer_edits(components(plan.edits), teacher)
    zeroed += zero_for_good(student, [(place[layer], edit) for layer, edit in edits])
    # these zeros are where training starts from, so it is not told to keep them
    silent = [(place[layer] + 1, LayerEdit(half)) for layer in _silent(plan) for half in ("attention", "mlp")]
    zero_for_good(student, silent)
    if zeroed or hasattr(student.config, ZEROED_WEIGHTS):
        setattr(student.config, ZEROED_WEIGHTS, sorted(set(zeroed)))
    if unsaved := unsaved_parameters(teacher, edits):
        log.warning(
            "prune: %s parameters (%.1f %% of the student) only calculate zeros now; they stay in the file and are "
            "still computed, so skips and masks save neither memory nor time",
            f"{unsaved:,}",
            100 * unsaved / num_parameters(student),
        )
    return student


def runs_with_a_cache(plan: PruningPlan) -> bool:
    """Whether the teacher does with the plan's edits in force: new layers that write something have no slot in it."""
    return set(insertions(plan.edits)) <= _silent(plan)


def _silent(plan: PruningPlan) -> set[int]:
    """The layers after which a new one comes that writes nothing."""
    return {layer for edit in plan.edits if isinstance(edit, Insert) and edit.init == "zero" for layer in edit.after}


@contextmanager
def _swaps(
    teacher: PreTrainedModel, plan: PruningPlan, donors: Mapping[int, PreTrainedModel]
) -> Iterator[PreTrainedModel]:
    with ExitStack() as stack:
        for index, edit in enumerate(plan.edits):
            if isinstance(edit, Swap):
                stack.enter_context(swapped(teacher, donors[index], edit.layers, weight=edit.weight, parts=edit.parts))
        yield teacher
