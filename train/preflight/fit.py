"""What training will take, told and checked before it starts: memory by ZeRO stage, time, disk, and what fits.

Figures of memory and disk come from configurations alone. They err by a tenth (docs/scaling.md), so there are three
verdicts: it fits with that margin, it is close, and it cannot fit; only the last is refused.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from shoal.errors import UserError
from shoal.formatting import bytes_text
from shoal.machine import available_memory, device_memory, free_disk

from ..engine.arguments import most_checkpoints
from ..student.spec import TeacherPlace, TrainSpec
from .memory import LIBRARY_BYTES, Memory, Setting, shared_weights
from .run_size import Job, job

log = logging.getLogger(__name__)

MARGIN = 1.1
"""How far an estimate of memory may be off, either way."""
ROW_BYTES = 11
"""Bytes of one packed token: id, position, whether it is supervised, and its source."""
SIGNAL_BYTES = 150
"""Bytes of one token of recorded signals at k = 32, at most."""
PLACES: tuple[dict[str, Any], ...] = (
    {"stage": 0},
    {"stage": 2},
    {"stage": 3},
    {"stage": 2, "offload_optimizer": True},
    {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
)
"""Where weights, gradients and optimizer may lie, from fast to slow."""
SHORT_TOKENS = 512
"""Tokens of a micro-batch at which about half the speed is lost: smaller ones are proposed late."""


def disk_bytes(job: Job, *, record: bool = False) -> dict[str, int]:
    """What the run writes under run_dir, by folder, at its worst moment. A control reads the rows of the student."""
    student, setting, settings = job.student, job.setting, job.spec.settings
    frozen, tokens = student.parameters - student.trained, job.spec.num_row_tokens
    weights = setting.weight_bytes * (frozen if setting.stage == 3 else student.parameters)
    weights -= (setting.weight_bytes - setting.teacher_bytes) * shared_weights(student, setting)
    # moments; with ZeRO the fp32 weights that are stepped lie beside them
    states = int(setting.optimizer_bytes * student.trained) + 4 * student.trained * (setting.stage > 0)
    folders = {
        "checkpoints": most_checkpoints(settings) * (weights + states),
        "distilled": job.spec.student.stored_dtype.itemsize * student.parameters,
    }
    if not job.spec.is_control:
        folders["text"] = ROW_BYTES * tokens
    if settings.watch is not None and settings.watch.best is not None:
        # the next best student is complete before the last one is removed
        folders["checkpoints"] += 2 * setting.weight_bytes * student.parameters
    return folders | ({"signals": SIGNAL_BYTES * tokens} if record else {})


def check_fit(spec: TrainSpec, run_dir: Path, *, beside: int = 0) -> Job | None:
    """Refuse a run that cannot fit into memory or onto the disk, before any weight is loaded; log what is close.

    ``beside`` are bytes that something else will have written on that disk by then. One rank asks for all: its device
    stands for the others'. On a CPU what the processes take already is not counted twice. Where the recipe says
    `check_memory: false`, what would be refused is only logged. What comes back is the size of the run; None for a
    family that cannot be run without data.

    Raises:
        UserError: naming what is needed, what is free and the cheapest setting that fits.
    """
    try:
        size = job(spec)
    except RuntimeError as error:  # torch's, of operations that need numbers
        reason = str(error).strip().splitlines()[0][:120]
        log.warning("memory is not estimated: this family cannot be run without data (%s)", reason)
        return None
    free, called = (device_memory(spec.ranks.device), available_memory()), "this training"
    if spec.is_control:
        called = "the control's training (eval.control)"
    problems = shortages(size, device_free=free[0], host_free=free[1])
    needed = beside + missing_bytes(size, run_dir)
    if needed > free_disk(run_dir):
        problems.append(
            f"run_dir {run_dir}: training writes {bytes_text(needed)} more at its worst moment and "
            f"{bytes_text(free_disk(run_dir))} are free there; free some space, lower "
            "distill.trainer.save_total_limit, or set run_dir to another disk"
        )
    if problems and not spec.settings.check_memory:
        log.warning("%s will not fit, and starts because distill.check_memory is false: %s", called, problems[0])
    elif problems:
        fitting = cheapest(size, device_free=free[0], host_free=free[1])
        needs_memory = any(not problem.startswith("run_dir") for problem in problems)
        advice = "; this fits: " + ", ".join(overrides(size, fitting)) if fitting and needs_memory else ""
        raise UserError(
            f"{called} will not fit: " + "; ".join(problems) + advice + ". `shoal distill --dry-run` shows where "
            "memory goes; distill.check_memory: false starts it all the same"
        )
    elif not fits(size, device_free=free[0], host_free=free[1]):
        log.warning(
            "memory will be close for %s: %s per rank expected, %s free; estimates err by a tenth",
            called,
            bytes_text(size.memory.peak),
            bytes_text(free[0]),
        )
    return size


def check_control(control: TrainSpec, folder: Path, spec: TrainSpec, run_dir: Path) -> None:
    """Refuse a control in ``folder`` that could not be trained after the student of ``spec``, before that one is; log
    what it takes.

    Raises:
        UserError: as check_fit.
    """
    try:
        own = job(spec)
    except RuntimeError:  # of which check_fit tells
        own = None
    beside = 0 if own is None else missing_bytes(own, run_dir)
    size = check_fit(control, folder, beside=beside)
    if own is not None and size is not None:
        log.info(
            "eval.control: after the student the uncut teacher is trained on the same rows, which takes %.2g times as "
            "long and %s on the disk; eval.control: false does without it",
            size.flops_per_token / own.flops_per_token,
            bytes_text(sum(disk_bytes(size).values())),
        )


def shortages(job: Job, *, device_free: int, host_free: int) -> list[str]:
    """What cannot fit even if the estimate is a margin too high, in words."""
    needed, setting = job.memory, job.setting
    device, host = _needed(needed, setting)
    problems = []
    if device > MARGIN * device_free:
        where = f"{setting.ranks_per_node} rank(s) on this node" if setting.device == "cpu" else "a rank"
        problems.append(
            f"{where} need {bytes_text(device)} of memory at the peak and {bytes_text(device_free)} are free"
        )
    if setting.device != "cpu" and host > MARGIN * host_free:
        problems.append(f"this node needs {bytes_text(host)} of host memory and {bytes_text(host_free)} are free")
    return problems


def fits(job: Job, *, device_free: int, host_free: int) -> bool:
    """Whether it fits even if the estimate is a margin too low."""
    device, host = _needed(job.memory, job.setting)
    return MARGIN * device <= device_free and (job.setting.device == "cpu" or MARGIN * host <= host_free)


def _needed(needed: Memory, setting: Setting) -> tuple[int, int]:
    """Bytes on the device, and on the host of a node. On a CPU all ranks of the node share both."""
    if setting.device == "cpu":
        return setting.ranks_per_node * (needed.peak - LIBRARY_BYTES), 0
    return needed.peak, needed.host


def missing_bytes(job: Job, run_dir: Path) -> int:
    """Bytes that the run has still to write at its worst moment: without those of an earlier life of it that it goes on
    from or replaces; never less than 0."""
    wanted = disk_bytes(job)
    files = (file for name in wanted for file in (run_dir / name).rglob("*") if file.is_file())
    return max(0, sum(wanted.values()) - sum(file.stat().st_size for file in files))


def cheapest(job: Job, *, device_free: int, host_free: int) -> Setting | None:
    """The first of the proposals that fits; None where none does."""
    for setting in proposals(job):
        if fits(replace(job, setting=setting), device_free=device_free, host_free=host_free):
            return setting
    return None


def proposals(job: Job) -> Iterator[Setting]:
    """Settings that train the same, about the fastest first: the same rows per step and rank, split in other ways, and
    other places for everything. Recorded signals come only at the very end, since they need a pass of their own and
    are not quite the same loss.
    """
    now = job.setting
    rows = now.rows * now.accumulation
    splits = [micro for micro in range(rows, 0, -1) if rows % micro == 0]
    quick = [micro for micro in splits if micro == rows or micro * now.sequence_length >= SHORT_TOKENS]
    slow = [micro for micro in splits if micro not in quick]
    teachers: tuple[TeacherPlace, ...] = (now.teacher,)
    if now.teacher == "live":
        teachers = ("live", "offloaded", "recorded") if job.spec.is_recordable else ("live", "offloaded")
    on_device = replace(now, offload_optimizer=False, offload_parameters=False)
    for teacher, micros in itertools.product(teachers, (quick, slow)):
        for checkpointing, place, micro in itertools.product((False, True), PLACES, micros):
            changes = {"rows": micro, "accumulation": rows // micro, "checkpointing": checkpointing, "teacher": teacher}
            setting = replace(on_device, **changes, **place)
            if _is_possible(setting):
                yield setting


def _is_possible(setting: Setting) -> bool:
    offloads = setting.offload_optimizer or setting.offload_parameters
    return not (
        (setting.weight_bytes == 2 and setting.stage == 0)  # refused: Adam would start a step late
        or (setting.stage == 3 and (setting.four_bits or setting.compiled))
        or (setting.teacher == "offloaded" and setting.stage == 3)
        or (setting.device == "cpu" and offloads)
    )


def overrides(job: Job, setting: Setting) -> list[str]:
    """Recipe keys that turn the job's setting into ``setting``; empty where it is that already."""
    now, lines = job.setting, []
    where = ("stage", "offload_optimizer", "offload_parameters")
    if any(getattr(now, name) != getattr(setting, name) for name in where):
        zero = [f"stage: {setting.stage}"]
        zero += ["offload_optimizer: {device: cpu}"] * setting.offload_optimizer
        zero += ["offload_param: {device: cpu}"] * setting.offload_parameters
        named = f"deepspeed/zero{setting.stage}.json"
        mapping = "{zero_optimization: {" + ", ".join(zero) + "}}"
        lines.append(f"distill.deepspeed={named if len(zero) == 1 else mapping}")
    if now.rows != setting.rows:
        lines.append(f"distill.trainer.per_device_train_batch_size={setting.rows}")
        if job.spec.settings.batch_size is None:  # else it follows
            lines.append(f"distill.trainer.gradient_accumulation_steps={setting.accumulation}")
    if now.checkpointing != setting.checkpointing:
        lines.append(f"distill.trainer.gradient_checkpointing={str(setting.checkpointing).lower()}")
    if now.teacher != setting.teacher:
        recorded = setting.teacher == "recorded"
        lines.append(
            "distill.teacher.recorded=FOLDER (after `shoal record`)" if recorded else "distill.teacher.offload=true"
        )
    return lines
