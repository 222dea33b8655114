"""The distill stage: teacher/ and student/ in, distilled/ and distill.json out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback

from shoal.artifact import PruningPlan
from shoal.data import sources_fingerprint
from shoal.errors import UserError
from shoal.models import load_config, load_model, load_tokenizer, text_config, tokenizer_fingerprint
from shoal.packing import PackedRows
from shoal.recipe import Distill, Track, as_dict
from shoal.recording import Record
from shoal.runtime import device, is_main, world_size
from shoal.terms import LOGIT_TERMS, STATE_TERMS, CrossEntropy, reads_distributions

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
from .head import check_zero_at_teacher
from .heartbeat import Heartbeat
from .local import local_stage
from .progress import Progress
from .recorded import Recorded
from .recording import recording_inputs
from .results import write_results
from .sharding import gathered, join_deepspeed, place_teacher
from .signals import LiveTeacher, RecordedTeacher
from .states import StateLosses
from .stop import StopRequest
from .student import Objective, SharedPrefix, final_hidden, output_head, to_logits
from .text import training_rows
from .trainable import keep_zeros, shares_prefix, train_only
from .trainer import DistillTrainer
from .watch import Scorer, Watcher
from .writing import wants_teacher_text, written_by_teacher

log = logging.getLogger(__name__)

T = TypeVar("T")

NOT_IDENTITY = {
    *("distill.num_ranks", "distill.timeout_s", "distill.stop_on_spike"),
    *(f"distill.trainer.{key}" for key in ("save_steps", "save_strategy", "save_total_limit")),
    *(f"distill.trainer.{key}" for key in ("logging_steps", "disable_tqdm", "dataloader_num_workers")),
}
"""Settings that change how the work is done but not its result: a run may go on with others."""


PREFLIGHT_TOKENS = 64
"""On which every run first tries its objective."""


class Stopped(Exception):
    """Training was asked to stop and has saved; the same command goes on."""


def distill_inputs(
    settings: Distill,
    record: Record,
    *,
    teacher: str,
    student: str,
    drop: tuple[int, ...],
    seed: int,
    dtype: str,
    attention: str,
) -> dict[str, Any]:
    """Everything that shapes distilled/: the stage's identity."""
    section = {f"distill.{key}": value for key, value in as_dict(settings).items() if key != "trainer"}
    if settings.watch is None or settings.watch.best is None:
        del section["distill.watch"]  # it only looks on
    # where signals lie or wait does not matter; what was recorded does, and is compared with rows and model when read
    kept = {"top_k": record.top_k, "temperature": record.temperature, "states": list(record.states)}
    section["distill.teacher"] = {
        "dtype": settings.teacher.dtype,
        "recorded": None if settings.teacher.recorded is None else kept,
    }
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


def rows_from(inputs: dict[str, Any]) -> dict[str, Any]:
    """What shapes the training rows, for messages about a recording of others."""
    keys = ("distill.data", "distill.sequence_length", "distill.packing", "data", "seed")
    return {key: inputs[key] for key in keys if key in inputs}


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
    plan: PruningPlan,
    *,
    run_dir: Path,
    settings: Distill,
    record: Record,
    track: Track,
    scorer: Callable[[PreTrainedTokenizerBase], Scorer] | None,
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
    scores the student with.

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
    report_to = tracking.start(track, run_dir, recipe)
    join_deepspeed()
    # before the models: under ZeRO-3 these arguments make from_pretrained shard what it loads
    arguments, keep = training_arguments(
        settings, output_dir=checkpoints, seed=seed, report_to=report_to, load_universal=universal
    )
    student = load_model(student_dir, dtype="float32", **load)
    trained = train_only(student, settings.trainable, plan)
    keep_zeros(student)
    live = None
    if settings.teacher.recorded is None:
        live = load_model(teacher_dir, dtype=settings.teacher.dtype or dtype, **load).requires_grad_(False)
    shared = 0 if live is None else shares_prefix(trained, plan)
    prefix = SharedPrefix(student, live, first_change=shared) if live is not None and shared else None
    state_terms = [term for term in settings.losses if isinstance(term, STATE_TERMS)]
    states = StateLosses(state_terms, plan, student, live, num_shared=shared) if state_terms else None
    reads_logits = any(map(reads_distributions, settings.losses))
    if live is not None:
        teacher = LiveTeacher(live, reads_logits=reads_logits, states=states, prefix=prefix)
    else:
        recorded = _recorded(teacher_dir, rows, settings, record, states, inputs)
        teacher = RecordedTeacher(recorded, reads_logits=reads_logits, states=states)
    objective = Objective(
        student,
        None if live is None else to_logits(live),
        terms=settings.losses,
        chunk=settings.head_chunk,
        states=states,
        recorded_temperature=record.temperature,
    )
    stop = StopRequest()
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
        keep_checkpoints=keep,
        stop=stop,
        stop_on_spike=settings.stop_on_spike,
        callbacks=[Progress(tokens_per_step=rows_per_step(settings) * settings.sequence_length), heartbeat],
    )
    trainer.remove_callback(PrinterCallback)
    if live is not None:
        place_teacher(live, trainer, offload=settings.teacher.offload)
    _check_objective(settings, live or student, rows, top_k=None if live is not None else record.top_k)
    watcher = None
    if settings.watch is not None and scorer is not None:
        watcher = Watcher(settings.watch, checkpoints, identity)
        trainer.watch_with(watcher, scorer(tokenizer))
    objective.install()
    stop.listen()
    _announce(student, rows, trainer, settings, resume)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    if trainer.state.global_step < trainer.state.max_steps:
        heartbeat.stop()
        tracking.finish()
        raise Stopped(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps} ({stop.reason}), saved"
        )
    objective.uninstall()
    more = {"shared_layers": shared, "trained_layers": list(trained.layers)}
    write_results(trainer, student, student_dir, rows, run_dir=run_dir, inputs=inputs, watcher=watcher, more=more)
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


def _recorded(
    teacher_dir: Path,
    rows: PackedRows,
    settings: Distill,
    record: Record,
    states: StateLosses | None,
    inputs: dict[str, Any],
) -> Recorded:
    assert settings.teacher.recorded is not None
    identity = recording_inputs(
        record,
        teacher_dir,
        model=inputs["model"],
        sequence_length=settings.sequence_length,
        dtype=inputs["dtype"],
        attention=inputs["attention"],
    )
    return Recorded(
        Path(settings.teacher.recorded),
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


def _check_objective(settings: Distill, model: PreTrainedModel, rows: PackedRows, *, top_k: int | None) -> None:
    """With a model as its own teacher every divergence must be zero, and so must its gradient; a few tokens tell.

    Raises:
        RuntimeError: naming the term. No recipe can cause this.
    """
    row = {
        name: value[:PREFLIGHT_TOKENS].unsqueeze(0).to(model.device) for name, value in rows[0].items() if value.ndim
    }
    terms = [term for term in settings.losses if isinstance(term, LOGIT_TERMS)]
    with torch.no_grad(), gathered(output_head(model)):
        hidden_BSD = final_hidden(model, row["input_ids"], row["position_ids"])
        labels = row["input_ids"][0, 1:]
        check_zero_at_teacher(terms, hidden_BSD[0, :-1], to_logits(model), labels, top_k=top_k)


def _stack(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


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
