"""How long training will take: operations per token, and a short probe of the real objective where it fits."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from shoal.machine import flops_per_second, now
from shoal.models.anatomy import text_config
from shoal.progress import doing

from ..student.sizes import built
from ..teacher.wiring import Wiring, make_trainable_alike, wire
from .memory import Job

ASSUMED_SHARE, ON_CPU = 0.4, 0.48
"""Share of the measured rate of matrix products that is assumed before anything is tried; on a CPU what training and
scoring a model of 135 million weights had."""
FEWEST_TOKENS = 16
"""Tokens of the shortest row that is tried."""
PROBE_S = 15.0
"""Seconds that a run may be expected to take: of a longer micro-batch a piece stands for it."""


@dataclass(frozen=True)
class Pace:
    """What a probe has measured on this machine, one rank."""

    tokens_per_s: float
    """Tokens per second of forward and backward passes."""
    optimizer_s: float
    """Seconds of one step of AdamW over everything that is trained."""
    num_tokens: int
    """Tokens that were run at one time: a whole micro-batch, or what there was time for."""


def flops_per_token(job: Job) -> float:
    """Floating point operations of one token of a micro-batch: teacher, student, both directions.

    Two per weight and direction, and attention over the whole row, which packed rows compute in full and mask. Element
    by element work is left out, and so are the optimizer and that of some rows no term may ask the teacher. Its lowest
    frozen layers a student does not run if they are shared; a live teacher runs them for both.
    """
    student, teacher = job.student, job.teacher
    length = job.spec.settings.sequence_length
    is_shared, total = job.spec.shared_layers > 0, 0.0
    for layer in student.layers:
        forward = 2 * layer.matrices + student.pair_flops * length
        if layer.kept.per_row > 0:
            # the gradient of what attention reads takes twice its forward, whatever is trained
            backward = forward + student.pair_flops * length + 2 * layer.trained_matrices
            total += forward * (1 + job.setting.checkpointing) + backward
        elif not is_shared:
            total += forward
    total += 2 * student.head * (2 + student.head_trained)
    if job.setting.teacher in ("live", "offloaded"):
        total += sum(2 * layer.matrices + teacher.pair_flops * length for layer in teacher.layers) + 2 * teacher.head
    return total


def assumed_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a model that are assumed."""
    return flops_per_second(device, dtype) * (ON_CPU if device.type == "cpu" else ASSUMED_SHARE)


def expected_seconds(job: Job) -> float:
    """Seconds of a training, from operations alone."""
    spec = job.spec
    rate = assumed_rate(spec.ranks.device, spec.deepspeed.product_dtype) * spec.ranks.machines
    return spec.num_steps * spec.tokens_per_step * flops_per_token(job) / rate


def probe_bytes(job: Job) -> int:
    """Bytes that `probe` takes: whole models on one device, each with all of its weights, and AdamW's moments."""
    told, student = job.memory, job.student
    live = job.spec.teacher_dtype.itemsize * job.teacher.parameters * job.spec.runs_teacher
    return 4 * student.parameters + 12 * student.trained + live + told.activations + told.head + told.fixed


def probe(job: Job) -> Pace:
    """Run a micro-batch of the real objective on random weights twice: how fast it is depends on shapes alone.

    One rank, without DeepSpeed: what ranks send each other is not in it. Where a whole micro-batch would take longer
    than PROBE_S a piece of it stands for it: the time of a token then leaves out what attention takes more in longer
    rows.
    """
    torch.manual_seed(0)
    spec, live, device = job.spec, None, job.spec.ranks.device
    attention = spec.teacher.load.attention
    with doing("building models of random weights"), torch.device(device):
        student = built(spec.student.config, dtype=torch.float32, attention=attention).train()
        make_trainable_alike(student, spec)
        if spec.runs_teacher:
            live = built(spec.teacher.config, dtype=spec.teacher_dtype, attention=attention)
            live.requires_grad_(False).eval()
    if job.setting.checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    # to compile takes longer than what is timed here
    spec = replace(spec, settings=replace(spec.settings, trainer={**spec.settings.trainer, "torch_compile": False}))
    wiring = wire(spec, student, live)
    wiring.objective.install()
    try:
        seconds, tokens = _timed(job, wiring, student)
    finally:
        wiring.objective.uninstall()
    with doing("timing the optimizer"):
        optimizer = torch.optim.AdamW((p for p in student.parameters() if p.requires_grad), lr=1e-6)
        optimizer.step()  # makes its moments
        started = now(device)
        optimizer.step()
    return Pace(tokens / seconds, now(device) - started, tokens)


def _timed(job: Job, wiring: Wiring, student: PreTrainedModel) -> tuple[float, int]:
    """The seconds of the faster of two runs, of which the first brings the machine to work, and their tokens."""
    spec, device = job.spec, job.spec.ranks.device
    dtype = spec.deepspeed.product_dtype
    possible = int(PROBE_S * assumed_rate(device, dtype) / flops_per_token(job))
    length = min(spec.settings.sequence_length, max(FEWEST_TOKENS, possible))
    rows = max(1, min(job.setting.rows, possible // length))
    # two documents to a row: packed rows take another way through attention than whole ones
    ids = torch.randint(0, text_config(student.config).vocab_size, (rows, length), device=device)
    positions = torch.arange(length, device=device) % max(2, length // 2)
    batch: dict[str, Any] = {"input_ids": ids, "position_ids": positions.repeat(rows, 1), "labels": ids}
    best = math.inf
    for _ in range(2):
        with doing(f"timing {rows * length:,} tokens of the objective"):
            started = now(device)
            signals = wiring.teacher(batch)
            replaying = contextlib.nullcontext() if wiring.prefix is None else wiring.prefix.replaying(torch.float32)
            with replaying, torch.autocast(device.type, dtype, enabled=job.is_autocast):
                total = student(**batch, signals=signals)[0]
            (total / (rows * length)).backward()
            best = min(best, now(device) - started)
    return best, rows * length
