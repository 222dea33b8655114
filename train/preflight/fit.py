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

import torch

from shoal.artifacts.artifact import PruningPlan
from shoal.errors import UserError
from shoal.formatting import bytes_text
from shoal.machine import available_memory, device_memory, free_disk
from shoal.models.load import load_config
from shoal.recipe.distill import Distill

from .memory import LIBRARY_BYTES, Memory, Setting, TeacherPlace, memory, shared_weights
from .run_size import Job, job
from .throughput import flops_per_token

log = logging.getLogger(__name__)

MARGIN = 1.1
"""How far an estimate of memory may be off, either way."""
ROW_BYTES = 9
"""Of one packed token: id, position, whether it is supervised."""
SIGNAL_BYTES = 150
"""Of one token of recorded signals at k = 32, at most."""
ADVICE = {
    "scoring": "; distill.watch: null leaves scoring out",
    "the local stage": "; distill.local: null leaves it out",
    "the teacher's writing": "; write where it fits and set distill.writing.folder to where that text is",
}
"""What no other place for weights would change."""
SLOWER = {"offload_optimizer": 1.3, "offload_parameters": 2.0, "offloaded": 1.2, "stage 3": 1.15, "stages 1, 2": 1.02}
"""What a setting costs in time, roughly: only for the order in which settings are tried."""
SHORT_ROWS = 512
"""Tokens of a micro-batch at which half the speed is lost; for the same order."""


# --- disk ---------------------------------------------------------------------------------------------------------


def disk_bytes(job: Job, *, record: bool = False) -> dict[str, int]:
    """What the run writes under run_dir, by folder, at its worst moment.

    A checkpoint is removed after the next one is complete, so one more than is kept lies there for a while.
    """
    student, setting = job.student, job.setting
    frozen = student.parameters - student.trained
    weights = setting.weight_bytes * (frozen if setting.stage == 3 else student.parameters)
    weights -= (setting.weight_bytes - setting.teacher_bytes) * shared_weights(student, setting)
    # moments; with ZeRO the fp32 weights that are stepped lie beside them
    states = (8 if setting.stage == 0 else 12) * student.trained
    steps = job.num_steps * job.tokens_per_step
    found = {
        "checkpoints": (job.kept_checkpoints + 1) * (weights + states),
        "distilled": setting.stored_bytes * student.parameters,
        "text": ROW_BYTES * steps,
    }
    if job.keeps_best:  # the next one is complete before the last one is removed
        found["checkpoints"] += 2 * setting.weight_bytes * student.parameters
    if setting.healed_layers:
        healed = sum(student.layers[layer].parameters for layer in setting.healed_layers)
        found["local"] = setting.stored_bytes * student.parameters + 12 * healed
    return found | ({"signals": SIGNAL_BYTES * steps} if record else {})


# --- refusal ------------------------------------------------------------------------------------------------------


def check_fit(
    teacher_dir: Path,
    student_dir: Path,
    plan: PruningPlan,
    *,
    settings: Distill,
    run_dir: Path,
    dtype: str,
    attention: str,
    ranks: int,
    ranks_per_node: int,
    device: torch.device,
    trust_remote_code: bool = False,
) -> None:
    """Refuse a run that cannot fit into memory or onto the disk, before any weight is loaded; log what is close.

    One rank asks for all: its device stands for the others'. On a CPU what the processes take already is not counted
    twice. Where the recipe says `check_memory: false`, what would be refused is only logged.

    Raises:
        UserError: naming what is needed, what is free and the cheapest setting that fits.
    """
    teacher, student = (
        load_config(folder, trust_remote_code=trust_remote_code) for folder in (teacher_dir, student_dir)
    )
    try:
        found = job(
            teacher,
            student,
            plan,
            settings,
            dtype=dtype,
            attention=attention,
            ranks=ranks,
            ranks_per_node=ranks_per_node,
            device=device,
        )
    except RuntimeError as error:  # torch's, of operations that need numbers
        reason = str(error).strip().splitlines()[0][:120]
        log.warning("memory is not estimated: this family cannot be run without data (%s)", reason)
        return
    free = device_memory(device), available_memory()
    problems = shortages(found, device_free=free[0], host_free=free[1])
    needed = sum(disk_bytes(found).values()) - written_bytes(run_dir)
    if needed > free_disk(run_dir):
        problems.append(
            f"run_dir {run_dir}: training writes {bytes_text(needed)} more at its worst moment and "
            f"{bytes_text(free_disk(run_dir))} are free there; free some space, lower "
            "distill.trainer.save_total_limit, or set run_dir to another disk"
        )
    if problems and not settings.check_memory:
        log.warning("this training will not fit, and starts because distill.check_memory is false: %s", problems[0])
    elif problems:
        fitting = next(cheapest(found, device_free=free[0], host_free=free[1]), None)
        advice = "; this fits: " + ", ".join(overrides(found, fitting)) if fitting and needs_memory(problems) else ""
        raise UserError(
            "this training will not fit: " + "; ".join(problems) + advice + ". `shoal distill --dry-run` shows where "
            "memory goes; distill.check_memory: false starts it all the same"
        )
    elif not fits(found.memory, found.setting, device_free=free[0], host_free=free[1]):
        log.warning(
            "memory will be close: %s per rank expected, %s free; estimates err by a tenth",
            bytes_text(found.memory.peak),
            bytes_text(free[0]),
        )


