"""A training run as far as its size goes: models, and all of the recipe that takes memory, time or disk."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from transformers import TrainingArguments

from shoal.recipe.losses import HiddenStates

from ..engine.arguments import DEFAULTS
from ..engine.fused import is_fused
from ..objective.activation_checkpointing import SELECTIVE
from ..objective.chunked_loss import compiles
from ..objective.layer_losses import layer_pairs
from ..student.sizes import ModelSize, student_size, teacher_size
from ..student.spec import TrainSpec
from ..teacher.wiring import make_trainable_alike
from .memory import BUCKET_ELEMENTS, Memory, Setting, memory
from .throughput import flops_per_token

CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")
"""The Trainer's names of checkpointing, today's first."""
MOMENTS = {"ademamix": 3, "lion": 1, "adagrad": 1, "rmsprop": 1, "adafactor": 0, "sgd": 0}
"""Moments of every weight, by the first word of an optimizer's name; the others have two, as AdamW."""
WIDTHS = {"_8bit": 1 + 4 / 256, "_4bit": 0.5 + 4 / 128}
"""Bytes of a moment with its share of the scale, by the end of an optimizer's name; 4 of all others."""
LOGIT_BYTES, COMPILED_LOGIT_BYTES = 28, 4
"""Bytes of a chunk's logit on a GPU beside the raw ones: log-softmax and softmax of both models in fp32, a term's
product and its gradient, and their sum; of a compiled loss one tensor in fp32. On a CPU these exist for a block that
fits its cache."""
FUSED_SHARE = 0.8
"""Share of what a layer keeps that is left with Liger's kernels, which keep three tensors of an MLP's width and not
four, and of a norm its input alone: 0.77 for a Llama layer by the formula in docs/scaling.md."""
COMPILED_SHARE = 0.72
"""The same of a compiled layer, which computes again what is cheap: counted on small layers of Llama and Qwen 3 it is
0.60 to 0.64 under autocast, 0.67 to 0.72 with bf16 weights."""


@dataclass(frozen=True)
class Job:
    """A training as far as its size goes."""

    spec: TrainSpec
    student: ModelSize
    teacher: ModelSize
    setting: Setting

    @property
    def memory(self) -> Memory:
        """Bytes that the recipe's setting takes."""
        return memory(self.student, self.teacher, self.setting)

    @property
    def flops_per_token(self) -> float:
        """Floating point operations of one token of a micro-batch."""
        return flops_per_token(self.student, self.teacher, self.setting, shared=self.spec.shared_layers > 0)


def job(spec: TrainSpec) -> Job:
    """The size of the training that ``spec`` describes, from configurations; no weight is read.

    Raises:
        UserError: a batch that its ranks cannot share, or kernels that cannot be had.
        RuntimeError: of torch, for a family that cannot be run without data.
    """
    teacher = teacher_size(spec.teacher.config, attention=spec.teacher.load.attention)
    setting, plan = _setting(spec, teacher), spec.plan
    student = student_size(
        spec.student.config,
        sequence_length=spec.settings.sequence_length,
        prepare=partial(make_trainable_alike, spec=spec),
        dtype=torch.float32 if setting.weight_bytes == 4 else torch.bfloat16,
        autocast=setting.autocast,
        attention=spec.student.load.attention,
        changed={*map(plan.keep.index, plan.reweighted), *plan.new_layers},
    )
    return Job(spec, student, teacher, setting)


def _setting(spec: TrainSpec, teacher: ModelSize) -> Setting:
    settings, deepspeed = spec.settings, spec.deepspeed
    zero, trainer = deepspeed.zero, DEFAULTS | settings.trainer
    rows, accumulation = spec.batch_split
    bucket, overlap = zero.get("reduce_bucket_size", BUCKET_ELEMENTS), zero.get("overlap_comm")
    on_cpu = spec.ranks.device.type == "cpu"
    fused = is_fused(settings.fused, spec.student.config.model_type, spec.ranks.device)
    compiled_loss = settings.compile and compiles(settings.losses)
    return Setting(
        rows=rows,
        sequence_length=settings.sequence_length,
        head_chunk=settings.head_chunk,
        accumulation=accumulation,
        checkpointing=bool(next((trainer[key] for key in CHECKPOINTING if trainer.get(key) is not None), False)),
        selective=any((trainer.get(f"{key}_kwargs") or {}).get(SELECTIVE) for key in CHECKPOINTING),
        stage=deepspeed.stage,
        ranks=spec.ranks.count,
        ranks_per_node=spec.ranks.per_node,
        optimizer_bytes=optimizer_bytes(spec),
        offload_optimizer=deepspeed.offloads("offload_optimizer"),
        offload_parameters=deepspeed.offloads("offload_param"),
        bucket=teacher.hidden**2 if bucket == "auto" else int(bucket),  # what transformers fills in
        overlap=deepspeed.stage == 3 if overlap is None else bool(overlap),
        weight_bytes=deepspeed.weight_dtype.itemsize,
        autocast=deepspeed.autocast_dtype is not None,
        teacher=spec.teacher_place,
        teacher_bytes=spec.teacher_dtype.itemsize,
        device=spec.ranks.device.type,
        # what frozen.py lets student and teacher hold once
        shares=spec.teacher_dtype in (deepspeed.weight_dtype, deepspeed.autocast_dtype),
        four_bits=settings.lora is not None and settings.lora.quantization == "nf4",
        compiled=settings.compile,
        kept_share=max(FUSED_SHARE * fused, COMPILED_SHARE * settings.compile) or 1,
        logit_bytes=COMPILED_LOGIT_BYTES if compiled_loss else 0 if on_cpu else LOGIT_BYTES,
        captured=_captured(spec, teacher),
        gathers=settings.watch is not None or (settings.on_policy is not None and settings.on_policy.share > 0),
        asked=_asked_share(spec),
    )


def optimizer_bytes(spec: TrainSpec) -> float:
    """Bytes of the moments of one trained weight, by the name of the optimizer: the DeepSpeed configuration's, else
    that of distill.trainer."""
    own = spec.settings.trainer.get("optim") or TrainingArguments.__dataclass_fields__["optim"].default
    named = str((spec.deepspeed.config.get("optimizer") or {}).get("type", own)).lower()
    width = next((width for end, width in WIDTHS.items() if named.endswith(end)), 4)
    return width * MOMENTS.get(named.removeprefix("paged_").split("_")[0], 2)


def _asked_share(spec: TrainSpec) -> float:
    """Of all rows the share of which the teacher is asked: those of some sources, all that have images, and in
    on-policy steps what the student writes."""
    settings, asked = spec.settings, spec.asked_sources
    if asked is None:
        return 1.0
    weights = [(source.weight, number in asked or source.has_images) for number, source in enumerate(settings.data)]
    of_text = sum(weight for weight, asks in weights if asks) / sum(weight for weight, _ in weights)
    sampled = 0.0 if settings.on_policy is None else settings.on_policy.share
    return sampled + (1 - sampled) * of_text


def _captured(spec: TrainSpec, teacher: ModelSize) -> int:
    """Bytes per token of what loss terms on states hold: each teacher's state once."""
    terms = [term for term in spec.settings.losses if isinstance(term, HiddenStates)]
    states = {target for term in terms for _, target in layer_pairs(term, spec.plan, num_shared=spec.frozen_layers)}
    return spec.teacher_dtype.itemsize * len(states) * teacher.hidden
