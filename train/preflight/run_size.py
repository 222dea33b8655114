"""A training run as far as its size goes: models, and all of the recipe that takes memory, time or disk."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedConfig

from shoal.artifacts.artifact import PruningPlan
from shoal.models.load import text_config
from shoal.recipe.distill import Distill
from shoal.recipe.edits import edited_layers
from shoal.recipe.losses import STATE_TERMS, HiddenStates, needs_teacher

from ..engine.arguments import DEFAULTS, autocast_dtype, batch_split, deepspeed_config, product_dtype
from ..generated.writing import wants_teacher_text
from ..objective.activation_checkpointing import SELECTIVE
from ..objective.layer_losses import SCORES, layer_pairs
from ..student.local_stage import gaps, recorded_layers, unhealed
from ..student.sizes import ModelSize, loaded_dtype, student_size, teacher_size
from ..student.trainable import keys_from, shares_prefix, trained_parts
from .memory import BUCKET_ELEMENTS, LIVE_ELEMENTS, Memory, Setting, Sharing, TeacherPlace, memory
from .throughput import make_trainable

CHECKPOINTING_KEYS = ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
SCORED_ROWS = 16
"""Of a forward when the student is scored, at most: eval.batch_size unless it is set."""


@dataclass(frozen=True)
class Job:
    """A training run, as far as its size goes."""

    student: ModelSize
    teacher: ModelSize
    setting: Setting
    num_tokens: int
    kept_checkpoints: int
    keeps_best: bool
    """distill.watch.best: the best student lies beside the checkpoints."""
    shared_layers: int
    """Frozen layers at the bottom that a live teacher runs for both, or that nobody runs: their state is recorded."""
    fixed_batch: bool
    """distill.batch_size: accumulation follows from it."""
    product_dtype: torch.dtype = torch.float32
    """What most matrix products are computed in."""

    @property
    def tokens_per_step(self) -> int:
        """Over all ranks."""
        setting = self.setting
        return setting.ranks * setting.rows * setting.accumulation * setting.sequence_length

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the budget."""
        return math.ceil(self.num_tokens / self.tokens_per_step)

    @property
    def memory(self) -> Memory:
        """Of this setting."""
        return memory(self.student, self.teacher, self.setting)


def job(
    teacher_config: PreTrainedConfig,
    student_config: PreTrainedConfig,
    plan: PruningPlan,
    settings: Distill,
    *,
    dtype: str,
    attention: str,
    ranks: int,
    ranks_per_node: int,
    device: torch.device,
) -> Job:
    """The size of the run that ``settings`` describe, from configurations; no weight is read.

    Raises:
        UserError: what ``settings`` ask of ``plan`` and it does not have.
        RuntimeError: of torch, for a family that cannot be run without data.
    """
    text = text_config(student_config)
    tied = bool(getattr(text, "tie_word_embeddings", False))
    parts = trained_parts(settings.trainable, plan, tied=tied, keys_from=keys_from(text))
    frozen = shares_prefix(parts, plan)
    if settings.teacher.prefix:
        shared = recorded_layers(parts, plan, settings)
    else:
        runs = settings.teacher.recorded is None and needs_teacher(settings.losses)
        shared = unhealed(frozen, plan, settings) if runs else 0
    teacher = teacher_size(teacher_config, attention=attention)
    setting = _setting(
        settings,
        teacher,
        plan,
        frozen=frozen,
        ranks=ranks,
        ranks_per_node=ranks_per_node,
        teacher_dtype=teacher_dtype(teacher_config, settings, dtype),
        stored_bytes=loaded_dtype(student_config, "stored").itemsize,
        device=device,
    )
    student = student_size(
        student_config,
        sequence_length=settings.sequence_length,
        prepare=partial(make_trainable, settings=settings, plan=plan),
        dtype=torch.float32 if setting.weight_bytes == 4 else torch.bfloat16,
        autocast=setting.autocast,
        attention=attention,
        edited=[
            layer for layer, index in enumerate(plan.keep) if any(index in edited_layers(edit) for edit in plan.edits)
        ],
    )
    return Job(
        student=student,
        teacher=teacher,
        setting=setting,
        num_tokens=settings.num_tokens,
        kept_checkpoints=max(2, settings.trainer.get("save_total_limit") or 2),
        keeps_best=settings.watch is not None and settings.watch.best is not None,
        shared_layers=shared,
        fixed_batch=settings.batch_size is not None,
        product_dtype=product_dtype(settings),
    )


def teacher_dtype(config: PreTrainedConfig, settings: Distill, dtype: str) -> torch.dtype:
    """In which a live teacher runs."""
    return loaded_dtype(config, settings.teacher.dtype or dtype)


