"""`shoal distill --dry-run`: what training will take, for a reader. Nothing is written and nothing is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from shoal.artifacts.evaluation import CONTROL
from shoal.data.sources import source_names
from shoal.errors import UserError
from shoal.formatting import aligned, bytes_text
from shoal.machine import available_memory, device_memory, free_disk
from shoal.models.anatomy import text_config
from shoal.numerics import flops_per_second
from shoal.progress import doing

from .engine.arguments import kept_checkpoints, most_checkpoints
from .preflight.fit import cheapest, disk_bytes, fits, missing_bytes, overrides, shortages
from .preflight.memory import Setting, shared_weights
from .preflight.run_size import Job, job
from .preflight.throughput import PROBE_S, Pace, probe
from .student.spec import TrainSpec

ASSUMED_SHARE = 0.4
"""Share of the measured rate of matrix products that is assumed where the models are too large to be tried here."""
COLUMNS = ("weights", "gradients", "optimizer", "activations", "head", "teacher", "buffers", "fixed", "peak", "host")


@dataclass(frozen=True)
class Estimate:
    """What training will take."""

    text: str
    """All of it, for a reader."""
    num_tokens: int
    """Tokens of all steps of one of them."""
    seconds: float
    """Time of the steps, a control's included."""
    num_bytes: int
    """Bytes that are still to be written at the worst moment."""


class NotEstimated(UserError):
    """A family whose memory cannot be told without running it."""


def dry_run(spec: TrainSpec, run_dir: Path, *, control: TrainSpec | None = None, try_it: bool = True) -> str:
    """The text of `estimate`, which has the same arguments."""
    return estimate(spec, run_dir, control=control, try_it=try_it).text


