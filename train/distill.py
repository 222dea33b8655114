"""The distill stage: teacher/ and student/ in, distilled/ and distill.json out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.training import Training
from shoal.atomic_files import fingerprint
from shoal.data.image_rows import ImageReader
from shoal.data.packing import PackedRows
from shoal.machine import peak_memory
from shoal.models.checkpoint_files import model_fingerprint
from shoal.models.document_masks import IN_TRAINING, warn_of_mixed_documents
from shoal.progress import doing
from shoal.ranks import is_main, world_size
from shoal.recipe.distill import Distill, Recorded
from shoal.recipe.losses import CrossEntropy
from shoal.redaction import redacted
from shoal.runtime import agreed, barrier, device, everyone_sees, free_memory
from shoal.stopping import Stopped
from shoal.tracking import wandb_run

from .callbacks import Curves, Events, Profiler, Progress, Scorer, Watcher
from .dataset import rows_to_train_on, teacher_texts
from .engine.arguments import check_names, resolved_deepspeed, training_arguments
from .engine.checkpoint import MANIFEST, UNIVERSAL_POINTER, last_complete, needs_universal
from .engine.kernels import require_liger
from .engine.sharding import join_deepspeed, leave_deepspeed, loaded_in
from .engine.stop import Heartbeat, StopRequest
from .identity import checkpoint_inputs
from .preflight import throughput
from .preflight.fit import check_fit, explained_memory
from .record import record_signals
from .student.frozen import stored_names, write_student
from .student.spec import TrainSpec, require_same_vocabulary
from .teacher.recording import Wanted, rows_from
from .teacher.signals import RecordingReader
from .teacher.wiring import make_trainable
from .trainer import DistillTrainer, ObjectiveTrainer, Parts

log = logging.getLogger(__name__)


def check_distillable(spec: TrainSpec) -> None:
    """What can be refused before weights are loaded.

    Raises:
        UserError: different vocabularies, signals that cannot be recorded, adapters that nothing could be trained of,
            or kernels that cannot be had.
    """
    teacher, student, settings = spec.teacher, spec.student, spec.settings
    require_same_vocabulary(teacher, student)
    if spec.teacher_place == "recorded":
        _ = Wanted.of(spec, "").layout  # refuses
    if settings.on_policy is not None and any(
        isinstance(term, CrossEntropy) and term.weight for term in settings.losses
    ):
        log.warning(
            "distill.losses: cross_entropy also trains on text that the student writes itself (distill.on_policy), "
            "right or wrong; set it on single sources of distill.data instead"
        )
    if not set(settings.losses) & set(settings.terms) and settings.losses != Distill.losses:
        log.warning("distill.losses: has no effect, since every source of distill.data has losses of its own")
    if settings.lora is not None:
        settings.lora.require_packages()
    if settings.trainer.get("use_liger_kernel"):
        require_liger(student.config.model_type, spec.ranks.device)


def distill(
    spec: TrainSpec,
    *,
    run_dir: Path,
    home: Path,
    inputs: dict[str, Any],
    make_scorer: Callable[[PreTrainedTokenizerBase], Scorer] | None = None,
    search_rows: Callable[[PackedRows, PreTrainedTokenizerBase], dict[str, Any]] | None = None,
    start_tracking: Callable[[], object],
) -> None:
    """Train the student on the teacher's signals; write distilled/ and distill.json.

    Every rank calls this, inside an initialised process group. It goes on from the last complete checkpoint of the
    same run. ``home`` is the run directory of the rows and of what the teacher writes and says, which is that of the
    student also for the control; ``inputs`` is the identity of distilled/.
    ``make_scorer`` makes, for a tokenizer, what distill.watch scores the student with; ``search_rows`` finds evaluation
    items in the rows, for distill.json; ``start_tracking`` gives None where nothing is tracked.

    Raises:
        Stopped: on Ctrl-C, on SIGTERM or when the launcher is gone, after saving.
        UserError: input that cannot work.
    """
    check_names(spec.settings, ranks=spec.ranks.count)
    check_distillable(spec)
    heartbeat = Heartbeat(run_dir, timeout_s=spec.settings.ddp_timeout)
    heartbeat.start()
    known_by = checkpoint_inputs(spec.settings, inputs)
    resume = _last_complete(run_dir / "checkpoints", known_by)
    with doing("estimating what training takes"):
        mfu_per_rate = agreed(lambda: (size := check_fit(spec, run_dir)) and throughput.mfu_per_rate(size))
    tokenizer = spec.teacher.tokenizer()
    rows = rows_of(spec, tokenizer, home / "text", inputs)
    # before anything is trained: what is found may stop a reader, and items that cannot be had must not stop the end
    with doing("looking for evaluation items in the training text"):
        overlap = {} if search_rows is None else agreed(lambda: search_rows(rows, tokenizer))
    with doing("starting the W&B run"):
        curves = [] if start_tracking() is None else [Curves(run_dir)]
    # before DeepSpeed is told of it: a teacher that speaks now is loaded whole
    teacher = recorded(spec, rows, home, inputs, verify=False)
    stop, progress = StopRequest(), Progress(tokens_per_step=spec.tokens_per_step)
    arguments = _arguments(spec, run_dir, resume, seed=inputs["seed"])
    profiler = Profiler(spec.settings.profile, run_dir / "profile")
    callbacks = [progress, heartbeat, *curves, profiler, Events(run_dir, tokens_per_step=spec.tokens_per_step)]
    trainer = make_trainer(spec, rows, arguments, known_by, teacher, stop=stop, callbacks=callbacks)
    trainer.mfu_per_rate = mfu_per_rate
    watcher = None
    if spec.settings.watch is not None and make_scorer is not None:
        watcher = Watcher(spec.settings.watch, run_dir / "checkpoints", known_by)
        trainer.watch_with(watcher, make_scorer(tokenizer))
    _announce(trainer, rows, spec, resume)
    with progress, stop.listening(), explained_memory(spec), profiler:
        trainer.train_on_objective(resume)
    if is_finished := trainer.state.global_step >= trainer.state.max_steps:
        _write_results(trainer, spec, run_dir=run_dir, inputs=inputs, watcher=watcher, rows=rows, overlap=overlap)
    leave_deepspeed(trainer)
    heartbeat.stop()
    wandb_run.finish(run_dir)
    if not is_finished:
        steps = f"step {trainer.state.global_step} of {trainer.state.max_steps}"
        raise Stopped(f"stopped at {steps} ({stop.reason}), saved", stop.number)


def make_trainer(
    spec: TrainSpec,
    rows: PackedRows,
    arguments: TrainingArguments,
    known_by: dict[str, Any],
    recorded: RecordingReader | None,
    *,
    stop: StopRequest,
    callbacks: Sequence[TrainerCallback],
) -> DistillTrainer:
    """Load the student, made trainable, and the teacher where it is to run; the Trainer that joins them with the loss.

    ``arguments`` exist before the models: under ZeRO-3 they make from_pretrained shard what it loads. ``known_by`` is
    the identity of checkpoints.

    Raises:
        UserError: parts of the recipe that contradict the plan or the models.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # what came before is not training's
    held = spec.deepspeed.weight_dtype
    if held.itemsize < spec.student.stored_dtype.itemsize:
        log.warning(
            "the student's weights are stored in %s but trained in %s: training starts from rounded weights",
            *(str(dtype).removeprefix("torch.") for dtype in (spec.student.stored_dtype, held)),
        )
    # where it computes from the start, but for what DeepSpeed deals out or keeps on the host
    place = "cpu" if spec.deepspeed.stage == 3 or spec.deepspeed.offloads("offload_param") else device()
    lora = spec.settings.lora
    begins = "cpu" if lora is not None and lora.load_in_4bit else place  # a device has room for its 4 bits alone
    student, teacher = spec.student.model(dtype=str(held).removeprefix("torch."), device=begins), None
    stored = stored_names(spec.student.folder)
    make_trainable(student, spec, seed=arguments.seed, stored=stored)
    if spec.runs_teacher:
        with loaded_in(spec.teacher_dtype, arguments):
            place = place if spec.teacher_place == "live" else "cpu"
            teacher = spec.teacher.model(dtype=spec.live_dtype, device=place).requires_grad_(False)
    parts = Parts(
        spec,
        student,
        teacher,
        spec.teacher.tokenizer(),
        refused=Path(str(arguments.output_dir)).parent / "refused",
        stop=stop,
        recorded=recorded,
        stored=stored,
    )
    trainer = DistillTrainer(parts, identity=known_by, args=arguments, train_dataset=rows, callbacks=[*callbacks])
    trainer.remove_callback(PrinterCallback)
    if teacher is not None or spec.deepspeed.stage < 3:  # a student in pieces cannot run before training has begun
        planes, precision = (rows.input_ids_NS, rows.position_ids_NS), spec.deepspeed.autocast_dtype
        warn_of_mixed_documents(teacher or student, *planes, IN_TRAINING, autocast_dtype=precision)
    return trainer


