"""What a training will take, for a reader: memory by setting, time, disk, and the cheapest setting that fits."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

from shoal.artifacts.evaluation import CONTROL
from shoal.formatting import aligned, bytes_text, count_text, duration_text, paragraphs
from shoal.machine import disk_line
from shoal.progress import doing

from ..student.spec import TrainSpec
from .fit import Free, missing_bytes, overrides
from .memory import Job, Memory, job
from .throughput import StepTime, flops_per_token, step_time

TEACHERS = {
    "none": "not loaded (these losses do not use it)",
    "live": "live",
    "offloaded": "live, its weights on the host",
    "recorded": "recorded before, and not loaded",
}


class Estimate(NamedTuple):
    """What a training takes on this machine."""

    told: str
    seconds: float
    num_bytes: int
    """Bytes that are still to be written at the worst moment."""


def estimate(spec: TrainSpec, run_dir: Path, *, control: TrainSpec | None = None) -> Estimate:
    """What training will take: memory by ZeRO stage, time, disk, and the cheapest setting that fits.

    ``control`` is the training of the uncut teacher that comes after it; None = there is none.

    Raises:
        UserError: what the configuration contradicts; NotEstimated, a family whose memory cannot be told so.
    """
    with doing("estimating memory"):
        size = job(spec)
        uncut = None if control is None else job(control)
    free = Free.here(spec.ranks.device)
    step = step_time(size)
    seconds = spec.num_steps * step.seconds
    needed, beside = missing_bytes(size, run_dir), []
    if uncut is not None:
        times = flops_per_token(uncut) / flops_per_token(size)
        seconds *= 1 + times
        needed += missing_bytes(uncut, run_dir / CONTROL)
        beside = [
            f"control: after the student the teacher is trained on the same rows, {len(uncut.student.layers)} "
            f"layers, {count_text(uncut.student.trained)} weights trained: {times:.2f} times the student's time, "
            f"{uncut.memory.peak / 1e9:.2f} GB at the peak of a rank ({free.verdict(uncut)})"
        ]
    disk = [disk_line(needed, run_dir)]
    parts = [_about(size), _memory_table(size, free), _time(size, step), beside, disk, _proposal(size, free)]
    return Estimate(paragraphs(parts), seconds, needed)


def _about(job: Job) -> list[str]:
    spec, student, teacher, setting = job.spec, job.student, job.teacher, job.setting
    precision = str(spec.deepspeed.product_dtype).removeprefix("torch.")
    precision += f" {'autocast' if job.is_autocast else 'products'}"
    lines = [
        f"student: {len(student.layers)} layers, {count_text(student.parameters)} weights, "
        f"{count_text(student.trained)} of them trained; {job.width} bytes a weight, {precision}",
        f"teacher: {len(teacher.layers)} layers, {count_text(teacher.parameters)} weights, "
        f"{TEACHERS[setting.teacher]}, {spec.teacher_dtype.itemsize} bytes a weight",
        f"step:    {spec.ranks.count} rank(s) x {setting.accumulation} micro-batch(es) x {setting.rows} row(s) x "
        f"{spec.settings.sequence_length:,} tokens = {spec.tokens_per_step:,} tokens; {spec.num_steps:,} steps",
    ]
    if weights := job.shared_weights:
        lines.append(f"shared:  {count_text(weights)} frozen weights are stored once for both models")
    if shared := spec.shared_layers:
        how = "not run, the state above is recorded" if setting.teacher == "recorded" else "run once for both"
        lines.append(f"shared:  the lowest {shared} layer(s) are {how}")
    return lines


def _memory_table(job: Job, free: Free) -> list[str]:
    now = job.setting
    plain = replace(now, offload_optimizer=False, offload_parameters=False)
    rows = [(f"ZeRO {stage}", replace(plain, stage=stage)) for stage in (0, 1, 2, 3)]
    if not job.on_cpu:
        rows.append(("ZeRO 3, all on host", replace(plain, stage=3, offload_optimizer=True, offload_parameters=True)))
    rows.append(("this recipe", now))
    other = "without" if now.checkpointing else "with"
    rows.append((f"  {other} checkpointing", replace(now, checkpointing=not now.checkpointing)))
    if now.teacher == "live" and job.spec.is_recordable:
        rows.append(("  teacher recorded", replace(now, teacher="recorded")))
    columns = [field.name for field in fields(Memory)]
    cells: list[tuple[str, ...]] = [(f"memory of one rank, GB ({job.spec.ranks.count} in all)", *columns, "")]
    for title, setting in rows:
        row = replace(job, setting=setting)
        needed = row.memory
        cells.append((title, *(f"{getattr(needed, name) / 1e9:.2f}" for name in columns), free.verdict(row)))
    on_device = "" if job.on_cpu else f"{bytes_text(free.device)} on the device, "
    return [
        *aligned(cells, left=(0, len(cells[0]) - 1)),
        "the peak is less than the sum, because gradients grow while activations shrink; `host` is per node, "
        "`fixed` the process itself",
        f"free now: {on_device}{bytes_text(free.host)} on this node",
    ]


def _time(job: Job, step: StepTime) -> list[str]:
    spec, seconds = job.spec, step.seconds
    return [
        f"time: {spec.tokens_per_step / seconds:,.0f} tokens/s, {seconds:.3g} s a step, "
        f"{duration_text(spec.num_steps * seconds)} for {spec.num_steps * spec.tokens_per_step:,} tokens "
        f"({flops_per_token(job) / 1e9:.3g} GFLOP a token)",
        f"  {step.source}",
        f"  {step.left_out}recording, scoring, sampling and checkpoints are not counted",
    ]


def _proposal(job: Job, free: Free) -> list[str]:
    with doing("looking for the cheapest setting that fits"):
        setting = free.cheapest(job)
    if setting is None:
        return [
            "no setting fits with a margin of a tenth: use more ranks, shorter rows (distill.sequence_length), or "
            "distill.trainable: from_first_cut"
        ]
    if not (lines := overrides(job, setting)):
        return ["cheapest setting that fits: this recipe's"]
    peak = replace(job, setting=setting).memory.peak
    return [f"cheapest setting that fits ({bytes_text(peak)} at the peak):", *(f"  {line}" for line in lines)]