def estimate(
    spec: TrainSpec,
    run_dir: Path,
    *,
    control: TrainSpec | None = None,
    try_it: bool = True,
    is_cut: bool = True,
) -> Estimate:
    """What training will take: memory by ZeRO stage, time, disk, and the cheapest setting that fits.

    ``control`` is the training of the uncut teacher that comes after it; None = there is none. ``try_it`` runs a few
    micro-batches of the real objective where one rank's models fit here; else, and where they do not, the time is
    worked out from operations and a measured matrix product. ``is_cut``: ``run_dir`` is of the cut
    of ``spec``, so that shares measured there hold.

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
    free = device_memory(spec.ranks.device), available_memory()
    pace = probe(spec, size.setting) if try_it and _can_be_tried(size, *free) else None
    time, seconds = _time(size, pace)
    disk, num_bytes = _disk(size, uncut, run_dir)
    parts: tuple[list[str], ...] = (
        ["dry run: nothing is written and nothing is trained"],
        _about(size),
        _data(spec),
        _memory_table(size, *free),
        _beside(size),
        time,
        [] if uncut is None else _control(size, uncut, *free),
        disk,
        _proposal(size, *free),
    )
    if uncut is not None:
        seconds *= 1 + uncut.flops_per_token / size.flops_per_token
    text = "\n\n".join("\n".join(part) for part in parts if part)
    return Estimate(text, spec.num_steps * spec.tokens_per_step, seconds, num_bytes)


def _can_be_tried(job: Job, device_free: int, host_free: int) -> bool:
    alone = replace(
        job.setting,
        stage=0,
        ranks=1,
        ranks_per_node=1,
        offload_optimizer=False,
        offload_parameters=False,
        teacher="live" if job.setting.teacher == "offloaded" else job.setting.teacher,
        sharing="none",
        four_bits=False,
        scored_rows=0,
        samples=0,
        healed_layers=(),
        writes=False,
    )
    return fits(replace(job, setting=alone), device_free=device_free, host_free=host_free)


def _about(job: Job) -> list[str]:
    student, teacher, setting = job.student, job.teacher, job.setting
    where = {
        "none": "not loaded, these losses do not ask it",
        "live": f"live, {setting.teacher_bytes} bytes a weight",
        "offloaded": f"live, its weights on the host, {setting.teacher_bytes} bytes each",
        "recorded": "recorded, not loaded",
    }
    product_dtype = str(job.spec.deepspeed.product_dtype).removeprefix("torch.")
    precision = f"{product_dtype} {'autocast' if setting.autocast else 'products'}"
    precision += ", Liger's kernels" * setting.fused + ", compiled layers" * setting.compiled
    return [
        f"student: {len(student.layers)} layers, {_millions(student.parameters)}, {_millions(student.trained)} of them "
        f"trained; {setting.weight_bytes} bytes a weight, {precision}",
        f"teacher: {len(teacher.layers)} layers, {_millions(teacher.parameters)}, {where[setting.teacher]}",
        f"step:    {setting.ranks} rank(s) x {setting.accumulation} micro-batch(es) x {setting.rows} row(s) x "
        f"{setting.sequence_length:,} tokens = {job.spec.tokens_per_step:,} tokens; {job.spec.num_steps:,} steps",
    ]


def _data(spec: TrainSpec) -> list[str]:
    """How the sources share the tokens."""
    data, num_tokens = spec.settings.data, spec.num_row_tokens
    total = sum(source.weight for source in data)
    shares = (
        f"{name} {source.weight / total:.1%} ({source.weight / total * num_tokens:,.0f} tokens)"
        for name, source in zip(source_names(data), data, strict=True)
    )
    return [f"data: {', '.join(shares)}, by the recipe's weights"]


def _rows(job: Job) -> list[tuple[str, Setting]]:
    """Settings worth a line of the table."""
    now = job.setting
    plain = replace(now, offload_optimizer=False, offload_parameters=False)
    rows = [(f"ZeRO {stage}", replace(plain, stage=stage)) for stage in (0, 1, 2, 3)]
    if now.device != "cpu":
        rows.append(("ZeRO 2, optimizer on host", replace(plain, stage=2, offload_optimizer=True)))
        everything = replace(plain, stage=3, offload_optimizer=True, offload_parameters=True)
        rows.append(("ZeRO 3, all on host", everything))
    rows.append(("this recipe", now))
    other = "without" if now.checkpointing else "with"
    rows.append((f"  {other} checkpointing", replace(now, checkpointing=not now.checkpointing)))
    if now.teacher == "live" and job.spec.is_recordable:
        rows.append(("  teacher recorded", replace(now, teacher="recorded")))
    return rows


def _memory_table(job: Job, device_free: int, host_free: int) -> list[str]:
    cells: list[tuple[str, ...]] = [(f"memory of one rank, GB ({job.setting.ranks} in all)", *COLUMNS, "")]
    for title, setting in _rows(job):
        row = replace(job, setting=setting)
        needed, verdict = row.memory, _verdict(row, device_free, host_free)
        cells.append((title, *(f"{getattr(needed, column) / 1e9:.2f}" for column in COLUMNS), verdict))
    on_device = "" if job.setting.device == "cpu" else f"{bytes_text(device_free)} on the device, "
    return [
        *aligned(cells, left=(0, len(cells[0]) - 1)),
        "the peak is no sum: gradients come as activations go; `host` is per node, `fixed` the process itself; where a "
        "verdict names something else than training, that is when the peak is",
        f"free now: {on_device}{bytes_text(host_free)} on this node",
    ]


def _verdict(job: Job, device_free: int, host_free: int) -> str:
    """Whether it fits, and when the peak is if not in training."""
    verdict, peak_at = "fits", job.memory.peak_at
    if not fits(job, device_free=device_free, host_free=host_free):
        verdict = "no" if shortages(job, device_free=device_free, host_free=host_free) else "close"
    return verdict if peak_at == "training" else f"{verdict}, {peak_at}"


def _control(job: Job, control: Job, device_free: int, host_free: int) -> list[str]:
    """What eval.control adds."""
    size, verdict = control.student, _verdict(control, device_free, host_free)
    return [
        f"control: after the student the uncut teacher is trained on the same rows, {len(size.layers)} layers, "
        f"{_millions(size.trained)} trained: {control.flops_per_token / job.flops_per_token:.2f} times the student's "
        f"time, {control.memory.peak / 1e9:.2f} GB at the peak of a rank ({verdict})",
    ]


def _beside(job: Job) -> list[str]:
    """What the table counts and does not show."""
    setting, student, notes = job.setting, job.student, []
    if weights := shared_weights(student, setting):
        notes.append(f"student and teacher hold {_millions(weights)} once, which are frozen")
    if shared := job.spec.shared_layers:
        how = "not run, the state above is recorded" if setting.teacher == "recorded" else "run once for both"
        which = "layer is" if shared == 1 else f"{shared} layers are"
        notes.append(f"the lowest {which} {how}")
    if setting.asked < 1 and setting.teacher != "none":
        notes.append(f"the teacher reads {setting.asked:.0%} of the rows, of sources that a loss term asks it about")
    if setting.four_bits:
        notes.append("frozen linear maps of the layers are held in 4 bits")
    whole = bytes_text(setting.weight_bytes * student.parameters)
    if setting.stage == 3 and (setting.scored_rows or setting.samples):
        keys = ["distill.watch"] * (setting.scored_rows > 0) + ["distill.on_policy"] * (setting.samples > 0)
        notes.append(f"{' and '.join(keys)}: ZeRO 3 gathers the whole student for that, {whole} on every rank")
    if setting.samples:
        notes.append(
            f"on-policy steps: {setting.rows * setting.samples} samples of {setting.sample_tokens:,} tokens are "
            "written at one time; their cache is counted, the time they take is not"
        )
    if setting.captured:
        held = bytes_text(setting.rows * setting.sequence_length * setting.captured)
        notes.append(f"loss terms on states hold {held} of a micro-batch")
    if setting.healed_layers:
        notes.append(
            "distill.local comes first: both models whole on every rank, and 16 bytes for each of "
            f"{_millions(sum(student.layers[layer].parameters for layer in setting.healed_layers))}"
        )
    if setting.writes:
        notes.append("teacher_text comes first: the teacher whole on every rank")
    return notes


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
        how = (
            f"measured here on {_tried(pace, setting)} of the real objective: {rate * flops / peak:.0%} of the "
            f"{peak / 1e12:.3g} TFLOP/s of a matrix product"
        )
    # ranks on one CPU share its cores, which a probe has had to itself
    step = spec.tokens_per_step // spec.ranks.machines / rate + optimizer_s
    num_tokens = spec.num_steps * spec.tokens_per_step
    lines = [
        f"time: {spec.tokens_per_step / step:,.0f} tokens/s, {step:.3g} s a step, "
        f"{_duration(spec.num_steps * step)} for {num_tokens:,} tokens ({flops / 1e9:.3g} GFLOP a token)",
        f"  {how}",
        "  communication between ranks, scoring, sampling, a local stage and checkpoints come on top",
    ]
    return lines, spec.num_steps * step


def _tried(pace: Pace, setting: Setting) -> str:
    """What the probe ran; a micro-batch that takes too long here is not tried whole."""
    whole = setting.rows * setting.sequence_length
    if pace.num_tokens == whole:
        return "micro-batches"
    return f"{pace.num_tokens:,} of the {whole:,} tokens of a micro-batch (a whole one takes over {PROBE_S:.0f} s)"


def _duration(seconds: float) -> str:
    """With three digits, in the largest unit that there is one of."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 3600 else f"{seconds / 3600:.3g} h"


