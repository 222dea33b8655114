"""The distill stage: teacher/ and student/ in, distilled/ and distill.json out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shoal.artifacts.artifact import PruningPlan
from shoal.atomic_files import fingerprint
from shoal.data.packing import PackedRows
from shoal.data.sources import sources_fingerprint
from shoal.errors import UserError
from shoal.machine import ranks_on_this_node
from shoal.models.load import load_config, load_model, load_tokenizer, text_config, tokenizer_fingerprint
from shoal.progress import doing
from shoal.recipe.distill import NEUTRAL_TRAINER_KEYS, Distill, Record
from shoal.recipe.section import Shapes, shaping
from shoal.recipe.track import Track
from shoal.runtime import agreed, device, world_size
from shoal.tracking import wandb_run

from .assembly import assemble
from .callbacks.progress import Progress
from .callbacks.validation import Scorer
from .callbacks.wandb_curves import Curves
from .dataset import training_rows
from .engine.arguments import (
    BATCH_SPLIT,
    check_names,
    deepspeed_config,
    num_rows,
    rows_per_step,
    training_arguments,
    zero_stage,
)
from .engine.checkpoint import last_complete, needs_universal
from .engine.heartbeat import Heartbeat
from .engine.sharding import join_deepspeed
from .engine.stop import StopRequest
from .generated.writing import Writer, check_backend, transformers_writer, vllm_writer, wants_teacher_text, write_texts
from .preflight.fit import check_fit
from .preflight.mfu import peak_rate
from .save import write_results
from .student.local_stage import local_stage
from .student.lora import refuse_untrainable
from .student.trainable import trained_parts
from .teacher.recording_plan import rows_from
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
    student: str,
    drop: tuple[int, ...],
    general: dict[str, Any],
) -> dict[str, Any]:
    """Everything that shapes distilled/: the stage's identity.

    ``teacher`` and ``student`` are fingerprints of models, ``general`` the recipe's settings outside its sections.
    """
    section = shaping(settings, Shapes.TRAINING, "distill.")
    if settings.watch is None or settings.watch.best is None:
        del section["distill.watch"]  # it only looks on
    # what was recorded, not where it lies; it is compared with rows and model when it is read
    recorded = shaping(record, Shapes.TRAINING) | ({"prefix": True} if settings.teacher.prefix else {})
    section["distill.teacher"]["recorded"] = None if settings.teacher.recorded is None else recorded
    if settings.writing.prompts is not None:
        section["distill.writing.prompts"] = sources_fingerprint((settings.writing.prompts,))
    # what the file says now, not what it is called; how ZeRO shards the work does not change its result
    section["distill.deepspeed"] = {k: v for k, v in deepspeed_config(settings).items() if k != "zero_optimization"}
    neutral = {*NEUTRAL_TRAINER_KEYS, *(BATCH_SPLIT if settings.batch_size is not None else ())}
    trainer = {f"distill.trainer.{key}": value for key, value in settings.trainer.items() if key not in neutral}
    return {
        "model": teacher,
        "student": student,
        "prune.drop": list(drop),
        "data": sources_fingerprint(settings.data),
        **general,
        **section,
        **trainer,
    }


def checkpoint_inputs(settings: Distill, inputs: dict[str, Any]) -> dict[str, Any]:
    """The identity of a run's checkpoints: its real batch, and not how ranks and micro-batches share it."""
    split = {f"distill.trainer.{key}" for key in BATCH_SPLIT}
    return {k: v for k, v in inputs.items() if k not in split} | {"distill.batch_size": rows_per_step(settings)}


