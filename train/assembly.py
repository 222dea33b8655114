"""A training put together: models are built, joined with the loss, and given to a Trainer; then weights are shared."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from shoal.data.mixed_documents import IN_TRAINING, warn_of_mixed_documents
from shoal.data.packing import PackedRows
from shoal.models.load import align_weights
from shoal.recipe.losses import LOGIT_TERMS, CrossEntropy
from shoal.runtime import device

from .engine.sharding import loaded_in, place_teacher
from .engine.stop import StopRequest
from .generated.on_policy import Sampler
from .objective.host_batch import stacked
from .objective.layer_losses import StateLosses
from .objective.objective import SharedPrefix
from .student.frozen import share_frozen, stored_names
from .student.spec import TrainSpec
from .student.trainable import keep_zeros
from .teacher.recording_plan import recording_inputs, rows_from
from .teacher.recording_reader import RecordingReader
from .teacher.signals import RecordedTeacher
from .teacher.wiring import check_fused, make_trainable, wire
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
    tokenizer: PreTrainedTokenizerBase,
    arguments: TrainingArguments,
    identity: Identity,
    *,
    stop: StopRequest,
    callbacks: Sequence[TrainerCallback],
    peak_tokens_per_s: float | None,
) -> DistillTrainer:
    """Load the student, made trainable, and the teacher where it is to run; the Trainer that joins them with the loss.

    The teacher is on its device, weights are shared. ``arguments`` exist before the models: under ZeRO-3 they make
    from_pretrained shard what it loads.

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
    wiring = wire(spec, student, teacher, partial(_recorded_teacher, spec, rows, identity.stage))
    trainer = DistillTrainer(
        model=student,
        args=arguments,
        train_dataset=rows,
        data_collator=stacked,
        spec=spec,
        wiring=wiring,
        identity=identity.checkpoints,
        stop=stop,
        on_policy=Sampler.of(spec.settings, student, tokenizer, seed=arguments.seed),
        refused=Path(str(arguments.output_dir)).parent / "refused",
        peak_tokens_per_s=peak_tokens_per_s,
        callbacks=[*callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    if teacher is not None:
        place_teacher(teacher, trainer, offload=spec.settings.teacher.offload)
        if spec.deepspeed.stage < 3 and not spec.settings.teacher.offload:
            _share_weights(spec, student, teacher, stored)
    check_fused(wiring.objective, spec)
    if teacher is not None or spec.deepspeed.stage < 3:  # a student in pieces cannot run before training has begun
        warn_of_mixed_documents(teacher or student, rows, IN_TRAINING, autocast_dtype=spec.deepspeed.autocast_dtype)
    return trainer


def _share_weights(spec: TrainSpec, student: PreTrainedModel, teacher: PreTrainedModel, stored: set[str]) -> None:
    for model in (student, teacher):
        align_weights(model)  # else the last bits may differ on a CPU: mapped files are not aligned
    student.to(device())  # pyright: ignore[reportArgumentType]
    autocast_dtype = spec.deepspeed.autocast_dtype
    if saved := share_frozen(student, teacher, spec.plan.keep, autocast_dtype=autocast_dtype, stored=stored):
        log.info("teacher and student share %.0f MB of frozen weights", saved / 1e6)


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
        temperatures={
            term.temperature
            for term in settings.losses
            if isinstance(term, LOGIT_TERMS) and not isinstance(term, CrossEntropy)
        },
    )
    return RecordedTeacher(reader, reads_logits=spec.reads_logits, states=states, prefix=prefix)
