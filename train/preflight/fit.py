"""What fits, what is refused before it starts, and what to change where memory runs out all the same.

Figures of memory and disk come from configurations alone. They err by a tenth (docs/explanation/resources.md),
so there are three verdicts: it fits with that margin, it is close, and it cannot fit; only the last is refused.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from shoal.atomic_files import free_disk
from shoal.errors import UserError
from shoal.formatting import bytes_text
from shoal.machine import available_memory, device_memory
from shoal.recipe.distill import Recorded

from ..engine.arguments import most_checkpoints
from ..student.spec import TeacherPlace, TrainSpec
from ..teacher.recording import Wanted
from .memory import LIBRARY_BYTES, Job, NotEstimated, Setting, job, optimizer_bytes
from .throughput import flops_per_token

log = logging.getLogger(__name__)

MARGIN = 1.1
"""How far an estimate of memory may be off, either way."""
ROW_BYTES = 11
"""Bytes of one packed token: id, position, whether it is supervised, and its source."""
PLACES: tuple[dict[str, Any], ...] = (
    {"stage": 0},
    {"stage": 2},
    {"stage": 3},
    {"stage": 2, "offload_optimizer": True},
    {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
)
"""Where weights, gradients and optimizer may lie, from fast to slow."""
IS_FULL = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""Words for memory that runs out of the host, and outside torch's own allocator of a device."""


@dataclass(frozen=True)
class Free:
    """Bytes that there are."""

    device: int
    host: int

    @classmethod
    def here(cls, device: torch.device) -> Free:
        """What is free now."""
        return cls(device_memory(device), available_memory())

    def shortages(self, job: Job) -> list[str]:
        """What cannot fit even if the estimate is a margin too high, in words."""
        (device, host), problems = _needed(job), list[str]()
        if device > MARGIN * self.device:
            where = f"{job.spec.ranks.per_node} rank(s) on this node" if job.on_cpu else "a rank"
            problems.append(
                f"{where} need {bytes_text(device)} of memory at the peak, {bytes_text(self.device)} are free"
            )
        if host > MARGIN * self.host:
            problems.append(f"this node needs {bytes_text(host)} of host memory and {bytes_text(self.host)} are free")
        return problems

    def fits(self, job: Job) -> bool:
        """Whether it fits even if the estimate is a margin too low."""
        device, host = _needed(job)
        return MARGIN * device <= self.device and MARGIN * host <= self.host

    def verdict(self, job: Job) -> str:
        """Whether it fits, in a word."""
        return "fits" if self.fits(job) else "no" if self.shortages(job) else "close"

    def cheapest(self, job: Job) -> Setting | None:
        """The first of the proposals that fits; None where none does."""
        return next((each for each in proposals(job) if self.fits(replace(job, setting=each))), None)


def _needed(job: Job) -> tuple[int, int]:
    """Bytes on the device, and on the host of a node. On a CPU all ranks of the node share both; what their processes
    take already is not counted twice."""
    needed = job.memory
    if job.on_cpu:
        return job.spec.ranks.per_node * (needed.peak - LIBRARY_BYTES), 0
    return needed.peak, needed.host


def disk_bytes(job: Job) -> dict[str, int]:
    """What the run writes under run_dir, by folder, at its worst moment. A control reads the rows of the student."""
    student, stage, settings = job.student, job.setting.stage, job.spec.settings
    frozen = student.parameters - student.trained
    weights = job.width * (frozen if stage == 3 else student.parameters)
    weights -= (job.width - job.spec.teacher_dtype.itemsize) * job.shared_weights
    # moments; with ZeRO the fp32 weights that are stepped lie beside them
    states = int(optimizer_bytes(job.spec) * student.trained) + 4 * student.trained * (stage > 0)
    folders = {
        "checkpoints": most_checkpoints(settings) * (weights + states),
        "distilled": job.spec.student.stored_dtype.itemsize * student.parameters,
    }
    if not job.spec.is_control:
        folders["text"] = ROW_BYTES * job.spec.num_row_tokens
        if isinstance(settings.teacher, Recorded) and settings.teacher.path is None:
            rows = job.spec.num_row_tokens // settings.sequence_length
            folders["signals"] = Wanted.of(job.spec, "").layout.num_bytes(rows)
    if settings.watch is not None and settings.watch.metric_for_best_model is not None:
        # the next best student is complete before the last one is removed
        folders["checkpoints"] += 2 * job.width * student.parameters
    return folders


def missing_bytes(job: Job, run_dir: Path) -> int:
    """Bytes that the run has still to write at its worst moment: without those of an earlier life of it that it goes on
    from or replaces; never less than 0."""
    wanted = disk_bytes(job)
    files = (file for name in wanted for file in (run_dir / name).rglob("*") if file.is_file())
    return max(0, sum(wanted.values()) - sum(file.stat().st_size for file in files))


