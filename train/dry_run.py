"""`shoal distill --dry-run`: what training will take, for a reader. Nothing is written and nothing is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from shoal.artifacts.evaluation import CONTROL
from shoal.data.sources import source_names
from shoal.errors import UserError
from shoal.formatting import aligned, bytes_text, count_text, duration_text
from shoal.machine import available_memory, device_memory, flops_per_second, free_disk
from shoal.models.anatomy import text_config
from shoal.progress import doing

from .preflight.fit import cheapest, disk_bytes, fits, missing_bytes, overrides, shortages
from .preflight.memory import Setting, shared_weights
from .preflight.run_size import Job, job
from .preflight.throughput import ASSUMED_SHARE, Pace, probe
from .student.spec import TrainSpec

COLUMNS = ("weights", "gradients", "optimizer", "activations", "head", "teacher", "buffers", "fixed", "peak", "host")
WHERE = {
    "none": "not loaded, these losses do not ask it",
    "live": "live",
    "offloaded": "live, its weights on the host",
    "recorded": "recorded, not loaded",
}


@dataclass(frozen=True)
class Estimate:
    """What training will take."""

    text: str
    """All of it, for a reader."""
    seconds: float
    """Time of the steps, a control's included."""
    num_bytes: int
    """Bytes that are still to be written at the worst moment."""


class NotEstimated(UserError):
    """A family whose memory cannot be told without running it."""


@dataclass(frozen=True)
class Free:
    """Bytes that there are."""

    device: int
    host: int

    def verdict(self, job: Job) -> str:
        """Whether ``job`` fits."""
        if fits(job, device_free=self.device, host_free=self.host):
            return "fits"
        return "no" if shortages(job, device_free=self.device, host_free=self.host) else "close"


def estimate(spec: TrainSpec, run_dir: Path, *, control: TrainSpec | None = None, try_it: bool = True) -> Estimate:
    """What training will take: memory by ZeRO stage, time, disk, and the cheapest setting that fits.

    ``control`` is the training of the uncut teacher that comes after it; None = there is none. ``try_it`` runs a
    micro-batch of the real objective where one rank's models fit here; else, and where they do not, the time is
    worked out from operations and a measured matrix product.

    Raises:
        UserError: what the configuration contradicts; NotEstimated, a family whose memory cannot be told so.
    """
    try:
        with doing("working out memory"):
            size = job(spec)
            uncut = None if control is None else job(control)
    except RuntimeError as error:  # torch's, of operations that need numbers
        reason = str(error).strip().splitlines()[0][:120]
        raise NotEstimated(
            f"{text_config(spec.student.config).model_type}: cannot be run without data, so its memory cannot be told "
            f"beforehand ({reason}); try a few steps with distill.trainer.max_steps"
        ) from error
    free = Free(device_memory(spec.ranks.device), available_memory())
    pace = probe(spec, size.setting, flops=size.flops_per_token) if try_it and _can_be_tried(size, free) else None
    time, seconds = _time(size, pace)
    disk, num_bytes = _disk(size, uncut, run_dir)
    parts = [
        ["dry run: nothing is written and nothing is trained"],
        _about(size),
        _memory_table(size, free),
        time,
        [] if uncut is None else _control(size, uncut, free),
        disk,
        _proposal(size, free),
    ]
    if uncut is not None:
        seconds *= 1 + uncut.flops_per_token / size.flops_per_token
    return Estimate("\n\n".join("\n".join(part) for part in parts if part), seconds, num_bytes)


def _can_be_tried(job: Job, free: Free) -> bool:
    """Whether one rank's models fit here, whole and on one device."""
    if job.setting.teacher == "recorded":
        return False
    alone = replace(
        job.setting,
        stage=0,
        ranks=1,
        ranks_per_node=1,
        offload_optimizer=False,
        offload_parameters=False,
        teacher="live" if job.setting.teacher == "offloaded" else job.setting.teacher,
        shares=False,
        four_bits=False,
    )
    return free.verdict(replace(job, setting=alone)) == "fits"


def _about(job: Job) -> list[str]:
    spec, student, teacher, setting = job.spec, job.student, job.teacher, job.setting
    precision = str(spec.deepspeed.product_dtype).removeprefix("torch.")
    precision += f" {'autocast' if setting.autocast else 'products'}"
    settings, weights = spec.settings, [source.weight for source in spec.settings.data]
    total, tokens = sum(weights), spec.num_row_tokens
    shares = (
        f"{name} {weight / total:.1%} ({weight / total * tokens:,.0f} tokens)"
        for name, weight in zip(source_names(settings.data), weights, strict=True)
    )
    lines = [
        f"student: {len(student.layers)} layers, {count_text(student.parameters)} weights, "
        f"{count_text(student.trained)} of them trained; {setting.weight_bytes} bytes a weight, {precision}",
        f"teacher: {len(teacher.layers)} layers, {count_text(teacher.parameters)} weights, {WHERE[setting.teacher]}, "
        f"{setting.teacher_bytes} bytes a weight",
        f"step:    {setting.ranks} rank(s) x {setting.accumulation} micro-batch(es) x {setting.rows} row(s) x "
        f"{setting.sequence_length:,} tokens = {spec.tokens_per_step:,} tokens; {spec.num_steps:,} steps",
        f"data:    {', '.join(shares)}",
    ]
    if weights := shared_weights(student, setting):
        lines.append(f"shared:  {count_text(weights)} frozen weights are held once for both models")
    if shared := spec.shared_layers:
        how = "not run, the state above is recorded" if setting.teacher == "recorded" else "run once for both"
        lines.append(f"shared:  the lowest {shared} layer(s) are {how}")
    if setting.asked < 1 and setting.teacher != "none":
        lines.append(
            f"asked:   the teacher reads {setting.asked:.0%} of the rows, of sources that a loss asks it about"
        )
    return lines