def needs_memory(problems: list[str]) -> bool:
    """Whether another setting would help."""
    return any(not problem.startswith("run_dir") for problem in problems)


def shortages(job: Job, *, device_free: int, host_free: int) -> list[str]:
    """What cannot fit even if the estimate is a margin too high, in words."""
    found, setting = job.memory, job.setting
    device, host = _needed(found, setting)
    problems = []
    if device > MARGIN * device_free:
        where = f"{setting.ranks_per_node} rank(s) on this node" if setting.device == "cpu" else "a rank"
        problems.append(
            f"{where} need {bytes_text(device)} of memory at the peak ({found.peak_at}) and {bytes_text(device_free)} "
            f"are free{ADVICE.get(found.peak_at, '')}"
        )
    if setting.device != "cpu" and host > MARGIN * host_free:
        problems.append(f"this node needs {bytes_text(host)} of host memory and {bytes_text(host_free)} are free")
    return problems


def fits(found: Memory, setting: Setting, *, device_free: int, host_free: int) -> bool:
    """Whether it fits even if the estimate is a margin too low."""
    device, host = _needed(found, setting)
    return MARGIN * device <= device_free and (setting.device == "cpu" or MARGIN * host <= host_free)


def _needed(found: Memory, setting: Setting) -> tuple[int, int]:
    """On the device, and on the host of a node. On a CPU all ranks of the node share both."""
    if setting.device == "cpu":
        return setting.ranks_per_node * (found.peak - LIBRARY_BYTES) + found.host, 0
    return found.peak, max(found.host, found.host_briefly)


def written_bytes(run_dir: Path) -> int:
    """Bytes of an earlier life of the run that the new one goes on from or replaces."""
    folders = [run_dir / name for name in ("checkpoints", "text", "distilled", "local")]
    return sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())


# --- what fits ----------------------------------------------------------------------------------------------------


def cheapest(job: Job, *, device_free: int, host_free: int) -> Iterator[Setting]:
    """Settings that fit and train the same, the fastest first by a rough rule; recorded signals only at the very end,
    since they need a pass of their own and are not quite the same loss."""
    candidates = sorted(_alternatives(job), key=lambda setting: (setting.teacher == "recorded", _cost(job, setting)))
    for setting in candidates:
        if fits(memory(job.student, job.teacher, setting), setting, device_free=device_free, host_free=host_free):
            yield setting


def _alternatives(job: Job) -> Iterator[Setting]:
    """The same rows per step and rank, split in other ways, with the same teacher, and other places for everything."""
    now = job.setting
    rows = now.rows * now.accumulation
    places: tuple[TeacherPlace, ...] = (now.teacher,)
    if now.teacher == "live":
        places = ("live", "offloaded", "recorded")
    for micro, checkpointing, stage, optimizer, parameters, teacher in itertools.product(
        [n for n in range(1, rows + 1) if rows % n == 0],
        (False, True),
        (0, 1, 2, 3),
        (False, True),
        (False, True),
        places,
    ):
        impossible = (optimizer and stage == 0) or (parameters and stage < 3) or (now.weight_bytes == 2 and stage == 0)
        impossible |= now.four_bits and stage == 3
        if impossible or (teacher == "offloaded" and stage == 3) or (now.device == "cpu" and (optimizer or parameters)):
            continue
        yield replace(
            now,
            rows=micro,
            accumulation=rows // micro,
            checkpointing=checkpointing,
            stage=stage,
            offload_optimizer=optimizer,
            offload_parameters=parameters,
            teacher=teacher,
        )


def _cost(job: Job, setting: Setting) -> float:
    """Time per token up to a factor."""
    same_teacher = (setting.teacher == "recorded") == (job.setting.teacher == "recorded")
    cost = flops_per_token(job.student, job.teacher, setting, shared=job.shared_layers > 0 and same_teacher)
    cost *= 1 + SHORT_ROWS / (setting.rows * setting.sequence_length)
    cost *= {0: 1.0, 3: SLOWER["stage 3"]}.get(setting.stage, SLOWER["stages 1, 2"])
    for name in ("offload_optimizer", "offload_parameters"):
        cost *= SLOWER[name] if getattr(setting, name) else 1
    return cost * (SLOWER["offloaded"] if setting.teacher == "offloaded" else 1)


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
        if not job.fixed_batch:
            lines.append(f"distill.trainer.gradient_accumulation_steps={setting.accumulation}")
    if now.checkpointing != setting.checkpointing:
        lines.append(f"distill.trainer.gradient_checkpointing={str(setting.checkpointing).lower()}")
    if now.teacher != setting.teacher:
        recorded = setting.teacher == "recorded"
        lines.append(
            "distill.teacher.recorded=FOLDER (after `shoal record`)" if recorded else "distill.teacher.offload=true"
        )
    return lines