def check_fit(spec: TrainSpec, run_dir: Path, *, beside: int = 0) -> Job | None:
    """Refuse a run that cannot fit into memory or onto the disk, before any weight is loaded; log what is close.

    ``beside`` are bytes that something else will have written on that disk by then. One rank asks for all: its device
    stands for the others'. Where the training is forced, what would be refused is only logged. What
    comes back is the size of the run; None for a family that cannot be run without data.

    Raises:
        UserError: naming what is needed, what is free and the cheapest setting that fits.
    """
    try:
        size = job(spec)
    except NotEstimated as error:
        log.warning("%s", error)
        return None
    free, called = Free.here(spec.ranks.device), "this training"
    if spec.is_control:
        called = "the control's training (eval.control)"
    problems, advice = free.shortages(size), ""
    if problems and (fitting := free.cheapest(size)):
        advice = "; this fits: " + ", ".join(overrides(size, fitting))
    needed, there = beside + missing_bytes(size, run_dir), free_disk(run_dir)
    if needed > there:
        problems.append(
            f"run_dir {run_dir}: training writes {bytes_text(needed)} more at its worst moment and "
            f"{bytes_text(there)} are free there; free some space, lower distill.trainer.save_total_limit, or set "
            "run_dir to another disk"
        )
    if problems and spec.is_forced:
        log.warning("%s will not fit, and starts because of --force: %s", called, problems[0])
    elif problems:
        raise UserError(
            f"{called} will not fit: "
            + "; ".join(problems)
            + advice
            + ". `--dry-run` shows the memory use; `--force` starts the training anyway"
        )
    elif not free.fits(size):
        peak = bytes_text(size.memory.peak)
        log.warning("memory will be close for %s: %s per rank expected; estimates can be off by a tenth", called, peak)
    return size


def check_control(control: TrainSpec, folder: Path, spec: TrainSpec, run_dir: Path) -> None:
    """Refuse a control in ``folder`` that could not be trained after the student of ``spec``, before that one is; log
    what it takes."""
    try:
        own = job(spec)
    except NotEstimated:  # of which check_fit tells
        return
    size = check_fit(control, folder, beside=missing_bytes(own, run_dir))
    if size is not None:
        log.info(
            "eval.control: after the student the teacher is trained on the same rows, which takes %.2g times as "
            "long and %s on the disk; eval.control: false skips it",
            flops_per_token(size) / flops_per_token(own),
            bytes_text(sum(disk_bytes(size).values())),
        )


def proposals(job: Job) -> Iterator[Setting]:
    """Settings that train the same, about the fastest first: the same rows per step and rank, split in other ways, and
    other places for everything. Recorded signals come only at the very end, since they need a pass of their own and
    are not quite the same loss.
    """
    now = job.setting
    rows = now.rows * now.accumulation
    micros = [micro for micro in range(rows, 0, -1) if rows % micro == 0]
    teachers: tuple[TeacherPlace, ...] = (now.teacher,)
    if now.teacher == "live":
        teachers = ("live", "offloaded", "recorded") if job.spec.is_recordable else ("live", "offloaded")
    plain = replace(now, offload_optimizer=False, offload_parameters=False)
    for teacher, checkpointing, place, micro in itertools.product(teachers, (False, True), PLACES, micros):
        changes = {"rows": micro, "accumulation": rows // micro, "checkpointing": checkpointing, "teacher": teacher}
        setting = replace(plain, **changes, **place)
        if not (
            (job.width == 2 and setting.stage == 0)  # refused: Adam would start a step late
            or (setting.stage == 3 and (job.in_four_bits or job.spec.settings.trainer.get("torch_compile")))
            or (setting.teacher == "offloaded" and setting.stage == 3)
            or (job.on_cpu and (setting.offload_optimizer or setting.offload_parameters))
        ):
            yield setting


def overrides(job: Job, setting: Setting) -> list[str]:
    """Recipe keys that turn the job's setting into ``setting``; empty where it is that already."""
    now, lines = job.setting, []
    where = ("stage", "offload_optimizer", "offload_parameters")
    if any(getattr(now, name) != getattr(setting, name) for name in where):
        zero = [f"stage: {setting.stage}"]
        zero += ["offload_optimizer: {device: cpu}"] * setting.offload_optimizer
        zero += ["offload_param: {device: cpu}"] * setting.offload_parameters
        named = f"zero{setting.stage}"
        mapping = "{zero_optimization: {" + ", ".join(zero) + "}}"
        lines.append(f"distill.deepspeed={named if len(zero) == 1 else mapping}")
    if now.rows != setting.rows:
        lines += fewer_rows(job.spec, setting.rows)
    if now.checkpointing != setting.checkpointing:
        lines.append(f"distill.trainer.gradient_checkpointing={str(setting.checkpointing).lower()}")
    if now.teacher != setting.teacher:
        dtype = job.spec.live_dtype
        of_dtype = "" if dtype is None else f"dtype: {dtype}, "
        offloaded = f"{{kind: live, {of_dtype}offload: true}}"
        lines.append(f"distill.teacher={'recorded' if setting.teacher == 'recorded' else offloaded}")
    return lines


def fewer_rows(spec: TrainSpec, rows: int) -> list[str]:
    """Recipe keys that make micro-batches of ``rows`` rows of the same steps."""
    lines = [f"distill.trainer.per_device_train_batch_size={rows}"]
    if spec.settings.batch_size is None:  # else it follows
        before, accumulation = spec.batch_split
        lines.append(f"distill.trainer.gradient_accumulation_steps={before * accumulation // rows}")
    return lines


@contextmanager
def explained_memory(spec: TrainSpec) -> Iterator[None]:
    """Turn memory that runs out while models train into a UserError.

    Raises:
        UserError: it did; with what to change.
    """
    try:
        yield
    except RuntimeError as error:  # as torch's for a GPU is, too
        if not isinstance(error, torch.OutOfMemoryError) and not any(words in str(error) for words in IS_FULL):
            raise
        rows, _ = spec.batch_split
        less = "use more ranks or a larger device"
        if rows > 1:
            less = "add " + " ".join(fewer_rows(spec, max(n for n in range(1, rows) if rows % n == 0)))
        raise UserError(
            f"out of memory while training: {str(error).strip().splitlines()[0][:200]}; the same command resumes "
            f"from the last checkpoint. To use less, {less}; `--dry-run` shows the memory use and a setting that fits"
        ) from error
