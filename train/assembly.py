"""A training put together: models are built, joined with the loss, and given to a Trainer; then weights are shared."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from shoal.data.packing import PackedRows
from shoal.models.document_masks import IN_TRAINING, warn_of_mixed_documents

from .engine.sharding import loaded_in
from .engine.stop import StopRequest
from .objective.layer_losses import StateLosses
from .objective.objective import SharedPrefix
from .objective_trainer import Parts
from .student.frozen import stored_names
from .student.spec import TrainSpec
from .student.trainable import keep_zeros
from .teacher.recording import recording_inputs, rows_from
from .teacher.signals import RecordedTeacher, RecordingReader
from .teacher.wiring import make_trainable
from .trainer import DistillTrainer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Identity:
    """What a training is known by when it goes on or is asked for again."""

    stage: dict[str, Any]
    """All that shapes distilled/."""
    checkpoints: dict[str, Any]
    """The same with the real batch, however ranks and micro-batches share it."""


def make_trainer(
    spec: TrainSpec,
    rows: PackedRows,
    arguments: TrainingArguments,
    identity: Identity,
    *,
    stop: StopRequest,
    callbacks: Sequence[TrainerCallback],
    peak_tokens_per_s: float | None,
) -> DistillTrainer:
    """Load the student, made trainable, and the teacher where it is to run; the Trainer that joins them with the loss.

    ``arguments`` exist before the models: under ZeRO-3 they make from_pretrained shard what it loads.

    Raises:
        UserError: parts of the recipe that contradict the plan, the models or a recording.
    """
    held = spec.deepspeed.weight_dtype
    if held.itemsize < spec.student.stored_dtype.itemsize:
        log.warning(
            "the student's weights are stored in %s and held in %s: training begins with them rounded to that",
            *(str(dtype).removeprefix("torch.") for dtype in (spec.student.stored_dtype, held)),
        )
    student, teacher = spec.student.model(dtype=str(held).removeprefix("torch.")), None
    stored = stored_names(spec.student.folder)
    make_trainable(student, spec, seed=arguments.seed, stored=stored)
    keep_zeros(student)
    if spec.runs_teacher:
        with loaded_in(spec.teacher_dtype, arguments):
            teacher = spec.teacher.model(dtype=spec.settings.teacher.dtype).requires_grad_(False)
    parts = Parts(
        spec,
        student,
        teacher,
        spec.teacher.tokenizer(),
        partial(_recorded_teacher, spec, rows, identity.stage),
        refused=Path(str(arguments.output_dir)).parent / "refused",
        stop=stop,
        peak_tokens_per_s=peak_tokens_per_s,
        stored=stored,
    )
    known_by = identity.checkpoints
    trainer = DistillTrainer(parts, identity=known_by, args=arguments, train_dataset=rows, callbacks=[*callbacks])
    trainer.remove_callback(PrinterCallback)
    if teacher is not None or spec.deepspeed.stage < 3:  # a student in pieces cannot run before training has begun
        planes, precision = (rows.input_ids_NS, rows.position_ids_NS), spec.deepspeed.autocast_dtype
        warn_of_mixed_documents(teacher or student, *planes, IN_TRAINING, autocast_dtype=precision)
    return trainer


def _recorded_teacher(
    spec: TrainSpec,
    rows: PackedRows,
    inputs: dict[str, Any],
    states: StateLosses | None,
    prefix: SharedPrefix | None,
) -> RecordedTeacher:
    settings = spec.settings
    assert settings.teacher.recorded is not None
    reader = RecordingReader(
        Path(settings.teacher.recorded).expanduser(),
        rows,
        inputs=recording_inputs(
            spec.record,
            spec.teacher,
            model=inputs["model"],
            sequence_length=settings.sequence_length,
            prefix=spec.shared_layers or None,
        ),
        rows_from=rows_from(inputs),
        states=() if states is None else states.teacher_layers,
    )
    return RecordedTeacher(reader, reads_logits=spec.reads_logits, states=states, prefix=prefix)
