"""The distill stage: teacher/ and student/ in, distilled/ and distill.json out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainingArguments

from shoal.data.image_rows import ImageReader, images_fingerprint
from shoal.data.packing import PackedRows
from shoal.data.sources import sources_fingerprint
from shoal.errors import UserError
from shoal.models.checkpoint_files import tokenizer_fingerprint
from shoal.progress import doing
from shoal.ranks import is_main
from shoal.recipe.distill import NEUTRAL_TRAINER_KEYS, Distill, Record
from shoal.recipe.losses import LOGIT_TERMS, CrossEntropy
from shoal.recipe.section import Shapes, shaping
from shoal.runtime import agreed
from shoal.tracking import wandb_run

from .assembly import Identity, make_trainer
from .callbacks.progress import Progress
from .callbacks.validation import Scorer, Watcher
from .callbacks.wandb_curves import Curves
from .dataset import rows_to_train_on, sources_apart, teacher_texts
from .engine.arguments import (
    BATCH_SPLIT,
    check_names,
    deepspeed_config,
    rows_per_step,
    training_arguments,
)
from .engine.checkpoint import last_complete, needs_universal
from .engine.fused import is_fused
from .engine.sharding import join_deepspeed, leave_deepspeed
from .engine.stop import Heartbeat, StopRequest
from .objective.chunked_loss import refuse_for_top_k
from .preflight.fit import check_fit, explained_memory
from .preflight.throughput import flops_per_token, most_tokens_per_s
from .save import write_results
from .student.lora import refuse_untrainable
from .student.spec import TrainSpec, require_same_vocabulary
from .trainer import DistillTrainer

log = logging.getLogger(__name__)


class Stopped(Exception):
    """Training was asked to stop by the signal ``number`` and has saved; the same command goes on."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.number = number


def distill_inputs(
    settings: Distill,
    record: Record,
    *,
    teacher: str,
    trained: Mapping[str, Any],
    general: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that shapes distilled/: the stage's identity.

    ``teacher`` is the teacher's fingerprint, ``trained`` what tells the model that is trained from it, ``general`` the
    recipe's settings outside its sections.
    """
    section = shaping(settings, Shapes.TRAINING, "distill.")
    if settings.watch is None or settings.watch.best is None:
        del section["distill.watch"]  # it only looks on
    # what was recorded, not where it lies; it is compared with rows and model when it is read
    told = shaping(record, Shapes.TRAINING) | record.engine_inputs
    recorded = told | ({"prefix": True} if settings.teacher.prefix else {})
    section["distill.teacher"]["recorded"] = None if settings.teacher.recorded is None else recorded
    if settings.writing.prompts is not None:
        section["distill.writing.prompts"] = sources_fingerprint((settings.writing.prompts,))
    # what the file says now, not what it is called; how ZeRO shards the work does not change its result
    section["distill.deepspeed"] = {k: v for k, v in deepspeed_config(settings).items() if k != "zero_optimization"}
    neutral = {*NEUTRAL_TRAINER_KEYS, *(BATCH_SPLIT if settings.batch_size is not None else ())}
    if settings.has_images:
        section["distill.data (images)"] = images_fingerprint(settings.data)
    trainer = {f"distill.trainer.{key}": value for key, value in settings.trainer.items() if key not in neutral}
    return {
        "model": teacher,
        **trained,
        "data": sources_fingerprint(settings.data),
        **general,
        **section,
        **trainer,
    }


def checkpoint_inputs(settings: Distill, inputs: dict[str, Any]) -> dict[str, Any]:
    """The identity of a run's checkpoints: its real batch, and not how ranks and micro-batches share it."""
    split = {f"distill.trainer.{key}" for key in BATCH_SPLIT}
    identity = {k: v for k, v in inputs.items() if k not in split} | {"distill.batch_size": rows_per_step(settings)}
    if (apart := sources_apart(settings)) is not None:  # before there was this, the same recipe had other rows
        identity["distill.data (rows that ask the teacher)"] = apart
    return identity


def check_distillable(spec: TrainSpec) -> None:
    """What can be refused before weights are loaded.

    Raises:
        UserError: different vocabularies or tokenizers, losses that recorded signals cannot serve, adapters that
            nothing could be trained of, or kernels that cannot be had.
    """
    teacher, student, settings = spec.teacher, spec.student, spec.settings
    require_same_vocabulary(teacher, student)
    if tokenizer_fingerprint(teacher.folder) != tokenizer_fingerprint(student.folder):
        raise UserError(
            f"teacher {teacher.folder} and student {student.folder} have different tokenizers; "
            "distillation compares next-token distributions, so cut the student from this teacher"
        )
    if settings.teacher.recorded is not None:
        on_logits = [term for term in settings.losses if isinstance(term, LOGIT_TERMS)]
        refuse_for_top_k(on_logits, temperature=spec.record.temperature)
    on_policy = settings.on_policy is not None and settings.on_policy.share > 0
    if on_policy and any(isinstance(term, CrossEntropy) and term.weight for term in settings.losses):
        log.warning(
            "distill.losses: cross_entropy also learns what the student itself writes (distill.on_policy), right or "
            "wrong; train on it with divergences alone"
        )
    in_float16 = spec.runs_teacher and spec.teacher_dtype == torch.float16
    if in_float16 and spec.deepspeed.stage == 3 and spec.ranks.device.type == "cpu":
        raise UserError(
            "distill.teacher.dtype: under ZeRO 3 DeepSpeed runs no float16 teacher on a CPU; set it to float32, or "
            "another stage"
        )
    if settings.lora is not None:
        refuse_untrainable(settings.lora, settings.trainable, zero_stage=spec.deepspeed.stage)
    is_fused(settings.fused, student.config.model_type, spec.ranks.device)  # refuses


def distill(
    spec: TrainSpec,
    *,
    run_dir: Path,
    text: Path,
    inputs: dict[str, Any],
    make_scorer: Callable[[PreTrainedTokenizerBase], Scorer] | None = None,
    search_rows: Callable[[PackedRows, PreTrainedTokenizerBase], dict[str, Any]] | None = None,
    start_tracking: Callable[[], object],
) -> None:
    """Train the student on the teacher's signals; write distilled/ and distill.json.

    Every rank calls this, inside an initialised process group. It goes on from the last complete checkpoint of the
    same run. ``text`` is the folder of the rows and of what the teacher writes, ``inputs`` the identity of distilled/.
    ``make_scorer`` makes, for a tokenizer, what distill.watch scores the student with; ``search_rows`` finds evaluation
    items in the rows, for distill.json; ``start_tracking`` gives None where nothing is tracked.

    Raises:
        Stopped: on Ctrl-C, on SIGTERM or when the launcher is gone, after saving.
        UserError: input that cannot work.
    """
    check_names(spec.settings, ranks=spec.ranks.count)
    check_distillable(spec)
    heartbeat = Heartbeat(run_dir, timeout_s=spec.settings.timeout_s)
    heartbeat.start()
    identity = Identity(inputs, checkpoint_inputs(spec.settings, inputs))
    resume = agreed(lambda: last_complete(run_dir / "checkpoints", identity.checkpoints))
    with doing("working out what training takes"):
        flops = agreed(lambda: (size := check_fit(spec, run_dir)) and flops_per_token(size))
    tokenizer = spec.teacher.tokenizer()
    rows = _rows(spec, tokenizer, text, inputs)
    # before anything is trained: what is found may stop a reader, and items that cannot be had must not stop the end
    with doing("looking for evaluation items in the training text"):
        overlap = {} if search_rows is None else agreed(lambda: search_rows(rows, tokenizer))
    with doing("measuring what the machine can do at best"):
        peak = most_tokens_per_s(spec, flops) if is_main() else None  # which alone logs it
    with doing("starting the W&B run"):
        curves = [] if start_tracking() is None else [Curves(run_dir)]
    stop, progress = StopRequest(), Progress(tokens_per_step=spec.tokens_per_step)
    arguments = _arguments(spec, run_dir, resume, seed=inputs["seed"])
    callbacks = [progress, heartbeat, *curves]
    trainer = make_trainer(spec, rows, arguments, identity, stop=stop, callbacks=callbacks, peak_tokens_per_s=peak)
    watcher = None
    if spec.settings.watch is not None and make_scorer is not None:
        watcher = Watcher(spec.settings.watch, run_dir / "checkpoints", identity.checkpoints)
        trainer.watch_with(watcher, make_scorer(tokenizer))
    _announce(trainer, rows, spec, resume)
    with progress, stop.listening(), explained_memory(spec):
        trainer.train_on_objective(resume)
    is_finished = trainer.state.global_step >= trainer.state.max_steps
    if is_finished:
        write_results(trainer, spec, run_dir=run_dir, inputs=inputs, watcher=watcher, rows=rows, overlap=overlap)
    leave_deepspeed(trainer)
    heartbeat.stop()
    wandb_run.finish(run_dir)
    if not is_finished:
        raise Stopped(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps} ({stop.reason}), saved",
            stop.number,
        )


