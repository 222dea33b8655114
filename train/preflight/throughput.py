"""How long training will take: operations per token over what the device does of them in a second."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from shoal.machine import data_sheet, fast_dtype, flops_per_second, num_cores
from shoal.runtime import device

from .memory import Job

ASSUMED_SHARE = 0.4
"""Share of the measured rate of matrix products that is assumed without a data sheet."""
CORE_RATE = 2e11
"""Operations with weights per second of a core if products took no time: what is left is element by element, and bound
by memory. Measured in training and scoring a model of 135 million weights, alike with AVX2, AVX-512 and AMX."""
PRODUCT_SHARE, MEMORY_SHARE, LINK_SHARE = 0.6, 0.79, 0.8
"""Shares of a data sheet's rates that large products, element-wise kernels and collectives reach."""
ATTENTION_SHARES = {"flash": (0.35, 0.3), "sdpa": (0.1, 0.06), "eager": (0.05, 0.04)}
"""Shares of the rate of products, forward and backward; flash kernels compute half of the pairs."""
STREAM_BYTES, LOGIT_BYTES, CAST_BYTES, STEP_BYTES = 68, 100, 18, 32
"""Bytes read and written by norms, rotary embedding, sums and casts for a byte of hidden states that a layer and pass
read; by the loss for a logit; by casts under autocast, and by AdamW, for a trained weight."""
FUSED = 0.55
"""Share of the first of these with Liger's kernels or compiled layers."""
NODE_LINK = 50e9
"""Bytes per second between nodes: one card of 400 Gb/s a node."""


def flops_per_token(job: Job) -> float:
    """Floating point operations of one token of a micro-batch."""
    return sum(_work(job)[:3])


def mfu_per_rate(job: Job) -> float | None:
    """Share of what all GPUs of the job could compute by their data sheet that a token per second is: operations of
    teacher and student, without what checkpointing computes again. None without a data sheet."""
    if (sheet := data_sheet(job.spec.ranks.device)) is None:
        return None
    once = replace(job, setting=replace(job.setting, checkpointing=False))
    return flops_per_token(once) / (sheet.half * job.spec.ranks.count)


def _work(job: Job) -> tuple[float, float, float, float]:
    """What one token of a micro-batch takes in teacher and student: floating point operations with weights, of
    attention, of its gradients, and bytes of hidden states that layers read, once a pass.

    Two per weight and direction, and attention over the whole row, which packed rows compute in full and mask. The
    optimizer is left out, and so is the work of some rows no term may ask the teacher. Its lowest frozen layers a
    student does not run if they are shared; a live teacher runs them for both.
    """
    student, teacher = job.student, job.teacher
    length = job.spec.settings.sequence_length
    is_shared, state = job.spec.shared_layers > 0, student.hidden * student.state_bytes
    pairs, products = student.pair_flops * length, 2.0 * student.head * (2 + student.head_trained)
    forward = backward = states = 0.0
    for layer in student.layers:
        if is_trained := layer.kept.per_row > 0:
            products += 2 * (layer.matrices + layer.trained_matrices)
            backward += 2 * pairs  # the gradient of what attention reads takes twice its forward, whatever is trained
            states += 2 * state
        if is_trained or not is_shared:
            times = 1 + job.setting.checkpointing * is_trained
            products += times * 2 * layer.matrices
            forward += times * pairs
            states += times * state
    if job.setting.teacher in ("live", "offloaded"):
        products += 2 * (sum(layer.matrices for layer in teacher.layers) + teacher.head)
        forward += len(teacher.layers) * teacher.pair_flops * length
        states += len(teacher.layers) * teacher.hidden * job.spec.teacher_dtype.itemsize
    return products, forward, backward, states