def rows_of(spec: TrainSpec, tokenizer: PreTrainedTokenizerBase, text: Path, inputs: dict[str, Any]) -> PackedRows:
    """The rows of a training with the identity ``inputs``, kept in the folder ``text``."""
    texts = teacher_texts(spec.teacher, tokenizer, spec.settings, text, inputs=inputs)
    images = ImageReader.of(spec.settings.data, spec.teacher)
    return rows_to_train_on(tokenizer, spec.settings, texts, text, inputs=inputs, images=images)


def recorded(
    spec: TrainSpec, rows: PackedRows, home: Path, inputs: dict[str, Any], *, verify: bool
) -> RecordingReader | None:
    """What a recorded teacher says of ``rows``, recorded now as far as it is missing; None = it is a live one. Every
    rank calls this; ``verify`` as record_signals has it."""
    if not isinstance(settings := spec.settings.teacher, Recorded):
        return None
    folder, wanted, shaped = settings.folder(home), Wanted.of(spec, inputs["model"]), rows_from(inputs)
    record_signals(wanted, rows, folder, rows_from=shaped, verify=verify)
    free_memory()
    return RecordingReader(folder, rows, wanted, rows_from=shaped)


def _last_complete(folder: Path, known_by: dict[str, Any]) -> Path | None:
    """The checkpoint that all ranks go on from; they see it then."""
    resume = agreed(lambda: last_complete(folder, known_by))
    if resume is not None:
        everyone_sees(resume / MANIFEST)
    return resume


