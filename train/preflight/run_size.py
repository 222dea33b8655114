"""A training run as far as its size goes: models, and all of the recipe that takes memory, time or disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from shoal.recipe.losses import STATE_TERMS, HiddenStates

from ..engine.arguments import DEFAULTS
from ..engine.fused import is_fused
from ..generated.writing import wants_teacher_text
from ..objective.activation_checkpointing import SELECTIVE
from ..objective.chunked_loss import compiles
from ..objective.layer_losses import SCORES, layer_pairs
from ..student.sizes import ModelSize, student_size, teacher_size
from ..student.spec import TrainSpec
from ..student.trainable import gaps
from ..teacher.wiring import make_trainable_alike
from .memory import BUCKET_ELEMENTS, LIVE_ELEMENTS, Memory, Setting, Sharing, memory
from .optimizers import optimizer_state
from .throughput import flops_per_token

CHECKPOINTING_KEYS = ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
SCORED_ROWS = 16
"""Rows of a forward when the student is scored, at most: eval.batch_size unless it is set."""


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
    setting = _setting(spec, teacher)
    student = student_size(
        spec.student.config,
        sequence_length=spec.settings.sequence_length,
        prepare=partial(make_trainable_alike, spec=spec),
        dtype=torch.float32 if setting.weight_bytes == 4 else torch.bfloat16,
        autocast=setting.autocast,
        attention=spec.student.load.attention,
        changed=_not_the_teachers(spec),
    )
    return Job(spec, student, teacher, setting)


def _not_the_teachers(spec: TrainSpec) -> set[int]:
    """Layers of the student whose weights are others than the teacher's before they are trained, frozen or not."""
    plan = spec.plan
    return {*map(plan.keep.index, plan.changed_layers), *plan.new_layers}


def _setting(spec: TrainSpec, teacher: ModelSize) -> Setting:
    settings, deepspeed = spec.settings, spec.deepspeed
    zero, trainer = deepspeed.zero, DEFAULTS | settings.trainer
    rows, accumulation = spec.batch_split
    bucket, overlap = zero.get("reduce_bucket_size", BUCKET_ELEMENTS), zero.get("overlap_comm")
    live = zero.get("stage3_max_live_parameters", LIVE_ELEMENTS)
    setting = Setting(
        rows=rows,
        sequence_length=settings.sequence_length,
        head_chunk=settings.head_chunk,
        accumulation=accumulation,
        checkpointing=_checkpoints(trainer),
        selective=any((trainer.get(key) or {}).get(SELECTIVE) for key in CHECKPOINTING_KEYS),
        stage=deepspeed.stage,
        ranks=spec.ranks.count,
        ranks_per_node=spec.ranks.per_node,
        optimizer=optimizer_state(settings, deepspeed),
        offload_optimizer=deepspeed.offloads("offload_optimizer"),
        offload_parameters=deepspeed.offloads("offload_param"),
        bucket=teacher.hidden**2 if bucket == "auto" else int(bucket),  # what transformers fills in
        overlap=deepspeed.stage == 3 if overlap is None else bool(overlap),
        live=LIVE_ELEMENTS if live == "auto" else int(live),
        weight_bytes=deepspeed.weight_dtype.itemsize,
        gradient_bytes=deepspeed.gradients_dtype.itemsize,
        autocast=deepspeed.autocast_dtype is not None,
        teacher=spec.teacher_place,
        teacher_bytes=spec.teacher_dtype.itemsize,
        device=spec.ranks.device.type,
        sharing=_sharing(spec),
        four_bits=settings.lora is not None and settings.lora.quantization == "nf4",
        fused=is_fused(settings.fused, spec.student.config.model_type, spec.ranks.device),
        compiled=settings.compile,
        compiled_loss=settings.compile and compiles(settings.losses),
        stored_bytes=spec.student.stored_dtype.itemsize,
        writes=wants_teacher_text(settings.data) and settings.writing.backend == "transformers",
        asked=_asked_share(spec),
    )
    return _with_states(_with_company(setting, spec), spec, teacher)


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


def _checkpoints(trainer: Mapping[str, Any]) -> bool:
    """Whether the Trainer checkpoints, by its name of today or, where that is not said, of before."""
    said = trainer.get("activation_checkpointing")
    return bool(trainer.get("gradient_checkpointing") if said is None else said)


def _sharing(spec: TrainSpec) -> Sharing:
    """What frozen.py lets student and teacher hold once."""
    if spec.teacher_dtype == spec.deepspeed.weight_dtype:
        return "all"
    if spec.deepspeed.weight_dtype != torch.float32:
        return "none"
    return "linear" if spec.teacher_dtype == spec.deepspeed.autocast_dtype else "none"


def _with_company(setting: Setting, spec: TrainSpec) -> Setting:
    """What happens beside plain steps."""
    settings, plan = spec.settings, spec.plan
    watch, on_policy, local, length = settings.watch, settings.on_policy, settings.local, settings.sequence_length
    if watch is not None:
        windows = math.ceil(watch.perplexity_tokens / length)
        setting = replace(setting, scored_rows=SCORED_ROWS if watch.tasks else min(SCORED_ROWS, windows))
    if on_policy is not None and on_policy.share > 0:
        tokens = on_policy.prompt_tokens + on_policy.new_tokens
        # as many as fit into a row; of a conversation fewer and longer ones
        samples = max(1, length // tokens)
        setting = replace(setting, samples=samples, sample_tokens=tokens)
    if local is not None:
        layers = tuple(gap.layer for gap in gaps(plan.keep, plan.num_layers))
        setting = replace(setting, healed_layers=layers, healed_rows=min(local.rows_at_once, local.batch_size))
    return setting


def _with_states(setting: Setting, spec: TrainSpec, teacher: ModelSize) -> Setting:
    """What loss terms on states hold: each teacher's state once, and of both models what attention is computed from."""
    states: set[int] = set()
    attention: set[tuple[int, int]] = set()
    for term in spec.settings.losses:
        if isinstance(term, HiddenStates):
            states |= {target for _, target in layer_pairs(term, spec.plan, num_shared=spec.frozen_layers)}
        elif isinstance(term, STATE_TERMS):
            attention |= set(layer_pairs(term, spec.plan, num_shared=spec.frozen_layers))
    width = 2 if setting.teacher == "recorded" else setting.teacher_bytes
    numbers = teacher.pair_flops // 4 + 2 * teacher.key_numbers
    return replace(
        setting,
        captured=width * len(states) * teacher.hidden + (setting.teacher_bytes + 4) * len(attention) * numbers,
        # both states and their difference in fp32, and the gradient
        comparing=4 * 4 * teacher.hidden if states else 0,
        # scores, their logarithms and gradients, of both models
        relation=6 * 4 * SCORES if attention else 0,
    )