def expected(job: Job) -> tuple[float, str] | None:
    """Seconds of an optimizer step by a model of products, attention, element-wise traffic and the network, and what
    they are made of in words; None for a device without a data sheet, or products in float32."""
    spec, setting, student = job.spec, job.setting, job.student
    sheet, (products, forward, backward, states) = data_sheet(spec.ranks.device), _work(job)
    if sheet is None or spec.deepspeed.product_dtype == torch.float32:
        return None
    tokens, memory = setting.rows * spec.settings.sequence_length, MEMORY_SHARE * sheet.memory
    attention = spec.student.load.attention
    rates = [share * sheet.half for share in ATTENTION_SHARES[attention]]
    is_fused = any(spec.settings.trainer.get(key) for key in ("use_liger_kernel", "torch_compile"))
    seen = 0.5 if attention == "flash" else 1.0
    parts = {
        "products": tokens * products / (PRODUCT_SHARE * sheet.half),
        "attention": tokens * seen * (forward / rates[0] + backward / rates[1]),
        "element by element": tokens * STREAM_BYTES * (FUSED if is_fused else 1) * states / memory,
        "loss": tokens * LOGIT_BYTES * student.vocabulary / memory,
        "casts": CAST_BYTES * job.is_autocast * student.trained / memory,
    }
    each, once = _sent(job)
    is_one_node = spec.ranks.count <= spec.ranks.per_node
    link = LINK_SHARE * (sheet.link if is_one_node else min(sheet.link, NODE_LINK))
    shards = spec.ranks.count if setting.stage else 1
    stepped = STEP_BYTES * student.trained / shards / memory + once / link
    told = ", ".join(f"{name} {seconds:.2g}" for name, seconds in parts.items())
    return setting.accumulation * max(sum(parts.values()), each / link) + stepped, (
        f"computed from {sheet.name}'s data sheet ({sheet.half / 1000000000000.0:,.0f} TFLOP/s, "
        f"{sheet.memory / 1000000000000.0:.3g} TB/s), not measured: a micro-batch takes {sum(parts.values()):.3g} s "
        f"({told}) and {each / link:.2g} s on the network"
    )


def _sent(job: Job) -> tuple[float, float]:
    """Bytes that a rank, or a node's network card, sends for a micro-batch and once more for an optimizer step."""
    trained, stage, width = job.student.trained, job.setting.stage, 2 if job.is_autocast else job.width
    if job.spec.ranks.count == 1:
        return 0.0, 0.0
    if stage < 2:
        return 0.0, 2.0 * width * trained + (job.width * trained if stage else 0)
    if stage == 2:
        return float(width * trained), float(job.width * trained)
    live = job.spec.teacher_dtype.itemsize * job.teacher.parameters * (job.setting.teacher == "live")
    return float(width * (2 * job.student.parameters + trained) + live), 0.0


def assumed_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a model that are assumed."""
    products = flops_per_second(device, dtype)
    if device.type != "cpu":
        return ASSUMED_SHARE * products
    return 1 / (1 / products + 1 / (CORE_RATE * num_cores()))


def machine_rate(ranks: int) -> float:
    """Operations per second of a training that are assumed of all ``ranks``, which share the cores of a CPU."""
    here = device()
    return assumed_rate(here, getattr(torch, fast_dtype(here).dtype)) * (1 if here.type == "cpu" else ranks)


class StepTime(NamedTuple):
    """How long an optimizer step of all ranks takes."""

    seconds: float
    source: str
    """What that comes of, in words."""
    left_out: str
    """What it is without, the beginning of a list."""


def step_time(job: Job) -> StepTime:
    """By the device's data sheet, else by an assumed share of the rate of matrix products. Nothing is tried, so that a
    busy machine comes to the same."""
    spec, flops = job.spec, flops_per_token(job)
    if told := expected(job):
        return StepTime(*told, "what moves to the host and back, " if job.setting.offload_optimizer else "")
    device, dtype = spec.ranks.device, spec.deepspeed.product_dtype
    peak, assumed = flops_per_second(device, dtype), assumed_rate(device, dtype)
    measure = "its data sheet" if data_sheet(device) else "a matrix product measured here"
    source = f"assuming {assumed / peak:.0%} of {peak / 1e12:.3g} TFLOP/s of {measure}"
    seconds = spec.tokens_per_step // spec.ranks.machines * flops / assumed
    return StepTime(seconds, source, "communication between ranks, ")