def _arguments(spec: TrainSpec, run_dir: Path, resume: Path | None, *, seed: int) -> TrainingArguments:
    """Before the models: under ZeRO-3 these arguments make from_pretrained shard what it loads."""
    universal = resume is not None and agreed(lambda: needs_universal(resume, zero_stage=spec.deepspeed.stage))
    if resume is not None and universal:
        everyone_sees(resume / UNIVERSAL_POINTER)
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
        log.info("  %s: %s", name, ", ".join(f"{value:,} {key}" for key, value in count.items() if value))
    if resume is not None:
        log.info("resuming from %s", resume)


def _write_results(
    trainer: DistillTrainer,
    spec: TrainSpec,
    *,
    run_dir: Path,
    inputs: dict[str, Any],
    watcher: Watcher | None,
    rows: PackedRows,
    overlap: dict[str, Any],
) -> None:
    """Write distilled/ from the last state, or from the best that ``watcher`` has kept, then distill.json.

    Every rank calls this. ``spec.student`` is the checkpoint that training began with; ``overlap`` is what of
    evaluation stands in the training text.
    """
    student = trainer.objective.student
    settings: dict[str, Any] = {}
    with doing("collecting the student's weights"):
        state = trainer.student_state()
    peak = torch.tensor(float(peak_memory()), device=device())
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    best = None if watcher is None else watcher.best()
    if is_main():
        assert state is not None
        if best is not None and watcher is not None:
            log.info("distilled/ is the student of step %d: %s %.4f", best["step"], best["metric"], best["score"])
            state = watcher.best_state()
            settings["best"] = {key: best[key] for key in ("step", "metric", "score")}
        student.config.use_cache = True  # the Trainer turned it off
        with doing("writing distilled/"):
            write_student(student, state, spec.student, run_dir / "distilled")
        settings["distilled"] = model_fingerprint(run_dir / "distilled")
        training = training_of(trainer, spec, inputs=inputs, rows=rows, peak_memory_bytes=int(peak.item()))
        training = replace(training, settings={**training.settings, **settings}, data={**training.data, **overlap})
        training.save(run_dir / Training.FILE)
        if watcher is not None:
            watcher.forget()
    barrier()


def training_of(
    trainer: ObjectiveTrainer, spec: TrainSpec, *, inputs: dict[str, Any], rows: PackedRows, peak_memory_bytes: int
) -> Training:
    """What ``trainer`` has done on ``rows``, so far."""
    history = [row for row in trainer.state.log_history if "step" in row and "train_runtime" not in row]
    seconds = [row["seconds"] for row in history if "seconds" in row]
    # where no budget is set, the last step of an epoch has fewer rows
    num_rows, rows_of_step = len(rows), spec.tokens_per_step // spec.settings.sequence_length
    epochs, begun = divmod(trainer.state.global_step, max(1, math.ceil(num_rows / rows_of_step)))
    rows_read = epochs * num_rows + min(begun * rows_of_step, num_rows)
    return Training(
        provenance=Provenance(inputs, model=spec.model),
        num_steps=trainer.state.global_step,
        num_tokens=rows_read * spec.settings.sequence_length,
        seconds=seconds[-1] if seconds else trainer.row.seconds,
        history=tuple({key: float(value) for key, value in row.items()} for row in history),
        settings={
            "trainer": redacted(trainer.args.to_sanitized_dict()),
            "deepspeed": resolved_deepspeed(trainer.args),
            "world_size": world_size(),
            "rows": fingerprint(rows.fingerprint),
            "shared_layers": spec.shared_layers,
            "trained_layers": list(spec.trained.layers),
        },
        data={"sources": rows.counts},
        peak_memory_bytes=peak_memory_bytes,
    )