def check_distillable(
    teacher: Path, student: Path, settings: Distill, record: Record, *, trust_remote_code: bool
) -> None:
    """What can be refused before weights are loaded.

    Raises:
        UserError: different vocabularies or tokenizers, rows longer than the models' positions, or losses that signals
            recorded by ``record`` cannot serve.
    """
    configs = [text_config(load_config(f, trust_remote_code=trust_remote_code)) for f in (teacher, student)]
    sizes = [config.vocab_size for config in configs]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"teacher {teacher} has {sizes[0]:,} vocabulary entries and student {student} has {sizes[1]:,}; "
            "distillation compares next-token distributions, so cut the student from this teacher"
        )
    if tokenizer_fingerprint(teacher) != tokenizer_fingerprint(student):
        raise UserError(
            f"teacher {teacher} and student {student} have different tokenizers; "
            "distillation compares next-token distributions, so cut the student from this teacher"
        )
    longest = getattr(configs[0], "max_position_embeddings", None)
    if longest is not None and settings.sequence_length > longest:
        raise UserError(
            f"distill.sequence_length: {settings.sequence_length} is more than the {longest} positions of {teacher}; "
            "lower it"
        )
    if settings.teacher.recorded is not None:
        refuse_unrecorded(settings.losses, record, vocab_size=sizes[0])


def distill(
    teacher_dir: Path,
    student_dir: Path,
    plan: PruningPlan,
    *,
    run_dir: Path,
    settings: Distill,
    record: Record,
    track: Track,
    scorer: Callable[[PreTrainedTokenizerBase], Scorer] | None,
    search_rows: Callable[[PackedRows, PreTrainedTokenizerBase], dict[str, Any]] | None,
    inputs: dict[str, Any],
    recipe: dict[str, Any],
    seed: int,
    dtype: str,
    attention: str,
    trust_remote_code: bool,
) -> None:
    """Train the student in ``student_dir`` on the teacher's signals; write distilled/ and distill.json.

    Every rank calls this, inside an initialised process group. It goes on from the last complete checkpoint of the
    same run, if there is one. ``plan`` says which layers the student has left; ``scorer`` makes what distill.watch
    scores the student with; ``search_rows`` finds evaluation items in the training rows and
    gives what distill.json says of them.

    Raises:
        Stopped: on Ctrl-C, on SIGTERM or when the launcher is gone, after saving.
        UserError: input that cannot work.
    """
    check_names(settings)
    check_distillable(teacher_dir, student_dir, settings, record, trust_remote_code=trust_remote_code)
    trained_parts(settings.trainable, plan)
    if settings.lora is not None:
        refuse_untrainable(settings.lora, settings.trainable, zero_stage=zero_stage(settings))
    checkpoints = run_dir / "checkpoints"
    heartbeat = Heartbeat(run_dir, timeout_s=settings.timeout_s)
    heartbeat.start()
    identity = checkpoint_inputs(settings, inputs)
    resume = agreed(lambda: last_complete(checkpoints, identity))
    universal = resume is not None and agreed(lambda: needs_universal(resume, zero_stage=zero_stage(settings)))
    with doing("working out what training takes"):
        agreed(
            lambda: check_fit(
                teacher_dir,
                student_dir,
                plan,
                settings=settings,
                run_dir=run_dir,
                dtype=dtype,
                attention=attention,
                ranks=world_size(),
                ranks_per_node=ranks_on_this_node(),
                device=device(),
                trust_remote_code=trust_remote_code,
            )
        )
    tokenizer = load_tokenizer(teacher_dir, trust_remote_code=trust_remote_code)
    load = {"attention": attention, "trust_remote_code": trust_remote_code}
    rows = rows_to_train_on(
        teacher_dir, tokenizer, settings, run_dir, inputs=inputs, trust_remote_code=trust_remote_code
    )
    # before anything is trained: what is found may stop a reader, and items that cannot be had must not stop the end
    with doing("looking for evaluation items in the training text"):
        overlap = {} if search_rows is None else agreed(lambda: search_rows(rows, tokenizer))
    if settings.local is not None:
        student_dir = local_stage(
            teacher_dir,
            student_dir,
            plan,
            rows,
            settings,
            folder=run_dir / "local",
            inputs=inputs,
            dtype=dtype,
            load=load,
        )
    with doing("measuring what the machine can do at best"):
        peak = peak_rate(teacher_dir, student_dir, plan, settings, dtype=dtype, load=load)
    with doing("starting the W&B run"):
        tracked = wandb_run.start(track, run_dir, recipe)
    with doing("loading DeepSpeed"):
        join_deepspeed()
    # before the models: under ZeRO-3 these arguments make from_pretrained shard what it loads
    arguments, keep = training_arguments(
        settings, output_dir=checkpoints, seed=seed, report_to=[], load_universal=universal
    )
    stop = StopRequest()
    progress = Progress(tokens_per_step=rows_per_step(settings) * settings.sequence_length)
    made = assemble(
        teacher_dir,
        student_dir,
        plan,
        rows,
        tokenizer,
        settings=settings,
        record=record,
        arguments=arguments,
        keep_checkpoints=keep,
        inputs=inputs,
        identity=identity,
        stop=stop,
        scorer=scorer,
        callbacks=[
            progress,
            heartbeat,
            *([Curves(run_dir)] if tracked else []),
        ],
        peak_tokens_per_s=peak,
        seed=seed,
        dtype=dtype,
        load=load,
    )
    trainer, objective = made.trainer, made.objective
    objective.install()
    _announce(made.student, rows, trainer, settings, resume)
    with progress, stop.listening():
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    if trainer.state.global_step < trainer.state.max_steps:
        heartbeat.stop()
        wandb_run.finish(run_dir)
        raise Stopped(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps} ({stop.reason}), saved",
            stop.number,
        )
    objective.uninstall()
    write_results(
        trainer,
        made.student,
        student_dir,
        run_dir=run_dir,
        inputs=inputs,
        watcher=made.watcher,
        data={"sources": rows.counts, **overlap},
        settings={
            "rows": fingerprint(rows.fingerprint),
            "shared_layers": made.shared_layers,
            "trained_layers": list(made.trained.layers),
        },
    )
    heartbeat.stop()
    wandb_run.finish(run_dir)


