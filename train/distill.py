"""The distill stage: teacher/ and student/ in, distilled/ and distill.json out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback

from shoal.artifact import PruningPlan, fingerprint
from shoal.data import sources_fingerprint
from shoal.errors import UserError
from shoal.models import align_weights, load_config, load_model, load_tokenizer, text_config, tokenizer_fingerprint
from shoal.packing import PackedRows
from shoal.recipe import Distill, Track, as_dict
from shoal.recording import Record
from shoal.runtime import device, is_main, world_size
from shoal.terms import LOGIT_TERMS, STATE_TERMS, CrossEntropy, reads_distributions

from . import tracking
from .adapters import add_adapters, refuse_untrainable
from .arguments import (
    BATCH_SPLIT,
    autocast_dtype,
    check_names,
    deepspeed_config,
    num_rows,
    rows_per_step,
    training_arguments,
    zero_stage,
)
from .checkpoint import last_complete, needs_universal
from .frozen import share_frozen, stored_names
from .heartbeat import Heartbeat
from .local import gaps, local_stage
from .on_policy import Sampler
from .progress import Progress
from .recorded import Recorded
from .recording import recording_inputs
from .results import write_results
from .sampling import end_tokens
from .sharding import join_deepspeed, place_teacher
from .signals import LiveTeacher, RecordedTeacher
from .states import StateLosses
from .stop import StopRequest
from .student import Objective, SharedPrefix, output_head, to_logits
from .text import training_rows
from .trainable import keep_zeros, shares_prefix, train_only, trained_parts
from .trainer import DistillTrainer
from .watch import Scorer, Watcher
from .writing import Writer, check_backend, transformers_writer, vllm_writer, wants_teacher_text, write_texts
from .zero_check import check_objective

log = logging.getLogger(__name__)

T = TypeVar("T")

NOT_IDENTITY = {
    *("distill.num_ranks", "distill.timeout_s", "distill.stop_on_spike", "distill.check_memory", "distill.overlap"),
    *(f"distill.trainer.{key}" for key in ("save_steps", "save_strategy", "save_total_limit")),
    *(f"distill.trainer.{key}" for key in ("logging_steps", "disable_tqdm", "dataloader_num_workers")),
}
"""Settings that change how the work is done but not its result: a run may go on with others."""


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
    writing = section["distill.writing"]
    section["distill.writing"] = {k: v for k, v in writing.items() if k not in ("folder", "prompts", "batch_size")}
    if settings.writing.prompts is not None:
        section["distill.writing.prompts"] = sources_fingerprint((settings.writing.prompts,))
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
    scores the student with; ``search_rows`` finds evaluation items in the training rows.

    Raises:
        Stopped: on SIGTERM or when the launcher is gone, after saving.
        UserError: input that cannot work.
    """
    check_names(settings)
    check_distillable(teacher_dir, student_dir, settings, trust_remote_code=trust_remote_code)
    trained_parts(settings.trainable, plan)
    if settings.lora is not None:
        refuse_untrainable(settings.lora, settings.trainable, zero_stage=zero_stage(settings))
    checkpoints = run_dir / "checkpoints"
    heartbeat = Heartbeat(run_dir, timeout_s=settings.timeout_s)
    heartbeat.start()
    identity = checkpoint_inputs(settings, inputs)
    resume = _agreed(lambda: last_complete(checkpoints, identity))
    universal = resume is not None and _agreed(lambda: needs_universal(resume, zero_stage=zero_stage(settings)))
    tokenizer = load_tokenizer(teacher_dir, trust_remote_code=trust_remote_code)
    load = {"attention": attention, "trust_remote_code": trust_remote_code}
    rows = rows_to_train_on(
        teacher_dir, tokenizer, settings, run_dir, inputs=inputs, trust_remote_code=trust_remote_code
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
    stored = stored_names(student_dir)
    if settings.lora is not None:
        add_adapters(student, settings.lora, trained, seed=seed, stored=stored)
    keep_zeros(student)
    live = None
    if settings.teacher.recorded is None:
        live = load_model(teacher_dir, dtype=settings.teacher.dtype or dtype, **load).requires_grad_(False)
    shared = 0 if live is None else shares_prefix(trained, plan)
    if settings.local is not None:  # the layer before the first gap is no longer the teacher's
        shared = min(shared, gaps(plan.keep, plan.num_layers)[0].layer)
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
        autocast_dtype=autocast_dtype(settings),
        on_policy=_on_policy(settings, student, tokenizer, seed=seed),
        callbacks=[Progress(tokens_per_step=rows_per_step(settings) * settings.sequence_length), heartbeat],
    )
    trainer.remove_callback(PrinterCallback)
    if live is not None:
        place_teacher(live, trainer, offload=settings.teacher.offload)
        if zero_stage(settings) < 3 and not settings.teacher.offload:
            _share_weights(student, live, plan, settings, stored)
    check_objective(settings, live or student, rows, states, record, is_teacher=live is not None)
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
    data: dict[str, Any] = {"sources": rows.counts}
    if search_rows is not None and is_main():
        data["overlap"] = search_rows(rows, tokenizer)
    write_results(
        trainer,
        student,
        student_dir,
        run_dir=run_dir,
        inputs=inputs,
        watcher=watcher,
        data=data,
        settings={
            "rows": fingerprint(rows.fingerprint),
            "shared_layers": shared,
            "trained_layers": list(trained.layers),
        },
    )
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
