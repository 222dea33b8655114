"""The distill stage: teacher/ and student/ in, distilled/ and distill.json out."""

from __future__ import annotations

import logging
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from shoal.artifact import Provenance, Training, fingerprint, written_folder
from shoal.data import PackedRows, sources_fingerprint
from shoal.errors import UserError
from shoal.models import load_config, load_model, load_tokenizer, text_config, tokenizer_fingerprint
from shoal.recipe import Distill, Track, as_dict
from shoal.runtime import device, is_main, world_size

from . import tracking
from .arguments import (
    BATCH_SPLIT,
    check_names,
    deepspeed_config,
    num_rows,
    rows_per_step,
    training_arguments,
    zero_stage,
)
from .checkpoint import last_complete, needs_universal
from .heartbeat import Heartbeat
from .progress import Progress
from .stop import StopRequest
from .student import SharedPrefix, install_objective
from .text import training_rows
from .trainable import keep_zeros, set_trainable
from .trainer import DistillTrainer
from .writing import wants_teacher_text, written_by_teacher

log = logging.getLogger(__name__)

T = TypeVar("T")

NOT_IDENTITY = {
    *("distill.num_ranks", "distill.timeout_s"),
    *(f"distill.trainer.{key}" for key in ("save_steps", "save_strategy", "save_total_limit")),
    *(f"distill.trainer.{key}" for key in ("logging_steps", "disable_tqdm", "dataloader_num_workers")),
}
"""Settings that change how the work is done but not its result: a run may go on with others."""


class Stopped(Exception):
    """Training was asked to stop and has saved; the same command goes on."""


def distill_inputs(
    settings: Distill, *, teacher: str, student: str, drop: tuple[int, ...], seed: int, dtype: str, attention: str
) -> dict[str, Any]:
    """Everything that shapes distilled/: the stage's identity."""
    section = {f"distill.{key}": value for key, value in as_dict(settings).items() if key != "trainer"}
    # what the file says now, not what it is called; how ZeRO shards the work does not change its result
    section["distill.deepspeed"] = {k: v for k, v in deepspeed_config(settings).items() if k != "zero_optimization"}
    split = BATCH_SPLIT if settings.batch_size is not None else ()
    trainer = {f"distill.trainer.{key}": value for key, value in settings.trainer.items() if key not in split}
    return {
        "model": teacher,
        "student": student,
        "prune.drop": list(drop),
        "data": sources_fingerprint(settings.data),
        "seed": seed,
        "dtype": dtype,
        "attention": attention,
        **{key: value for key, value in (section | trainer).items() if key not in NOT_IDENTITY},
    }


def checkpoint_inputs(settings: Distill, inputs: dict[str, Any]) -> dict[str, Any]:
    """The identity of a run's checkpoints: its real batch, and not how ranks and micro-batches share it."""
    split = {f"distill.trainer.{key}" for key in BATCH_SPLIT}
    return {k: v for k, v in inputs.items() if k not in split} | {"distill.batch_size": rows_per_step(settings)}


def check_distillable(teacher: Path, student: Path, settings: Distill, *, trust_remote_code: bool) -> None:
    """What can be refused before weights are loaded.

    Raises:
        UserError: different vocabularies or tokenizers, or rows longer than the models' positions.
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
            f"distill.sequence_length: {settings.sequence_length} is more than the {longest} positions of {teacher}"
        )


def distill(
    teacher_dir: Path,
    student_dir: Path,
    *,
    run_dir: Path,
    first_change: int,
    settings: Distill,
    track: Track,
    inputs: dict[str, Any],
    recipe: dict[str, Any],
    seed: int,
    dtype: str,
    attention: str,
    trust_remote_code: bool,
) -> None:
    """Train the student in ``student_dir`` on the teacher's distributions; write distilled/ and distill.json.

    Every rank calls this, inside an initialised process group. It goes on from the last complete checkpoint of the
    same run, if there is one. ``first_change`` is the lowest layer at which the student is not the teacher.

    Raises:
        Stopped: on SIGTERM or when the launcher is gone, after saving.
        UserError: input that cannot work.
    """
    check_names(settings)
    check_distillable(teacher_dir, student_dir, settings, trust_remote_code=trust_remote_code)
    checkpoints = run_dir / "checkpoints"
    heartbeat = Heartbeat(run_dir, timeout_s=settings.timeout_s)
    heartbeat.start()
    identity = checkpoint_inputs(settings, inputs)
    resume = _agreed(lambda: last_complete(checkpoints, identity))
    universal = resume is not None and _agreed(lambda: needs_universal(resume, zero_stage=zero_stage(settings)))
    tokenizer = load_tokenizer(teacher_dir, trust_remote_code=trust_remote_code)
    load = {"attention": attention, "trust_remote_code": trust_remote_code}
    texts: list[str] = []
    if wants_teacher_text(settings.data):
        texts = _teacher_text(
            teacher_dir, tokenizer, settings, run_dir, inputs=inputs, seed=seed, dtype=dtype, load=load
        )
    rows = training_rows(
        settings,
        tokenizer,
        num_rows=num_rows(settings),
        seed=seed,
        teacher_text=texts,
        folder=run_dir / "text",
        inputs=inputs,
    )

    report_to = tracking.start(track, run_dir, recipe)
    _join_deepspeed()
    # before the models: under ZeRO-3 these arguments make from_pretrained shard what it loads
    arguments, keep = training_arguments(
        settings, output_dir=checkpoints, seed=seed, report_to=report_to, load_universal=universal
    )
    teacher = load_model(teacher_dir, dtype=dtype, **load).requires_grad_(False)
    student = load_model(student_dir, dtype="float32", **load)
    set_trainable(student, settings.trainable, first_change=first_change)
    keep_zeros(student)
    undo = install_objective(student, teacher, terms=settings.losses, chunk=settings.head_chunk)
    shares = settings.trainable == "from_first_cut" and first_change > 0
    stop = StopRequest()
    trainer = DistillTrainer(
        model=student,
        args=arguments,
        train_dataset=rows,
        data_collator=_stack,
        teacher=teacher,
        prefix=SharedPrefix(student, teacher, first_change=first_change) if shares else None,
        terms=settings.losses,
        inputs=identity,
        keep_checkpoints=keep,
        stop=stop,
        callbacks=[Progress(tokens_per_step=_tokens_per_step(arguments, settings)), heartbeat],
    )
    trainer.remove_callback(PrinterCallback)
    _place_teacher(teacher, trainer)
    stop.listen()
    _announce(student, rows, trainer, settings, resume)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    if trainer.state.global_step < trainer.state.max_steps:
        heartbeat.stop()
        tracking.finish()
        raise Stopped(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps} ({stop.reason}), saved"
        )
    undo()
    _write_results(trainer, student, student_dir, rows, run_dir, inputs, settings)
    heartbeat.stop()
    tracking.finish()


def _agreed(decide: Callable[[], T]) -> T:
    """What rank 0 decides, on every rank; its refusal is everyone's."""
    answer: list[Any] = [None, None]
    if is_main():
        try:
            answer[0] = decide()
        except UserError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]