def rows_to_train_on(
    teacher_dir: Path,
    tokenizer: PreTrainedTokenizerBase,
    settings: Distill,
    run_dir: Path,
    *,
    inputs: dict[str, Any],
    trust_remote_code: bool,
) -> PackedRows:
    """The packed rows of the budget; the teacher writes its own share first where the recipe asks for it."""
    dtype, attention, seed = inputs["dtype"], inputs["attention"], inputs["seed"]
    load = {"attention": attention, "trust_remote_code": trust_remote_code}
    texts: Sequence[str] = ()
    if wants_teacher_text(settings.data):
        check_backend(settings.writing)

        def load_writer() -> Writer:
            if settings.writing.backend == "vllm":
                return vllm_writer(teacher_dir, tokenizer, settings.writing, seed=seed, dtype=dtype)
            # a copy of the teacher of its own, freed before training
            writer = load_model(teacher_dir, dtype=dtype, device=device(), **load)
            return transformers_writer(writer, tokenizer, settings.writing, seed=seed)

        texts, _ = write_texts(
            settings.writing,
            tokenizer,
            data=settings.data,
            folder=run_dir / "text",
            inputs={key: inputs[key] for key in ("model", "dtype", "attention")},
            seed=seed,
            load_writer=load_writer,
        )
    return training_rows(
        settings,
        tokenizer,
        num_rows=num_rows(settings),
        seed=seed,
        teacher_text=texts,
        packing=settings.packing,
        folder=run_dir / "text",
        inputs={"model": inputs["model"], **rows_from(inputs)},
    )


def _announce(
    student: PreTrainedModel, rows: PackedRows, trainer: DistillTrainer, settings: Distill, resume: Path | None
) -> None:
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in student.parameters()]
    trained, total = sum(n for n, wanted in sizes if wanted), sum(n for n, _ in sizes)
    log.info(
        "training %.1f of %.1f million parameters on %s tokens (%d rows of %d), %d rank(s), ZeRO %d",
        trained / 1e6,
        total / 1e6,
        f"{rows.input_ids_NS.numel():,}",
        len(rows),
        settings.sequence_length,
        world_size(),
        trainer.args.hf_deepspeed_config.config["zero_optimization"]["stage"],  # pyright: ignore[reportAttributeAccessIssue]
    )
    for name, count in rows.counts.items():
        log.info("  %s: %s", name, ", ".join(f"{value:,} {key}" for key, value in count.items()))
    if resume is not None:
        log.info("going on from %s", resume)
