"""How student and teacher are joined in a training, whether it is a real one or a few micro-batches that are timed."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel

from shoal.recipe.distill import sources_of_terms
from shoal.recipe.losses import STATE_TERMS

from ..objective.layer_losses import StateLosses
from ..objective.objective import Objective, SharedPrefix, Signals, output_head, to_logits
from ..student.lora import add_adapters
from ..student.spec import TrainSpec
from ..student.trainable import train_only
from .signals import LiveTeacher, Teacher

Recorded = Callable[[StateLosses | None, SharedPrefix | None], Teacher]
"""Makes the teacher whose signals were recorded, from the state terms that read them and the layers that are spared."""


@dataclass(frozen=True)
class Wiring:
    """Student, teacher and the loss between them. The objective is not yet installed."""

    objective: Objective
    teacher: Teacher
    teacher_head: nn.Module | None
    """Output head of a teacher that is loaded."""
    prefix: SharedPrefix | None
    """Lowest layers that the student does not run; None = it runs all."""


def make_trainable(student: PreTrainedModel, spec: TrainSpec, *, seed: int, stored: Set[str] = frozenset()) -> None:
    """Freeze what is not trained and put adapters where the recipe wants them. ``stored`` are the names of the tensors
    in the student's files, which weights in 4 bits come back from.

    Raises:
        UserError: as add_adapters does.
    """
    train_only(student, spec.trained)
    if spec.settings.lora is not None:
        add_adapters(student, spec.settings.lora, spec.trained, seed=seed, stored=stored)


def make_trainable_alike(student: PreTrainedModel, spec: TrainSpec) -> None:
    """The same for a student that is built without the weights of its files: they stay in full precision."""
    settings = spec.settings
    plain = None if settings.lora is None else replace(settings.lora, quantization="none")
    make_trainable(student, replace(spec, settings=replace(settings, lora=plain)), seed=0)


def wire(spec: TrainSpec, student: PreTrainedModel, live: PreTrainedModel | None, recorded: Recorded) -> Wiring:
    """Join a student that is made trainable with its teacher: ``live``, or what ``recorded`` makes where signals lie on
    the disk.

    Raises:
        UserError: loss terms that contradict the plan, the models or a recording.
    """
    shared, settings = spec.shared_layers, spec.settings
    prefix = SharedPrefix(student, live, first_change=shared) if shared else None
    terms = [term for term in settings.losses if isinstance(term, STATE_TERMS)]
    states = StateLosses(terms, spec.plan, student, live, num_shared=spec.frozen_layers) if terms else None
    if live is not None:
        teacher = LiveTeacher(live, reads_logits=spec.reads_logits, states=states, prefix=prefix)
    else:
        teacher = recorded(states, prefix) if spec.teacher_place == "recorded" else lambda _batch: Signals()
    objective = Objective(
        student,
        None if live is None else to_logits(live),
        terms=settings.losses,
        chunk=settings.head_chunk,
        states=states,
        recorded_temperature=spec.record.temperature,
        sources=sources_of_terms(settings),
    )
    return Wiring(objective, teacher, None if live is None else output_head(live), prefix)