def _memory_table(job: Job, free: Free) -> list[str]:
    now = job.setting
    plain = replace(now, offload_optimizer=False, offload_parameters=False)
    rows = [(f"ZeRO {stage}", replace(plain, stage=stage)) for stage in (0, 1, 2, 3)]
    if now.device != "cpu":
        everything = replace(plain, stage=3, offload_optimizer=True, offload_parameters=True)
        rows.append(("ZeRO 3, all on host", everything))
    rows.append(("this recipe", now))
    other = "without" if now.checkpointing else "with"
    rows.append((f"  {other} checkpointing", replace(now, checkpointing=not now.checkpointing)))
    if now.teacher == "live" and job.spec.is_recordable:
        rows.append(("  teacher recorded", replace(now, teacher="recorded")))
    cells: list[tuple[str, ...]] = [(f"memory of one rank, GB ({now.ranks} in all)", *COLUMNS, "")]
    for title, setting in rows:
        row = replace(job, setting=setting)
        needed = row.memory
        cells.append((title, *(f"{getattr(needed, column) / 1e9:.2f}" for column in COLUMNS), free.verdict(row)))
    on_device = "" if now.device == "cpu" else f"{bytes_text(free.device)} on the device, "
    return [
        *aligned(cells, left=(0, len(cells[0]) - 1)),
        "the peak is no sum: gradients come as activations go; `host` is per node, `fixed` the process itself",
        f"free now: {on_device}{bytes_text(free.host)} on this node",
    ]


def _control(job: Job, control: Job, free: Free) -> list[str]:
    """What eval.control adds."""
    size = control.student
    return [
        f"control: after the student the uncut teacher is trained on the same rows, {len(size.layers)} layers, "
        f"{count_text(size.trained)} weights trained: {control.flops_per_token / job.flops_per_token:.2f} times the "
        f"student's time, {control.memory.peak / 1e9:.2f} GB at the peak of a rank ({free.verdict(control)})",
    ]


def _time(job: Job, pace: Pace | None) -> tuple[list[str], float]:
    """Lines on the time of all steps, and its seconds."""
    setting, spec, flops = job.setting, job.spec, job.flops_per_token
    with doing("timing a matrix product"):
        peak = flops_per_second(spec.ranks.device, spec.deepspeed.product_dtype)
    if pace is None:
        rate, optimizer_s = ASSUMED_SHARE * peak / flops, 0.0
        how = f"assuming {ASSUMED_SHARE:.0%} of the {peak / 1e12:.3g} TFLOP/s of a matrix product measured here"
    else:
        rate, optimizer_s = pace.tokens_per_s, pace.optimizer_s
        whole = setting.rows * setting.sequence_length
        how = (
            f"measured here on {pace.num_tokens:,} of the {whole:,} tokens of a micro-batch of the real objective: "
            f"{rate * flops / peak:.0%} of the {peak / 1e12:.3g} TFLOP/s of a matrix product"
        )
    # ranks on one CPU share its cores, which a probe has had to itself
    step = spec.tokens_per_step // spec.ranks.machines / rate + optimizer_s
    lines = [
        f"time: {spec.tokens_per_step / step:,.0f} tokens/s, {step:.3g} s a step, "
        f"{duration_text(spec.num_steps * step)} for {spec.num_steps * spec.tokens_per_step:,} tokens "
        f"({flops / 1e9:.3g} GFLOP a token)",
        f"  {how}",
        "  communication between ranks, scoring, sampling and checkpoints come on top",
    ]
    return lines, spec.num_steps * step


def _disk(job: Job, control: Job | None, run_dir: Path) -> tuple[list[str], int]:
    """Lines on the disk, and the bytes that are still to be written."""
    folders, needed, free = disk_bytes(job), missing_bytes(job, run_dir), free_disk(run_dir)
    if control is not None:
        folders |= {f"{CONTROL}/{name}": size for name, size in disk_bytes(control).items()}
        needed += missing_bytes(control, run_dir / CONTROL)
    parts = ", ".join(f"{name}/ {bytes_text(size)}" for name, size in folders.items())
    verdict = "" if needed <= free else ": NOT ENOUGH, free some space or set run_dir to another disk"
    lines = [f"disk: {parts} at the worst moment; {bytes_text(free)} free{verdict}"]
    if job.setting.teacher != "none" and job.spec.is_recordable:
        signals = bytes_text(disk_bytes(job, record=True)["signals"])
        lines.append(f"  recorded signals of these tokens would take {signals} at k = 32")
    if job.setting.teacher != "none" and job.spec.is_recordable and job.spec.shared_layers:
        state = bytes_text(job.teacher.hidden * job.setting.teacher_bytes * job.spec.num_row_tokens)
        lines.append(f"  with distill.teacher.prefix, which spares both models their lowest layers, {state} more")
    return lines, needed


def _proposal(job: Job, free: Free) -> list[str]:
    with doing("looking for the cheapest setting that fits"):
        setting: Setting | None = cheapest(job, device_free=free.device, host_free=free.host)
    if setting is None:
        return [
            "no setting fits with a margin of a tenth: more ranks, shorter rows (distill.sequence_length), a smaller "
            "distill.head_chunk, or distill.trainable: from_first_cut take less"
        ]
    if not (lines := overrides(job, setting)):
        return ["cheapest setting that fits: this recipe's"]
    peak = replace(job, setting=setting).memory.peak
    return [f"cheapest setting that fits ({bytes_text(peak)} at the peak):", *(f"  {line}" for line in lines)]
