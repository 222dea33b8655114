"""What training will take, told and checked before it starts: memory by ZeRO stage, time, disk, and what fits.

Figures of memory and disk come from configurations alone. They err by a tenth (docs/scaling.md), so there are three
verdicts: it fits with that margin, it is close, and it cannot fit; only the last is refused.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from shoal.artifact import PruningPlan
from shoal.edits import edited_layers
from shoal.errors import UserError
from shoal.machine import available_memory, device_memory, free_disk
from shoal.models import load_config, text_config
from shoal.terms import STATE_TERMS, HiddenStates, reads_distributions
from shoal.training import Distill

from .arguments import DEFAULTS, autocast_dtype, batch_split, deepspeed_config
from .local import gaps
from .memory import (
    BUCKET_ELEMENTS,
    LIBRARY_BYTES,
    LIVE_ELEMENTS,
    Memory,
    ModelSize,
    Setting,
    Sharing,
    TeacherPlace,
    memory,
    shared_weights,
    student_size,
    teacher_size,
)
from .pace import flops_per_token, make_trainable
from .states import SCORES, layer_pairs
from .trainable import shares_prefix, trained_parts
from .writing import wants_teacher_text

log = logging.getLogger(__name__)

MARGIN = 1.1
"""How far an estimate of memory may be off, either way."""
ROW_BYTES = 9
"""Of one packed token: id, position, whether it is supervised."""
SIGNAL_BYTES = 150
"""Of one token of recorded signals at k = 32, at most."""
ADVICE = {
    "scoring": "; distill.watch: null leaves scoring out",
    "the local stage": "; distill.local: null leaves it out",
    "the teacher's writing": "; write where it fits and set distill.writing.folder to where that text is",
}
"""What no other place for weights would change."""
SLOWER = {"offload_optimizer": 1.3, "offload_parameters": 2.0, "offloaded": 1.2, "stage 3": 1.15, "stages 1, 2": 1.02}
"""What a setting costs in time, roughly: only for the order in which settings are tried."""
SCORED_ROWS = 16
"""Of a forward when the student is scored, at most: eval.batch_size unless it is set."""
SHORT_ROWS = 512
"""Tokens of a micro-batch at which half the speed is lost; for the same order."""


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
    """Frozen layers at the bottom that a live teacher runs for both."""
    fixed_batch: bool
    """distill.batch_size: accumulation follows from it."""

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
    parts = trained_parts(
        settings.trainable, plan, tied=bool(getattr(text_config(student_config), "tie_word_embeddings", False))
    )
    shared = 0 if settings.teacher.recorded is not None else shares_prefix(parts, plan)
    teacher = teacher_size(teacher_config, attention=attention)
    setting = _setting(
        settings,
        teacher,
        plan,
        shared=shared,
        ranks=ranks,
        ranks_per_node=ranks_per_node,
        teacher_dtype=teacher_dtype(teacher_config, settings, dtype),
        stored_bytes=(_stored(student_config) or torch.float32).itemsize,
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
    )


def teacher_dtype(config: PreTrainedConfig, settings: Distill, dtype: str) -> torch.dtype:
    """In which a live teacher runs."""
    wanted = settings.teacher.dtype or dtype
    return (_stored(config) or torch.float32) if wanted == "auto" else getattr(torch, wanted)


def _stored(config: PreTrainedConfig) -> torch.dtype | None:
    return getattr(config, "dtype", None) or getattr(text_config(config), "dtype", None)


def _teacher_place(settings: Distill, *, shared: int) -> TeacherPlace:
    if settings.teacher.recorded is not None:
        return "recorded"
    if settings.teacher.offload:
        return "offloaded"
    asked = shared or any(isinstance(term, STATE_TERMS) or reads_distributions(term) for term in settings.losses)
    return "live" if asked else "idle"


def _setting(
    settings: Distill,
    teacher: ModelSize,
    plan: PruningPlan,
    *,
    shared: int,
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
        teacher=_teacher_place(settings, shared=shared),
        teacher_bytes=teacher_dtype.itemsize,
        device=device.type,
        sharing=_sharing(settings, teacher_dtype, weight_bytes),
        four_bits=settings.lora is not None and settings.lora.quantization == "nf4",
        stored_bytes=stored_bytes,
        writes=wants_teacher_text(settings.data) and settings.writing.backend == "transformers",
    )
    return _with_states(_with_company(setting, settings, plan), settings, teacher, plan, shared=shared)


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


def _with_states(setting: Setting, settings: Distill, teacher: ModelSize, plan: PruningPlan, *, shared: int) -> Setting:
    """What loss terms on states hold: each teacher's state once, and of both models what attention is computed from."""
    states: set[int] = set()
    attention: set[tuple[int, int]] = set()
    for term in settings.losses:
        if isinstance(term, HiddenStates):
            states |= {target for _, target in layer_pairs(term, plan, num_shared=shared)}
        elif isinstance(term, STATE_TERMS):
            attention |= set(layer_pairs(term, plan, num_shared=shared))
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


