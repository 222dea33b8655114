"""What a training is made of, put together: models, what of them is trained and shared, teacher, objective, Trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from shoal.artifacts.artifact import PruningPlan
from shoal.data.packing import PackedRows
from shoal.models.load import align_weights, load_model
from shoal.recipe.distill import Distill, Record
from shoal.recipe.losses import LOGIT_TERMS, STATE_TERMS, CrossEntropy, needs_teacher, reads_distributions
from shoal.runtime import device

from .callbacks.validation import Scorer, Watcher
from .engine.arguments import autocast_dtype, zero_stage
from .engine.sharding import place_teacher
from .engine.stop import StopRequest
from .generated.on_policy import Sampler
from .generated.sampling import end_tokens
from .objective.host_batch import with_host_copy
from .objective.layer_losses import StateLosses
from .objective.objective import Objective, SharedPrefix, output_head, to_logits
from .objective.self_check import check_objective
from .student.frozen import share_frozen, stored_names
from .student.local_stage import recorded_layers, unhealed
from .student.lora import add_adapters
from .student.trainable import Trained, keep_zeros, shares_prefix, train_only
from .teacher.recording_plan import recording_inputs, rows_from
from .teacher.recording_reader import RecordingReader
from .teacher.signals import LiveTeacher, NoTeacher, RecordedTeacher
from .trainer import DistillTrainer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Assembly:
    """A training ready to start, its objective not yet installed."""

    trainer: DistillTrainer
    objective: Objective
    student: PreTrainedModel
    trained: Trained
    shared_layers: int
    """The lowest layers, run once for teacher and student, or not at all: their state is recorded."""
    watcher: Watcher | None


def assemble(
    teacher_dir: Path,
    student_dir: Path,
    plan: PruningPlan,
    rows: PackedRows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    settings: Distill,
    record: Record,
    arguments: TrainingArguments,
    keep_checkpoints: int,
    inputs: dict[str, Any],
    identity: dict[str, Any],
    stop: StopRequest,
    scorer: Callable[[PreTrainedTokenizerBase], Scorer] | None,
    callbacks: Sequence[TrainerCallback],
    peak_tokens_per_s: float | None,
    seed: int,
    dtype: str,
    load: dict[str, Any],
) -> Assembly:
    """Load both models and put everything around them. ``inputs`` is the stage's identity, ``identity`` that of its
    checkpoints; ``load`` goes to load_model.

    Called when ``arguments`` exist: under ZeRO-3 they make from_pretrained shard what it loads.

    Raises:
        UserError: parts of the recipe that contradict the plan, the models or a recording.
        RuntimeError: a loss that would pull a perfect student away from its teacher.
    """
    student = load_model(student_dir, dtype="float32", **load)
    trained = train_only(student, settings.trainable, plan)
    stored = stored_names(student_dir)
    if settings.lora is not None:
        add_adapters(student, settings.lora, trained, seed=seed, stored=stored)
    keep_zeros(student)
    live = None
    if settings.teacher.recorded is None and needs_teacher(settings.losses):
        live = load_model(teacher_dir, dtype=settings.teacher.dtype or dtype, **load).requires_grad_(False)
    frozen = shares_prefix(trained, plan)
    if settings.teacher.prefix:
        shared = recorded_layers(trained, plan, settings)
    else:
        shared = 0 if live is None else unhealed(frozen, plan, settings)
    prefix = SharedPrefix(student, live, first_change=shared) if shared else None
    state_terms = [term for term in settings.losses if isinstance(term, STATE_TERMS)]
    states = StateLosses(state_terms, plan, student, live, num_shared=frozen) if state_terms else None
    reads_logits = any(map(reads_distributions, settings.losses))
    if live is not None:
        teacher = LiveTeacher(live, reads_logits=reads_logits, states=states, prefix=prefix)
    elif settings.teacher.recorded is None:
        teacher = NoTeacher()
    else:
        reader = _recording(teacher_dir, rows, settings, record, states, inputs, prefix=shared or None)
        teacher = RecordedTeacher(reader, reads_logits=reads_logits, states=states, prefix=prefix)
    objective = Objective(
        student,
        None if live is None else to_logits(live),
        terms=settings.losses,
        chunk=settings.head_chunk,
        states=states,
        recorded_temperature=record.temperature,
    )
    trainer = DistillTrainer(
        model=student,
        args=arguments,
        train_dataset=rows,
        data_collator=_stack,
        teacher=teacher,
        teacher_head=None if live is None else output_head(live),
        objective=objective,
        prefix=prefix,
        inputs=identity,
        keep_checkpoints=keep_checkpoints,
        stop=stop,
        stop_on_spike=settings.stop_on_spike,
        autocast_dtype=autocast_dtype(settings),
        on_policy=_on_policy(settings, student, tokenizer, seed=seed),
        peak_tokens_per_s=peak_tokens_per_s,
        callbacks=[*callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    if live is not None:
        place_teacher(live, trainer, offload=settings.teacher.offload)
        if zero_stage(settings) < 3 and not settings.teacher.offload:
            _share_weights(student, live, plan, settings, stored)
    check_objective(settings, live or student, rows, states, record, is_teacher=live is not None)
    watcher = None
    if settings.watch is not None and scorer is not None:
        watcher = Watcher(settings.watch, Path(str(arguments.output_dir)), identity)
        trainer.watch_with(watcher, scorer(tokenizer))
    return Assembly(trainer, objective, student, trained, shared, watcher)


def _on_policy(
    settings: Distill, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> Sampler | None:
    if settings.on_policy is None or settings.on_policy.share == 0:
        return None
    ends = end_tokens(student.generation_config, tokenizer.eos_token_id)
    special: Any = tokenizer
    start = special.bos_token_id
    begins = start is not None and special("a")["input_ids"][:1] == [start]
    padding = special.pad_token_id if special.pad_token_id is not None else (*ends, 0)[0]
    return Sampler(settings.on_policy, seed, settings.sequence_length, ends, padding, start if begins else None)


def _share_weights(
    student: PreTrainedModel, teacher: PreTrainedModel, plan: PruningPlan, settings: Distill, stored: set[str]
) -> None:
    for model in (student, teacher):
        align_weights(model)  # else the last bits may differ on a CPU: mapped files are not aligned
    student.to(device())  # pyright: ignore[reportArgumentType]
    saved = share_frozen(student, teacher, plan.keep, autocast_dtype=autocast_dtype(settings), stored=stored)
    if saved:
        log.info("teacher and student share %.0f MB of frozen weights", saved / 1e6)


def _recording(
    teacher_dir: Path,
    rows: PackedRows,
    settings: Distill,
    record: Record,
    states: StateLosses | None,
    inputs: dict[str, Any],
    *,
    prefix: int | None,
) -> RecordingReader:
    assert settings.teacher.recorded is not None
    identity = recording_inputs(
        record,
        teacher_dir,
        model=inputs["model"],
        sequence_length=settings.sequence_length,
        dtype=inputs["dtype"],
        attention=inputs["attention"],
        prefix=prefix,
    )
    return RecordingReader(
        Path(settings.teacher.recorded).expanduser(),
        rows,
        inputs=identity,
        rows_from=rows_from(inputs),
        states=() if states is None else states.teacher_layers,
        temperatures={
            term.temperature
            for term in settings.losses
            if isinstance(term, LOGIT_TERMS) and not isinstance(term, CrossEntropy)
        },
    )


def _stack(rows: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    return with_host_copy({key: torch.stack([row[key] for row in rows]) for key in rows[0]})