def _rows(spec: TrainSpec, tokenizer: PreTrainedTokenizerBase, text: Path, inputs: dict[str, Any]) -> PackedRows:
    texts = teacher_texts(spec.teacher, tokenizer, spec.settings, text, inputs=inputs)
    images = ImageReader.of(spec.settings.data, spec.teacher)
    return rows_to_train_on(tokenizer, spec.settings, texts, text, inputs=inputs, images=images)


def _arguments(spec: TrainSpec, run_dir: Path, resume: Path | None, *, seed: int) -> TrainingArguments:
    """Before the models: under ZeRO-3 these arguments make from_pretrained shard what it loads."""
    universal = resume is not None and agreed(lambda: needs_universal(resume, zero_stage=spec.deepspeed.stage))
    with doing("loading DeepSpeed"):
        join_deepspeed()
    return training_arguments(
        spec.settings, spec.deepspeed, output_dir=run_dir / "checkpoints", seed=seed, load_universal=universal
    )


def _announce(trainer: DistillTrainer, rows: PackedRows, spec: TrainSpec, resume: Path | None) -> None:
    # ZeRO 3 leaves parameters empty and says itself how large they are
    student = trainer.objective.student
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in student.parameters()]
    trained, total = sum(n for n, wanted in sizes if wanted), sum(n for n, _ in sizes)
    log.info(
        "training %.1f of %.1f million parameters, held in %s, on %s tokens (%d rows of %d), %d rank(s), ZeRO %d",
        trained / 1e6,
        total / 1e6,
        str(spec.deepspeed.weight_dtype).removeprefix("torch."),
        f"{rows.input_ids_NS.numel():,}",
        len(rows),
        spec.settings.sequence_length,
        spec.ranks.count,
        spec.deepspeed.stage,
    )
    for name, count in rows.counts.items():
        log.info("  %s: %s", name, ", ".join(f"{value:,} {key}" for key, value in count.items()))
    if resume is not None:
        log.info("going on from %s", resume)