def _teacher_text(
    teacher_dir: Path,
    tokenizer: PreTrainedTokenizerBase,
    settings: Distill,
    run_dir: Path,
    *,
    inputs: dict[str, Any],
    seed: int,
    dtype: str,
    load: dict[str, Any],
) -> list[str]:
    """Rank 0 writes, all read. The writer is a copy of the teacher of its own, freed before training."""
    texts: list[Any] = [None]
    if is_main():
        writer = load_model(teacher_dir, dtype=dtype, device=device(), **load)
        texts[0] = written_by_teacher(
            writer,
            tokenizer,
            settings,
            file=run_dir / "text" / "teacher_text.json",
            inputs={
                key: inputs[key]
                for key in ("model", "data", "seed", "dtype", "attention", "distill.teacher_text_tokens")
            },
            seed=seed,
        )
    dist.broadcast_object_list(texts, src=0)
    return texts[0]


def _join_deepspeed() -> None:
    """Let DeepSpeed know the process group; otherwise ZeRO-3 takes the world size as 1 while it loads models.

    On a CPU it would first compile shared-memory collectives, which takes minutes and fails without a C++ compiler;
    gloo does their work.
    """
    import deepspeed
    import deepspeed.ops

    if device().type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)


def _place_teacher(teacher: PreTrainedModel, trainer: DistillTrainer) -> None:
    """Under ZeRO-3 the teacher is an inference engine of its own, sharded like the student; else it sits on the device.

    The engine's wrapper is not kept: sharded parameters gather themselves wherever the teacher's modules are called.
    """
    config = trainer.args.hf_deepspeed_config.config  # pyright: ignore[reportAttributeAccessIssue]
    if config["zero_optimization"]["stage"] == 3:
        from trl.models.utils import prepare_deepspeed

        prepare_deepspeed(teacher, trainer.accelerator)
    else:
        teacher.to(trainer.args.device)  # pyright: ignore[reportArgumentType]
    teacher.eval()


def _stack(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def _tokens_per_step(arguments: TrainingArguments, settings: Distill) -> int:
    rows = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * world_size()
    return rows * settings.sequence_length


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


def _write_results(
    trainer: DistillTrainer,
    student: PreTrainedModel,
    student_dir: Path,
    rows: PackedRows,
    run_dir: Path,
    inputs: dict[str, Any],
    settings: Distill,
) -> None:
    state = trainer.student_state()
    peak = torch.tensor(float(_peak_memory_bytes()), device=device())
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    if is_main():
        assert state is not None
        stored = getattr(torch, str(load_config(student_dir).dtype or "float32").removeprefix("torch."))
        student.config.use_cache = True  # the Trainer turned it off
        student.config.dtype = stored
        with written_folder(run_dir / "distilled") as folder:
            student.save_pretrained(folder, state_dict={k: v.to(stored) for k, v in state.items()})
            _copy_what_is_not_weights(student_dir, folder)
        history = [row for row in trainer.state.log_history if "loss" in row]
        Training(
            provenance=Provenance(inputs),
            num_steps=trainer.state.global_step,
            num_tokens=trainer.state.global_step * _tokens_per_step(trainer.args, settings),
            seconds=history[-1]["seconds"] if history else 0.0,
            history=tuple({key: float(value) for key, value in row.items()} for row in history),
            settings={
                "trainer": trainer.args.to_sanitized_dict(),
                "deepspeed": trainer.args.hf_deepspeed_config.config,  # pyright: ignore[reportAttributeAccessIssue]
                "world_size": world_size(),
                "rows": fingerprint(rows.fingerprint),
            },
            data=rows.counts,
            peak_memory_bytes=int(peak.item()),
        ).write(run_dir / Training.FILE)
    dist.barrier()


def _copy_what_is_not_weights(source: Path, folder: Path) -> None:
    """Tokenizer, chat template, licence and notices as they came with the model, byte for byte."""
    for file in source.iterdir():
        ours = file.suffix in (".safetensors", ".py") or file.name in ("config.json", "generation_config.json")
        if file.is_file() and not ours and not file.name.endswith(".index.json"):
            shutil.copy2(file, folder / file.name)


def _peak_memory_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
