"""How long training will take: operations per token, and a short probe of the real objective where it fits."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from shoal.data.packing import SOURCES
from shoal.machine import flops_per_second, now
from shoal.models.anatomy import text_config
from shoal.progress import doing

from ..objective.host_batch import ON_HOST, on_host
from ..objective.objective import Signals
from ..student.sizes import ModelSize, built
from ..student.spec import TrainSpec
from ..teacher.wiring import Wiring, make_trainable_alike, wire
from .memory import Setting

ASSUMED_SHARE = 0.4
"""Share of the measured rate of matrix products that is assumed before anything is tried."""
FIRST_TOKENS = 16
"""Tokens of the first run, which brings the machine to work and foretells nothing."""
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


def flops_per_token(student: ModelSize, teacher: ModelSize, setting: Setting, *, shared: bool) -> float:
    """Floating point operations of one token of one micro-batch: teacher, student, both directions.

    Two per weight and direction, and attention over the whole row, which packed rows compute in full and mask. Element
    by element work is left out, and so is the optimizer. ``shared``: the student does not run its lowest frozen
    layers; a live teacher runs them for both.
    """
    length = setting.sequence_length
    total, teacher_runs = 0.0, setting.teacher in ("live", "offloaded")
    for layer in student.layers:
        forward = 2 * layer.matrices + student.pair_flops * length
        works = layer.kept.per_row > 0
        if works:  # the gradient of what attention reads takes twice its forward, whatever is trained
            backward = forward + student.pair_flops * length + 2 * layer.trained_matrices
            total += forward * (1 + (setting.checkpointing and not setting.selective)) + backward
        elif not shared:
            total += forward
    total += 2 * student.head * (2 + student.head_trained)
    if teacher_runs:
        layers = [2 * layer.matrices + teacher.pair_flops * length for layer in teacher.layers]
        for_both = sum(layer.kept.per_row == 0 for layer in student.layers) if shared else 0
        total += sum(layers[:for_both]) + setting.asked * (sum(layers[for_both:]) + 2 * teacher.head)
    return total


def most_tokens_per_s(spec: TrainSpec, flops: float | None) -> float | None:
    """Tokens per second of all ranks if every one of the ``flops`` operations of a token were as fast as a matrix
    product; None where these could not be counted."""
    if flops is None:
        return None
    return spec.ranks.machines * flops_per_second(spec.ranks.device, spec.deepspeed.product_dtype) / flops


def probe(spec: TrainSpec, setting: Setting, *, flops: float) -> Pace:
    """Run a micro-batch of the real objective on random weights twice: how fast it is depends on shapes alone.

    One rank, without DeepSpeed: what ranks send each other is not in it. Takes the memory that training takes at ZeRO
    stage 0. Where a whole micro-batch would take longer than PROBE_S, told by ``flops`` of a token, a piece of it
    stands for it: the time of a token then leaves out what attention takes more in longer rows.
    """
    torch.manual_seed(0)
    live, attention, device = None, spec.teacher.load.attention, spec.ranks.device
    with doing("building models of random weights"), torch.device(device):
        student = built(spec.student.config, dtype=torch.float32, attention=attention).train()
        make_trainable_alike(student, spec)
        if spec.runs_teacher:
            live = built(spec.teacher.config, dtype=spec.teacher_dtype, attention=attention)
            live.requires_grad_(False).eval()
    if setting.checkpointing and not setting.selective:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    # to compile takes longer than what is timed here
    spec = replace(spec, settings=replace(spec.settings, compile=False))
    wiring = wire(spec, student, live, lambda _states, _prefix: lambda _batch: Signals())
    wiring.objective.install()
    try:
        seconds, tokens = _timed(spec, setting, wiring, student, flops=flops)
    finally:
        wiring.objective.uninstall()
    with doing("timing the optimizer"):
        optimizer = torch.optim.AdamW((p for p in student.parameters() if p.requires_grad), lr=1e-6)
        optimizer.step()  # makes its moments
        started = now(device)
        optimizer.step()
    return Pace(tokens / seconds, now(device) - started, tokens)


def _timed(
    spec: TrainSpec, setting: Setting, wiring: Wiring, student: PreTrainedModel, *, flops: float
) -> tuple[float, int]:
    """The seconds of the faster of two runs, and their tokens."""
    device, dtype = spec.ranks.device, spec.deepspeed.product_dtype
    possible = int(PROBE_S * ASSUMED_SHARE * flops_per_second(device, dtype) / flops)
    length = min(setting.sequence_length, max(FIRST_TOKENS, possible))
    piece = replace(setting, rows=max(1, min(setting.rows, possible // length)), sequence_length=length)
    first = replace(piece, rows=1, sequence_length=min(FIRST_TOKENS, length))
    best = math.inf
    for size in (first, piece, piece):
        batch, tokens = _batch(spec, size, student), size.rows * size.sequence_length
        with doing(f"timing {tokens:,} tokens of the objective"):
            started = now(device)
            signals = wiring.teacher(batch)
            replaying = contextlib.nullcontext() if wiring.prefix is None else wiring.prefix.replaying(torch.float32)
            with replaying, torch.autocast(device.type, dtype, enabled=setting.autocast):
                total = student(**batch, signals=signals)[0]
            (total / tokens).backward()
            best = math.inf if size is first else min(best, now(device) - started)
    return best, piece.rows * piece.sequence_length


def _batch(spec: TrainSpec, setting: Setting, student: PreTrainedModel) -> dict[str, Any]:
    """Random tokens, two documents to a row: packed rows take another way through attention than whole ones. As many
    rows as a micro-batch has on average, rounded up, are of a source that the teacher is asked about."""
    shape, device = (setting.rows, setting.sequence_length), spec.ranks.device
    ids = torch.randint(0, text_config(student.config).vocab_size, shape, device=device)
    positions = torch.arange(setting.sequence_length, device=device) % max(2, setting.sequence_length // 2)
    batch = {"input_ids": ids, "position_ids": positions.repeat(setting.rows, 1), "labels": ids}
    if (asked := spec.asked_sources) is None:
        return batch
    others = {*range(len(spec.settings.data))} - asked
    sources_BS = torch.full(shape, min(others, default=0))
    if asked:
        sources_BS[: math.ceil(setting.asked * setting.rows)] = min(asked)
    return {**batch, ON_HOST: on_host({**batch, SOURCES: sources_BS})}