# --- disk ---------------------------------------------------------------------------------------------------------


def disk_bytes(job: Job, *, record: bool = False) -> dict[str, int]:
    """What the run writes under run_dir, by folder, at its worst moment.

    A checkpoint is removed after the next one is complete, so one more than is kept lies there for a while.
    """
    student, setting = job.student, job.setting
    frozen = student.parameters - student.trained
    weights = setting.weight_bytes * (frozen if setting.stage == 3 else student.parameters)
    weights -= (setting.weight_bytes - setting.teacher_bytes) * shared_weights(student, setting)
    # moments; with ZeRO the fp32 weights that are stepped lie beside them
    states = (8 if setting.stage == 0 else 12) * student.trained
    steps = job.num_steps * job.tokens_per_step
    found = {
        "checkpoints": (job.kept_checkpoints + 1) * (weights + states),
        "distilled": setting.stored_bytes * student.parameters,
        "text": ROW_BYTES * steps,
    }
    if job.keeps_best:  # the next one is complete before the last one is removed
        found["checkpoints"] += 2 * setting.weight_bytes * student.parameters
    if setting.healed_layers:
        healed = sum(student.layers[layer].parameters for layer in setting.healed_layers)
        found["local"] = setting.stored_bytes * student.parameters + 12 * healed
    return found | ({"signals": SIGNAL_BYTES * steps} if record else {})


# --- refusal ------------------------------------------------------------------------------------------------------


def check_fit(
    teacher_dir: Path,
    student_dir: Path,
    plan: PruningPlan,
    *,
    settings: Distill,
    run_dir: Path,
    dtype: str,
    attention: str,
    ranks: int,
    ranks_per_node: int,
    device: torch.device,
    trust_remote_code: bool = False,
) -> None:
    """Refuse a run that cannot fit into memory or onto the disk, before any weight is loaded; log what is close.

    One rank asks for all: its device stands for the others'. On a CPU what the processes take already is not counted
    twice. Where the recipe says `check_memory: false`, what would be refused is only logged.

    Raises:
        UserError: naming what is needed, what is free and the cheapest setting that fits.
    """
    teacher, student = (
        load_config(folder, trust_remote_code=trust_remote_code) for folder in (teacher_dir, student_dir)
    )
    try:
        found = job(
            teacher,
            student,
            plan,
            settings,
            dtype=dtype,
            attention=attention,
            ranks=ranks,
            ranks_per_node=ranks_per_node,
            device=device,
        )
    except RuntimeError as error:  # torch's, of operations that need numbers
        reason = str(error).strip().splitlines()[0][:120]
        log.warning("memory is not estimated: this family cannot be run without data (%s)", reason)
        return
    free = device_memory(device), available_memory()
    problems = shortages(found, device_free=free[0], host_free=free[1])
    needed = sum(disk_bytes(found).values()) - written_bytes(run_dir)
    if needed > free_disk(run_dir):
        problems.append(
            f"run_dir {run_dir}: training writes {size_text(needed)} more at its worst moment and "
            f"{size_text(free_disk(run_dir))} are free there; free some space, lower distill.trainer.save_total_limit, "
            "or set run_dir to another disk"
        )
    if problems and not settings.check_memory:
        log.warning("this training will not fit, and starts because distill.check_memory is false: %s", problems[0])
    elif problems:
        fitting = next(cheapest(found, device_free=free[0], host_free=free[1]), None)
        advice = "; this fits: " + ", ".join(overrides(found, fitting)) if fitting and needs_memory(problems) else ""
        raise UserError(
            "this training will not fit: " + "; ".join(problems) + advice + ". `shoal distill --dry-run` shows where "
            "memory goes; distill.check_memory: false starts it all the same"
        )
    elif not fits(found.memory, found.setting, device_free=free[0], host_free=free[1]):
        log.warning(
            "memory will be close: %s per rank expected, %s free; estimates err by a tenth",
            size_text(found.memory.peak),
            size_text(free[0]),
        )


def needs_memory(problems: list[str]) -> bool:
    """Whether another setting would help."""
    return any(not problem.startswith("run_dir") for problem in problems)


def shortages(job: Job, *, device_free: int, host_free: int) -> list[str]:
    """What cannot fit even if the estimate is a margin too high, in words."""
    found, setting = job.memory, job.setting
    device, host = _needed(found, setting)
    problems = []
    if device > MARGIN * device_free:
        where = f"{setting.ranks_per_node} rank(s) on this node" if setting.device == "cpu" else "a rank"
        problems.append(
            f"{where} need {size_text(device)} of memory at the peak ({found.peak_at}) and {size_text(device_free)} "
            f"are free{ADVICE.get(found.peak_at, '')}"
        )
    if setting.device != "cpu" and host > MARGIN * host_free:
        problems.append(f"this node needs {size_text(host)} of host memory and {size_text(host_free)} are free")
    return problems


