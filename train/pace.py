"""How long training will take: operations per token, and a short probe of the real objective where it fits."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from shoal.anatomy import text_config
from shoal.training import Distill

from .memory import ModelSize, Setting, built
from .student import Objective, SharedPrefix, Signals, final_hidden, to_logits
from .trainable import set_trainable

PROBE_BATCHES = 3
"""Micro-batches of a probe; the fastest counts, the first also brings the machine to work."""
PROBE_S = 15.0
"""After so many seconds no further one is begun."""
BACKWARD = 2
"""The backward pass multiplies once for the gradient of the input and once for that of the weight."""


@dataclass(frozen=True)
class Pace:
    """What a probe has measured on this machine, one rank."""

    tokens_per_s: float
    optimizer_s: float
    """One step of AdamW over everything that is trained."""
    loss: float
    """Of one token; of models with random weights, so it says only that the objective ran."""


def flops_per_token(student: ModelSize, teacher: ModelSize, setting: Setting, *, shared: bool) -> float:
    """Floating point operations of one token of one micro-batch: teacher, student, both directions.

    Two per weight and direction, and attention over the whole row, which packed rows compute in full and mask. Element
    by element work is left out, and so is the optimizer. ``shared``: where a teacher runs, it runs the frozen layers
    below the first cut for both.
    """
    length = setting.sequence_length
    total, teacher_runs = 0.0, setting.teacher in ("live", "offloaded")
    for layer in student.layers:
        forward = 2 * layer.matrices + student.pair_flops * length
        works = layer.kept.per_row > 0
        if works:
            backward = BACKWARD if layer.trained else 1
            total += forward * (1 + setting.checkpointing + backward)
        elif not (shared and teacher_runs):
            total += forward
    total += 2 * student.head * (2 + student.head_trained)
    if teacher_runs:
        total += sum(2 * layer.matrices + teacher.pair_flops * length for layer in teacher.layers) + 2 * teacher.head
    return total


def step_seconds(tokens: int, tokens_per_s: float, optimizer_s: float) -> float:
    """One optimizer step of ``tokens`` on one rank."""
    return tokens / tokens_per_s + optimizer_s


def probe(
    teacher_config: PreTrainedConfig,
    student_config: PreTrainedConfig,
    settings: Distill,
    setting: Setting,
    *,
    teacher_dtype: torch.dtype,
    first_change: int,
    attention: str,
    device: torch.device,
) -> Pace:
    """Run a few micro-batches of the real objective on random weights: how fast it is depends on their shapes alone.

    One rank, without DeepSpeed: what ranks send each other is not in it. Takes the memory that training takes at ZeRO
    stage 0.
    """
    torch.manual_seed(0)
    with torch.device(device):
        teacher = built(teacher_config, dtype=teacher_dtype, attention=attention).requires_grad_(False).eval()
        student = built(student_config, dtype=torch.float32, attention=attention).train()
    set_trainable(student, settings.trainable, first_change=first_change)
    if setting.checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    shares = settings.trainable == "from_first_cut" and first_change > 0
    prefix = SharedPrefix(student, teacher, first_change=first_change) if shares else None
    step = _objective(student, teacher, settings, prefix)
    batch = _batch(text_config(student_config).vocab_size, setting, device)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-6)
    fastest, loss, begun = math.inf, math.nan, _now(device)
    for number in range(PROBE_BATCHES):
        started = _now(device)
        if number and started - begun > PROBE_S:
            break
        with torch.autocast(device.type, torch.bfloat16, enabled=setting.autocast):
            total = step(batch)
        loss = total.item() / batch["input_ids"].numel()
        (total / batch["input_ids"].numel()).backward()
        fastest = min(fastest, _now(device) - started)
    optimizer.step()  # makes its moments
    started = _now(device)
    optimizer.step()
    return Pace(batch["input_ids"].numel() / fastest, _now(device) - started, loss)


def _objective(student: Any, teacher: Any, settings: Distill, prefix: SharedPrefix | None) -> Any:
    """Batch -> the loss sum of one micro-batch, as the trainer computes it."""
    Objective(student, to_logits(teacher), terms=settings.losses, chunk=settings.head_chunk).install()

    def step(batch: dict[str, Tensor]) -> Tensor:
        recording = contextlib.nullcontext() if prefix is None else prefix.recording()
        with torch.no_grad(), recording:
            hidden_BSD = final_hidden(teacher, batch["input_ids"], batch["position_ids"])
        replaying = contextlib.nullcontext() if prefix is None else prefix.replaying(torch.float32)
        with replaying:
            return student(**batch, signals=Signals(hidden_BSD))[0]

    return step


def _batch(vocabulary: int, setting: Setting, device: torch.device) -> dict[str, Tensor]:
    """Random tokens, two documents to a row: packed rows take another way through attention than whole ones."""
    shape = (setting.rows, setting.sequence_length)
    ids = torch.randint(0, vocabulary, shape, device=device)
    positions = torch.arange(setting.sequence_length, device=device) % max(2, setting.sequence_length // 2)
    return {"input_ids": ids, "position_ids": positions.repeat(setting.rows, 1), "labels": ids}


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
