"""Let attention, MLP or heads of layers write nothing for good. Saves neither memory nor time: weights become zero."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from shoal.artifacts.importance import Importance
from shoal.artifacts.plan import PlannedChange
from shoal.components import Component, LayerEdits
from shoal.compress.edits.layer_edits import in_force, layer_edits
from shoal.compress.metrics.greedy import HALVES
from shoal.compress.surgery.cut_model import cut_model, kept_layers, skipped
from shoal.errors import UserError
from shoal.launch.verbs.measure import importance_of
from shoal.launch.verbs.run import Run
from shoal.models.load import num_parameters
from shoal.recipe.section import Positive, Section

from .edits.student import Edited, loaded_teacher, write_student
from .edits.zeroing import unsaved_parameters, zero_for_good

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
    zeroed = zero_for_good(student, [(place[layer], edit) for layer, edit in edits])
    idle = unsaved_parameters(teacher, edits)
    log.warning(
        "skip: %s parameters (%.1f %% of the student) only calculate zeros now; they stay in the file and are still "
        "computed, so this saves neither memory nor time",
        *(f"{idle:,}", 100 * idle / num_parameters(student)),
    )

    def planned() -> ExitStack:
        stack = ExitStack()
        stack.enter_context(in_force(teacher, edits))
        stack.enter_context(skipped(teacher, drop))
        return stack

    words = f"{', '.join(component.name for component in components)} silent"
    change = PlannedChange("skip", words, tuple(sorted({layer for layer, _ in edits})))
    edited = Edited(student, change, planned, drop=drop, zeroed=zeroed)
    return write_student(run, "skip", settings, edited, teacher, _measured(run) if settings.order else {})


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


def _measured(run: Run) -> dict[str, str]:
    return {"importance": Importance.read(run.dir / Importance.FILE).provenance.fingerprint}