def fits(found: Memory, setting: Setting, *, device_free: int, host_free: int) -> bool:
    """Whether it fits even if the estimate is a margin too low."""
    device, host = _needed(found, setting)
    return MARGIN * device <= device_free and (setting.device == "cpu" or MARGIN * host <= host_free)


def _needed(found: Memory, setting: Setting) -> tuple[int, int]:
    """On the device, and on the host of a node. On a CPU all ranks of the node share both."""
    if setting.device == "cpu":
        return setting.ranks_per_node * (found.peak - LIBRARY_BYTES) + found.host, 0
    return found.peak, max(found.host, found.host_briefly)


def written_bytes(run_dir: Path) -> int:
    """Bytes of an earlier life of the run that the new one goes on from or replaces."""
    folders = [run_dir / name for name in ("checkpoints", "text", "distilled", "local")]
    return sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())


# --- what fits ----------------------------------------------------------------------------------------------------


def cheapest(job: Job, *, device_free: int, host_free: int) -> Iterator[Setting]:
    """Settings that fit and train the same, the fastest first by a rough rule; recorded signals only at the very end,
    since they need a pass of their own and are not quite the same loss."""
    candidates = sorted(_alternatives(job), key=lambda setting: (setting.teacher == "recorded", _cost(job, setting)))
    for setting in candidates:
        if fits(memory(job.student, job.teacher, setting), setting, device_free=device_free, host_free=host_free):
            yield setting


def _alternatives(job: Job) -> Iterator[Setting]:
    """The same rows per step and rank, split in other ways, with the same teacher, and other places for everything."""
    now = job.setting
    rows = now.rows * now.accumulation
    places: tuple[TeacherPlace, ...] = (now.teacher,)
    if now.teacher == "live":
        places = ("live", "offloaded", "recorded")
    for micro, checkpointing, stage, optimizer, parameters, teacher in itertools.product(
        [n for n in range(1, rows + 1) if rows % n == 0],
        (False, True),
        (0, 1, 2, 3),
        (False, True),
        (False, True),
        places,
    ):
        impossible = (optimizer and stage == 0) or (parameters and stage < 3) or (now.weight_bytes == 2 and stage == 0)
        impossible |= now.four_bits and stage == 3
        if impossible or (teacher == "offloaded" and stage == 3) or (now.device == "cpu" and (optimizer or parameters)):
            continue
        yield replace(
            now,
            rows=micro,
            accumulation=rows // micro,
            checkpointing=checkpointing,
            stage=stage,
            offload_optimizer=optimizer,
            offload_parameters=parameters,
            teacher=teacher,
        )


def _cost(job: Job, setting: Setting) -> float:
    """Time per token up to a factor."""
    cost = flops_per_token(job.student, job.teacher, setting, shared=job.shared_layers > 0)
    cost *= 1 + SHORT_ROWS / (setting.rows * setting.sequence_length)
    cost *= {0: 1.0, 3: SLOWER["stage 3"]}.get(setting.stage, SLOWER["stages 1, 2"])
    for name in ("offload_optimizer", "offload_parameters"):
        cost *= SLOWER[name] if getattr(setting, name) else 1
    return cost * (SLOWER["offloaded"] if setting.teacher == "offloaded" else 1)


def overrides(job: Job, setting: Setting) -> list[str]:
    """Recipe keys that turn the job's setting into ``setting``; empty where it is that already."""
    now, lines = job.setting, []
    where = ("stage", "offload_optimizer", "offload_parameters")
    if any(getattr(now, name) != getattr(setting, name) for name in where):
        zero = [f"stage: {setting.stage}"]
        zero += ["offload_optimizer: {device: cpu}"] * setting.offload_optimizer
        zero += ["offload_param: {device: cpu}"] * setting.offload_parameters
        named = f"deepspeed/zero{setting.stage}.json"
        mapping = "{zero_optimization: {" + ", ".join(zero) + "}}"
        lines.append(f"distill.deepspeed={named if len(zero) == 1 else mapping}")
    if now.rows != setting.rows:
        lines.append(f"distill.trainer.per_device_train_batch_size={setting.rows}")
        if not job.fixed_batch:
            lines.append(f"distill.trainer.gradient_accumulation_steps={setting.accumulation}")
    if now.checkpointing != setting.checkpointing:
        lines.append(f"distill.trainer.gradient_checkpointing={str(setting.checkpointing).lower()}")
    if now.teacher != setting.teacher:
        recorded = setting.teacher == "recorded"
        lines.append(
            "distill.teacher.recorded=FOLDER (after `shoal record`)" if recorded else "distill.teacher.offload=true"
        )
    return lines


def size_text(count: float) -> str:
    """`3.1 GB`; small sizes in MB."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