def _teacher_place(settings: Distill) -> TeacherPlace:
    if settings.teacher.recorded is not None:
        return "recorded"
    if not needs_teacher(settings.losses):
        return "none"
    return "offloaded" if settings.teacher.offload else "live"


def _setting(
    settings: Distill,
    teacher: ModelSize,
    plan: PruningPlan,
    *,
    frozen: int,
    ranks: int,
    ranks_per_node: int,
    teacher_dtype: torch.dtype,
    stored_bytes: int,
    device: torch.device,
) -> Setting:
    config = deepspeed_config(settings)
    zero, trainer = config["zero_optimization"], DEFAULTS | settings.trainer
    rows, accumulation = batch_split(settings, ranks=ranks)
    stage, bucket = zero["stage"], zero.get("reduce_bucket_size", BUCKET_ELEMENTS)
    overlap, live = zero.get("overlap_comm"), zero.get("stage3_max_live_parameters", LIVE_ELEMENTS)
    weight_bytes = 2 if any(config.get(kind, {}).get("enabled") for kind in ("bf16", "fp16")) else 4
    setting = Setting(
        rows=rows,
        sequence_length=settings.sequence_length,
        head_chunk=settings.head_chunk,
        accumulation=accumulation,
        checkpointing=bool(trainer.get("gradient_checkpointing")),
        selective=any((trainer.get(key) or {}).get(SELECTIVE) for key in CHECKPOINTING_KEYS),
        stage=stage,
        ranks=ranks,
        ranks_per_node=ranks_per_node,
        offload_optimizer=_is_offloaded(zero.get("offload_optimizer")),
        offload_parameters=_is_offloaded(zero.get("offload_param")),
        bucket=teacher.hidden**2 if bucket == "auto" else int(bucket),  # what transformers fills in
        overlap=stage == 3 if overlap is None else bool(overlap),
        live=LIVE_ELEMENTS if live == "auto" else int(live),
        weight_bytes=weight_bytes,
        autocast="torch_autocast" in config,
        teacher=_teacher_place(settings),
        teacher_bytes=teacher_dtype.itemsize,
        device=device.type,
        sharing=_sharing(settings, teacher_dtype, weight_bytes),
        four_bits=settings.lora is not None and settings.lora.quantization == "nf4",
        stored_bytes=stored_bytes,
        writes=wants_teacher_text(settings.data) and settings.writing.backend == "transformers",
    )
    return _with_states(_with_company(setting, settings, plan), settings, teacher, plan, frozen=frozen)


def _sharing(settings: Distill, teacher_dtype: torch.dtype, weight_bytes: int) -> Sharing:
    """What frozen.py lets student and teacher hold once."""
    if weight_bytes == 4 and teacher_dtype == torch.float32:
        return "all"
    return "linear" if weight_bytes == 4 and teacher_dtype == autocast_dtype(settings) else "none"


def _with_company(setting: Setting, settings: Distill, plan: PruningPlan) -> Setting:
    """What happens beside plain steps."""
    watch, on_policy, local, length = settings.watch, settings.on_policy, settings.local, settings.sequence_length
    if watch is not None:
        windows = math.ceil(watch.perplexity_tokens / length)
        setting = replace(setting, scored_rows=SCORED_ROWS if watch.tasks else min(SCORED_ROWS, windows))
    if on_policy is not None and on_policy.share > 0:
        tokens = on_policy.prompt_tokens + on_policy.new_tokens
        # as many as fit into a row; of a conversation fewer and longer ones
        setting = replace(setting, samples=max(1, length // tokens), sample_tokens=tokens)
    if local is not None:
        layers = tuple(gap.layer for gap in gaps(plan.keep, plan.num_layers))
        setting = replace(setting, healed_layers=layers, healed_rows=min(local.rows_at_once, local.batch_size))
    return setting


def _with_states(setting: Setting, settings: Distill, teacher: ModelSize, plan: PruningPlan, *, frozen: int) -> Setting:
    """What loss terms on states hold: each teacher's state once, and of both models what attention is computed from."""
    states: set[int] = set()
    attention: set[tuple[int, int]] = set()
    for term in settings.losses:
        if isinstance(term, HiddenStates):
            states |= {target for _, target in layer_pairs(term, plan, num_shared=frozen)}
        elif isinstance(term, STATE_TERMS):
            attention |= set(layer_pairs(term, plan, num_shared=frozen))
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


def _is_offloaded(part: dict[str, Any] | None) -> bool:
    return (part or {}).get("device", "none") != "none"
