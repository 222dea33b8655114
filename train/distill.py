"""The distill stage: teacher/ and student/ in, distilled/ and distill.json out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.shares import Pilot, Shares
from shoal.data.image_rows import ImageReader, images_fingerprint
from shoal.data.packing import PackedRows
from shoal.data.sources import source_names, sources_fingerprint
from shoal.errors import UserError
from shoal.models.anatomy import text_config
from shoal.models.checkpoint_files import tokenizer_fingerprint
from shoal.progress import doing
from shoal.recipe.distill import NEUTRAL_TRAINER_KEYS, Distill, Record
from shoal.recipe.losses import STATE_TERMS, CrossEntropy
from shoal.recipe.section import Shapes, shaping
from shoal.runtime import agreed, free_memory, is_main, seed_everything
from shoal.tracking import wandb_run

from .assembly import Identity, make_trainer
from .callbacks.progress import Progress
from .callbacks.validation import Scorer, Watcher
from .callbacks.wandb_curves import Curves
from .damage import by_damage, nats_by_source, sample_rows, split_by_ability
from .dataset import rows_to_train_on, sources_apart, teacher_texts
from .engine.arguments import (
    BATCH_SPLIT,
    check_names,
    deepspeed_config,
    num_rows,
    rows_per_step,
    training_arguments,
)
from .engine.checkpoint import last_complete, needs_universal
from .engine.fused import is_fused
from .engine.heartbeat import Heartbeat
from .engine.sharding import join_deepspeed, leave_deepspeed
from .engine.stop import StopRequest
from .pilot import Beginning, PilotWatch, known_pilot, pilot_rows, pilot_steps
from .preflight.fit import check_fit
from .preflight.out_of_memory import explained_memory
from .preflight.throughput import most_tokens_per_s
from .save import write_results
from .student.local_stage import local_stage
from .student.lora import refuse_untrainable
from .student.spec import TrainSpec, require_same_vocabulary
from .teacher.agreement import agreeing
from .teacher.prompt_scores import Reference
from .teacher.recording_plan import recorded_models
from .teacher.recording_reader import refuse_unrecorded
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
    if settings.data_policy == "fixed":  # as before there was another
        del section["distill.data_policy"]
    if settings.data_pilot is None:
        del section["distill.data_pilot"]
    # what was recorded, not where it lies; it is compared with rows and model when it is read
    told = shaping(record, Shapes.TRAINING) | record.engine_inputs
    recorded = told | ({"prefix": True} if settings.teacher.prefix else {})
    section["distill.teacher"]["recorded"] = None if settings.teacher.recorded is None else recorded
    if len(settings.teacher.recordings) > 1:
        models = recorded_models(settings.teacher.recordings)
        section["distill.teacher"]["recorded"] = [recorded | {"model": model} for model in models]
    if settings.teacher.server:  # as before there was one
        section["distill.teacher"]["server"] = told
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
    if settings.teacher.recorded is not None or settings.teacher.server:
        refuse_unrecorded(settings.losses, spec.record, vocab_size=text_config(teacher.config).vocab_size)
    if settings.teacher.server and (states := [term for term in settings.losses if isinstance(term, STATE_TERMS)]):
        raise UserError(
            f"distill.losses: {states[0].kind} needs the teacher's states, which a server does not tell; take it out, "
            "or use the live teacher"
        )
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
    if settings.data_pilot is not None:
        pilot_steps(spec)
    is_fused(settings.fused, student.config.model_type, spec.ranks.device)  # refuses


def distill(
    spec: TrainSpec,
    *,
    run_dir: Path,
    text: Path,
    shares: Path,
    inputs: dict[str, Any],
    make_scorer: Callable[[PreTrainedTokenizerBase], Scorer] | None = None,
    search_rows: Callable[[PackedRows, PreTrainedTokenizerBase], dict[str, Any]] | None = None,
    start_tracking: Callable[[], object],
    reference: Reference | None = None,
) -> None:
    """Train the student on the teacher's signals; write distilled/ and distill.json.

    Every rank calls this, inside an initialised process group. It goes on from the last complete checkpoint of the
    same run, if there is one. ``text`` is the folder of the rows and of what the teacher writes, ``shares`` that of the
    sources' shares, which student and control have in common; ``inputs`` the identity of distilled/. ``make_scorer``
    makes, for a tokenizer, what distill.watch scores the student with; None = nothing is watched. ``search_rows`` finds
    evaluation items in the training rows and gives what distill.json says of them; None = nobody looks.
    ``start_tracking`` gives None where nothing is tracked. ``reference`` is what a server that runs the teacher is
    compared with; None = with nothing.

    Raises:
        Stopped: on Ctrl-C, on SIGTERM or when the launcher is gone, after saving.
        UserError: input that cannot work.
    """
    train = partial(
        _train,
        run_dir=run_dir,
        text=text,
        shares=shares,
        inputs=inputs,
        make_scorer=make_scorer,
        search_rows=search_rows,
        start_tracking=start_tracking,
        reference=reference,
    )
    if train(spec):
        return
    free_memory()
    seed_everything(inputs["seed"])
    log.info("distill: the pilot is over; what is left of the tokens has shares of its own")
    train(spec)


def _train(
    spec: TrainSpec,
    *,
    run_dir: Path,
    text: Path,
    shares: Path,
    inputs: dict[str, Any],
    make_scorer: Callable[[PreTrainedTokenizerBase], Scorer] | None,
    search_rows: Callable[[PackedRows, PreTrainedTokenizerBase], dict[str, Any]] | None,
    start_tracking: Callable[[], object],
    reference: Reference | None,
) -> bool:
    """Train to the end, or to that of a pilot; whether it was the former. After a pilot the same call goes on."""
    check_names(spec.settings)
    check_distillable(spec)
    heartbeat = Heartbeat(run_dir, timeout_s=spec.settings.timeout_s)
    heartbeat.start()
    identity = Identity(inputs, checkpoint_inputs(spec.settings, inputs))
    resume = agreed(lambda: last_complete(run_dir / "checkpoints", identity.checkpoints))
    universal = resume is not None and agreed(lambda: needs_universal(resume, zero_stage=spec.deepspeed.stage))
    with doing("working out what training takes"):
        flops_per_token = agreed(lambda: (size := check_fit(spec, run_dir)) and size.flops_per_token)
    tokenizer = spec.teacher.tokenizer()
    step = 0 if resume is None else int(resume.name.removeprefix("checkpoint-"))
    spec, rows, pilot = _data(
        spec, tokenizer, folder=text, shares=shares, inputs=inputs, known_by=identity.checkpoints, step=step
    )
    # before anything is trained: what is found may stop a reader, and items that cannot be had must not stop the end
    with doing("looking for evaluation items in the training text"):
        overlap = {} if search_rows is None else agreed(lambda: search_rows(rows, tokenizer))
    if spec.settings.local is not None:
        begun = rows if spec.settings.data_pilot is None else rows.first(pilot_rows(spec))
        healed = local_stage(spec, begun, folder=run_dir / "local", inputs=inputs)
        spec = replace(spec, student=replace(spec.student, folder=healed))
    engine = agreeing(spec.record, spec.teacher, rows, reference) if spec.settings.teacher.server else None
    with doing("measuring what the machine can do at best"):
        peak = most_tokens_per_s(spec, flops_per_token) if is_main() else None  # which alone logs it
    with doing("starting the W&B run"):
        tracked = start_tracking() is not None
    with doing("loading DeepSpeed"):
        join_deepspeed()
    # before the models: under ZeRO-3 these arguments make from_pretrained shard what it loads
    arguments = training_arguments(
        spec.settings,
        spec.deepspeed,
        output_dir=run_dir / "checkpoints",
        seed=inputs["seed"],
        load_universal=universal,
    )
    stop, progress = StopRequest(), Progress(tokens_per_step=spec.tokens_per_step)
    callbacks = [progress, heartbeat, *([Curves(run_dir)] if tracked else [])]
    trained = rows if pilot is None else Beginning.of(rows, length=num_rows(spec.settings))
    trainer = make_trainer(
        spec,
        trained,
        tokenizer,
        arguments,
        identity,
        stop=stop,
        callbacks=callbacks,
        peak_tokens_per_s=peak,
        engine=engine,
    )
    if pilot is not None:
        pilot.through = trainer.looked_at
        trainer.add_callback(pilot)  # behind what refuses a step that is not sound
    watcher = None
    if spec.settings.watch is not None and make_scorer is not None:
        watcher = Watcher(spec.settings.watch, run_dir / "checkpoints", identity.checkpoints)
        trainer.watch_with(watcher, make_scorer(tokenizer))
    _announce(trainer, rows, spec, resume)
    with progress, stop.listening(), explained_memory(spec, run_dir):
        trainer.objective.install()
        try:
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        finally:  # what is told of memory rests on models as they are
            trainer.objective.uninstall()
    is_finished = trainer.state.global_step >= trainer.state.max_steps
    if is_finished:
        write_results(trainer, spec, run_dir=run_dir, inputs=inputs, watcher=watcher, rows=rows, overlap=overlap)
    leave_deepspeed(trainer)
    heartbeat.stop()
    wandb_run.finish(run_dir)
    if not is_finished and (pilot is None or not pilot.is_over or stop.reason is not None):
        raise Stopped(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps} ({stop.reason}), saved",
            stop.number,
        )
    return is_finished


def _data(
    spec: TrainSpec,
    tokenizer: PreTrainedTokenizerBase,
    *,
    folder: Path,
    shares: Path,
    inputs: dict[str, Any],
    known_by: dict[str, Any],
    step: int,
) -> tuple[TrainSpec, PackedRows, PilotWatch | None]:
    """The training with its sources and their shares, its rows, and what looks at a pilot that is not over, whose rows
    these are then. ``known_by`` is the identity of checkpoints, ``step`` where training goes on."""
    settings = spec.settings
    texts = teacher_texts(spec.teacher, tokenizer, settings, folder, inputs=inputs)
    if settings.data_policy == "fixed":
        images = ImageReader.of(settings.data, spec.teacher)
        return spec, rows_to_train_on(tokenizer, settings, texts, folder, inputs=inputs, images=images), None
    by_weight = split_by_ability(settings)
    settings = by_damage(
        by_weight,
        spec.teacher,
        None if spec.is_control else spec.student,
        tokenizer,
        texts,
        file=shares / Shares.FILE,
        folder=folder,
        inputs=inputs,
    )
    spec = replace(spec, settings=settings)
    rows = partial(rows_to_train_on, tokenizer, settings, texts, folder, inputs=inputs)
    if settings.data_pilot is None:
        return spec, rows(), None
    file = shares / Pilot.FILE
    pilot = Pilot.read(file) if spec.is_control else known_pilot(file, known_by, step=step)
    if pilot is not None and pilot.shares:
        return spec, rows(later=(pilot_rows(spec), pilot.shares)), None
    first = rows(rows=pilot_rows(spec))
    new = Pilot(Provenance(known_by), tuple(source_names(settings.data)), pilot_steps(spec), ())
    samples = sample_rows(settings, tokenizer, texts, folder=folder, inputs=inputs)
    look = partial(nats_by_source, samples=samples, label="pilot")
    return spec, first, PilotWatch(pilot or new, file, by_weight, settings, counts=first.counts, look=look)


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