def _disk(job: Job, control: Job | None, run_dir: Path) -> tuple[list[str], int]:
    """Lines on the disk, and the bytes that are still to be written."""
    folders, needed, free = disk_bytes(job), missing_bytes(job, run_dir), free_disk(run_dir)
    if control is not None:
        folders |= {f"{CONTROL}/{name}": size for name, size in disk_bytes(control).items()}
        needed += missing_bytes(control, run_dir / CONTROL)
    parts = ", ".join(f"{name}/ {bytes_text(size)}" for name, size in folders.items())
    verdict = "" if needed <= free else ": NOT ENOUGH, free some space or set run_dir to another disk"
    most, kept = most_checkpoints(job.spec.settings), kept_checkpoints(job.spec.settings)
    saved = f"{kept} checkpoints kept, one more while it is written" if most > kept else "a checkpoint if it is stopped"
    signals = bytes_text(disk_bytes(job, record=True)["signals"])
    recorded = f"  recorded signals of these tokens would take {signals} at k = 32{_state_at_cut(job)}"
    lines = [
        f"disk: {parts} ({saved}); {bytes_text(free)} free{verdict}",
        *([recorded] if job.setting.teacher != "none" and job.spec.is_recordable else []),
    ]
    return lines, needed


def _state_at_cut(job: Job) -> str:
    """What distill.teacher.prefix adds to recorded signals, where it could be set."""
    if not job.spec.shared_layers:
        return ""
    each = job.teacher.hidden * job.setting.teacher_bytes
    return (
        "; with distill.teacher.prefix, which spares both models their lowest layers, "
        f"{bytes_text(each * job.spec.num_row_tokens)} more ({each:,} bytes a token)"
    )


def _proposal(job: Job, device_free: int, host_free: int) -> list[str]:
    with doing("looking for the cheapest setting that fits"):
        setting = cheapest(job, device_free=device_free, host_free=host_free)
    if setting is None:
        return [
            "no setting fits with a margin of a tenth: more ranks, shorter rows (distill.sequence_length), a smaller "
            "distill.head_chunk, or distill.trainable: from_first_cut take less"
        ]
    lines = overrides(job, setting)
    if not lines:
        return ["cheapest setting that fits: this recipe's"]
    peak = replace(job, setting=setting).memory.peak
    return [f"cheapest setting that fits ({bytes_text(peak)} at the peak):", *(f"  {line}" for line in lines)]


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} billion weights" if count >= 1e9 else f"{count / 1e6:.1f} million weights"
