"""How student and teacher are joined in a training."""

from __future__ import annotations

import logging
from collections.abc import Set
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel

from shoal.models.anatomy import decoder_layers
from shoal.recipe.losses import HiddenStates

from ..engine.kernels import Fused
from ..objective.chunked_loss import CHUNK
from ..objective.layer_losses import StateLosses
from ..objective.objective import Objective, SharedPrefix, Signals, output_head, to_logits
from ..student.lora import add_adapters
from ..student.spec import TrainSpec
from ..student.trainable import train_only
from .signals import LiveTeacher, RecordedTeacher, RecordingReader, Teacher

log = logging.getLogger(__name__)


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
    in the student's files, which weights in 4 bits come back from."""
    train_only(student, spec.trained)
    if spec.settings.lora is not None:
        add_adapters(student, spec.settings.lora, spec.trained, seed=seed, stored=stored)


def make_trainable_alike(student: PreTrainedModel, spec: TrainSpec) -> None:
    """The same for a student that is built without the weights of its files: they stay in full precision."""
    settings = spec.settings
    plain = None if settings.lora is None else replace(settings.lora, load_in_4bit=False)
    make_trainable(student, replace(spec, settings=replace(settings, lora=plain)), seed=0)


def wire(
    spec: TrainSpec, student: PreTrainedModel, live: PreTrainedModel | None, recorded: RecordingReader | None = None
) -> Wiring:
    """Join a student that is made trainable with its teacher: ``live``, or what was ``recorded`` of it.

    Raises:
        UserError: loss terms that contradict the plan or the models.
    """
    shared, settings = spec.shared_layers, spec.settings
    prefix = SharedPrefix(student, live, first_change=shared) if shared else None
    terms = [term for term in settings.terms if isinstance(term, HiddenStates)]
    states = StateLosses(terms, spec.plan, student, live, num_shared=spec.frozen_layers) if terms else None
    if live is not None:
        teacher = LiveTeacher(
            live, reads_logits=spec.reads_logits, states=states, prefix=prefix, asked=spec.asked_sources
        )
    else:
        of_recording = None if recorded is None else RecordedTeacher(recorded, spec.reads_logits, states, prefix)
        teacher = of_recording or (lambda _batch: Signals())
    # a teacher that comes over layer by layer keeps its own kernels
    here = [student] if live is None or spec.teacher_place != "live" else [student, live]
    objective = Objective(
        student,
        None if live is None else to_logits(live),
        terms=tuple(settings.terms),
        chunk=CHUNK,
        states=states,
        sources=tuple(settings.terms.values()),
        compiled_layers=_compiled_layers(spec, *here) if settings.trainer.get("torch_compile") else None,
    )
    if settings.trainer.get("use_liger_kernel"):
        log.info("use_liger_kernel: norms, MLPs and rotary embedding of %d model(s)", len(here))
        objective.fused = Fused(here)
    return Wiring(objective, teacher, None if live is None else output_head(live), prefix)


def _compiled_layers(
    spec: TrainSpec, student: PreTrainedModel, teacher: PreTrainedModel | None = None
) -> list[nn.Module]:
    """The layers that training runs, and whose weights stay where they are: not those that the student is spared, nor
    of a teacher that comes over layer by layer."""
    own = decoder_layers(student)[spec.shared_layers :]
    theirs = () if teacher is None else decoder_layers(teacher)
    log.info(
        "torch_compile: %d layers of the student, %d of the teacher and the loss at the head; first steps take longer",
        len(own),
        len(theirs),
    )
    return [*own, *theirs]
