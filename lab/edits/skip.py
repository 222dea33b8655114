"""Let attention, MLP or heads of layers write nothing for good: their output projections become zero.

0 * x adds nothing wherever x is finite, so the student gives the same bits there as its teacher with the operator in
force. Neither memory nor time is saved.

H query heads, d size of a head.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shoal.artifacts.importance import Importance
from shoal.artifacts.plan import PlannedChange
from shoal.components import Component, LayerEdits
from shoal.compress.edits.layer_edits import Half, checked, in_force, layer_edits, with_halves, with_heads
from shoal.compress.edits.sublayers import output_parameters, where
from shoal.compress.edits.tensors import put_tensors
from shoal.compress.metrics.greedy import HALVES
from shoal.compress.surgery.cut_model import cut_model, kept_layers, skipped
from shoal.errors import UserError
from shoal.launch.verbs.measure import importance_of
from shoal.launch.verbs.run import Run
from shoal.models.anatomy import anatomy, decoder_layers
from shoal.recipe.section import Positive, Section

from .student import Edited, loaded_teacher, write_student

log = logging.getLogger(__name__)

Index = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Settings(Section):
    """What of which layers is silenced, by the model's numbers from 0."""

    attention: tuple[Index, ...] = ()
    """Layers whose attention writes nothing."""
    mlp: tuple[Index, ...] = ()
    """Layers whose MLP, or mixture of experts, writes nothing."""
    heads: dict[Index, tuple[Index, ...]] = field(default_factory=dict)
    """Layer -> query heads that write nothing; other heads of the same key-value group are not touched."""
    kv_groups: dict[Index, tuple[Index, ...]] = field(default_factory=dict)
    """Layer -> key-value heads of which all query heads that read them write nothing."""
    order: str | None = None
    """Instead an order of halves in importance.json, such as blockpruner; a layer that loses both is dropped."""
    num_halves: Positive = 2
    """How many of ``order`` go."""

    def __post_init__(self) -> None:
        if bool(self.order) == bool(self.attention or self.mlp or self.heads or self.kv_groups):
            raise ValueError("name what is silenced: attention, mlp, heads, kv_groups; or an order of importance.json")


def work(run: Run, settings: Settings) -> str:
    """student/ and plan.json: the run's model with these parts silent."""
    drop, components = _of_order(run, settings) if settings.order else ((), _named(settings))
    teacher = loaded_teacher(run)
    edits: LayerEdits = layer_edits(components, teacher)
    student = cut_model(teacher, drop, share=True)
    place = {layer: place for place, layer in enumerate(kept_layers(run.num_layers, drop))}
    zeroed: list[str] = []
    for layer, edit in edits:
        if edit.part == "head":
            zeroed += zero_heads(student, {place[layer]: edit.indices})
        else:
            assert edit.part in ("attention", "mlp"), f"{edit.part} is not taken out by zeros"
            zeroed += zero_half(edit.part, student, [place[layer]])
    log.warning("skip: what is silent stays in the file and is still computed, which saves neither memory nor time")

    @contextmanager
    def planned() -> Iterator[None]:
        with in_force(teacher, edits), skipped(teacher, drop):
            yield

    words = f"{', '.join(component.name for component in components)} silent"
    change = PlannedChange("skip", words, tuple(sorted({layer for layer, _ in edits})))
    edited = Edited(student, change, planned, drop=drop, zeroed=zeroed)
    read = {"importance": Importance.load(run.dir / Importance.FILE).provenance.fingerprint} if settings.order else {}
    return write_student(run, "skip", settings, edited, teacher, read)


def _named(settings: Settings) -> list[Component]:
    named = [Component((layer,), "attention") for layer in settings.attention]
    named += [Component((layer,), "mlp") for layer in settings.mlp]
    named += [Component((layer,), "head", head) for layer, heads in settings.heads.items() for head in heads]
    return named + [
        Component((layer,), "kv_group", group) for layer, groups in settings.kv_groups.items() for group in groups
    ]


def _of_order(run: Run, settings: Settings) -> tuple[tuple[int, ...], list[Component]]:
    """Layers both of whose halves go, and the other halves that do."""
    path = run.dir / Importance.FILE
    orders = importance_of(run).require().orders
    order = [removal.unit for removal in orders.get(settings.order or "", ())]
    if not order or {unit.part for unit in order} - {*HALVES}:
        raise UserError(
            f"{path}: holds no order of halves named {settings.order}; there is {', '.join(orders) or 'none'}"
        )
    if len(order) < settings.num_halves:
        raise UserError(f"{path}: the order of {settings.order} holds {len(order)} halves; set num_halves to no more")
    taken = order[: settings.num_halves]
    gone = [{unit.layers[0] for unit in taken if unit.part == half} for half in HALVES]
    both = gone[0] & gone[1]
    return tuple(sorted(both)), [unit for unit in taken if unit.layers[0] not in both]


@torch.no_grad()
def zero_half(half: Half, model: PreTrainedModel, layers: Collection[int]) -> list[str]:
    """Let the attention or MLP of ``layers`` add nothing for good; the names of the parameters that became zero.

    They are new tensors: what ``model`` shares with its teacher stays as it is there. A context or expert that is not
    finite gives NaN (0 * inf), where half_silenced gives zero; what a half writes for all that, or another layer lacks
    that uses the same weights, shows in the proof.

    Raises:
        UserError: as half_silenced does; a half whose output weights shoal does not know. The model is then as it was.
    """
    names: list[str] = []
    for layer in layers:
        with_halves(model, layer)  # refuses
        outputs = output_parameters(decoder_layers(model)[layer], half)
        if not outputs:
            raise UserError(
                f"{where(model, layer)}: shoal does not know which weights write its {half}'s output; drop whole layers"
            )
        names += [f"{anatomy(model).layers_name}.{layer}.{name}" for name in outputs]
    names = list(dict.fromkeys(names))
    put_tensors(model, {name: torch.zeros_like(model.get_parameter(name)) for name in names})
    return names


@torch.no_grad()
def zero_heads(model: PreTrainedModel, heads: Mapping[int, Sequence[int]]) -> list[str]:
    """Zero what output projections read from single query heads (layer -> heads); the names of the changed parameters.

    A bias of the projection stays: it belongs to no head.

    Raises:
        UserError: an index that is no layer or no head, or a layer whose heads cannot be masked alone.
    """
    masked: dict[str, Tensor] = {}
    for layer, named in heads.items():
        halves = with_heads(model, layer)
        checked(named, halves.num_heads, f"{where(model, layer)}: head")
        projection = decoder_layers(model)[layer].get_submodule(halves.projection)
        name = f"{anatomy(model).layers_name}.{layer}.{halves.projection}.weight"
        weight = model.get_parameter(name).detach().clone()
        # (D, H * d) of a linear map, (H * d, D) of GPT-2's
        inputs_dim = 0 if isinstance(projection, Conv1D) else 1
        weight.unflatten(inputs_dim, (halves.num_heads, -1)).index_fill_(
            inputs_dim, torch.tensor(list(named), device=weight.device), 0
        )
        masked[name] = weight
    put_tensors(model, masked)
    return list(masked)
