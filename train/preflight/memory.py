"""How much memory training will take, from configurations alone. B rows, S sequence, D hidden, V vocabulary.

What models take and autograd keeps is counted in sizes.py. What DeepSpeed keeps is a formula per ZeRO stage, read from
its sources (0.19) and checked against runs: docs/explanation/resources.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from transformers import TrainingArguments

from shoal.errors import UserError
from shoal.models.anatomy import text_config
from shoal.recipe.trainer_arguments import DEFAULTS

from ..engine.sharding import REDUCED_AT_ONCE
from ..objective.chunked_loss import CHUNK, most_tokens
from ..student.sizes import ModelSize, student_size, teacher_size
from ..student.spec import TeacherPlace, TrainSpec
from ..teacher.wiring import make_trainable_alike

RAW_LOGITS = 3
"""Student's, teacher's, and their gradient, in the precision of the head's product."""
LOGIT_BYTES, COMPILED_LOGIT_BYTES = 28, 4
"""Bytes of a chunk's logit on a GPU beside the raw ones: log-softmax and softmax of both models in fp32, a term's
product and its gradient, and their sum; of a compiled loss one tensor in fp32. On a CPU these exist for a block that
fits its cache."""
BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's own reduce_bucket_size."""
LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's own stage3_max_live_parameters: gathered ones that may stay until they are used again."""
LIBRARY_BYTES = 600_000_000
"""Bytes of torch, transformers and DeepSpeed in a process on a CPU."""
FIXED_BYTES = {"cpu": LIBRARY_BYTES + 500_000_000, "cuda": 1_500_000_000}
"""Bytes of a process beside what it trains: on a CPU the libraries, and what the allocator keeps of freed memory (seen
in runs); on a GPU the context and cuBLAS' buffers, and as much again for NCCL's where there are several ranks (usual
figures, not measured here)."""
QUARTER_BYTES = 4.13 / 8
"""Bytes of a weight in 4 bits, with its share of the scales (QLoRA, arXiv:2305.14314, section 3)."""
CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")
"""The Trainer's names of checkpointing, today's first."""
MOMENTS = {"ademamix": 3, "lion": 1, "adagrad": 1, "rmsprop": 1, "adafactor": 0, "sgd": 0}
"""Moments of every weight, by the first word of an optimizer's name; the others have two, as AdamW."""
WIDTHS = {"_8bit": 1 + 4 / 256, "_4bit": 0.5 + 4 / 128}
"""Bytes of a moment with its share of the scale, by the end of an optimizer's name; 4 of all others."""
FUSED_SHARE, COMPILED_SHARE = 0.8, 0.72
"""Share of what a layer keeps that is left with Liger's kernels, which keep three tensors of an MLP's width and not
four, and of a compiled layer, which computes again what is cheap: 0.60 to 0.72 on small layers of Llama and Qwen 3."""


@dataclass(frozen=True)
class Setting:
    """What may be changed about a training without changing what is learnt."""

    rows: int
    """Rows of a micro-batch on one rank."""
    accumulation: int
    """Micro-batches of an optimizer step on one rank."""
    checkpointing: bool
    """Activations of layers are computed again in the backward pass."""
    stage: int
    """ZeRO stage, 0 to 3."""
    offload_optimizer: bool
    """Optimizer state and gradients lie on the host."""
    offload_parameters: bool
    """Weights lie on the host."""
    teacher: TeacherPlace
    """Place that the teacher's signals come from."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank's device at its peak, and on one node's host."""

    weights: int
    """Bytes of the student's weights, without those that are the teacher's."""
    gradients: int
    """Bytes of gradients that wait for the optimizer."""
    optimizer: int
    """Bytes of moments, and of the fp32 copies that ZeRO keeps of the weights."""
    activations: int
    """Bytes kept for the backward pass, and of hidden states handed from teacher to student."""
    head: int
    """Bytes of a chunk's logits, and of what its gradient needs."""
    teacher: int
    """Bytes of the teacher's weights on this device."""
    buffers: int
    """Bytes of DeepSpeed's buffers for communication and gathered weights."""
    fixed: int
    """Bytes of the process itself."""
    peak: int
    """Bytes at the fullest moment: not the sum, activations are gone when the optimizer steps."""
    host: int
    """Bytes per node at the fullest moment: what is offloaded, or whole models that are loaded there first."""


class NotEstimated(UserError):
    """A family whose memory cannot be told without running it."""


@dataclass(frozen=True)
class Job:
    """A training as far as its size goes."""

    spec: TrainSpec
    student: ModelSize
    teacher: ModelSize
    setting: Setting

    @property
    def on_cpu(self) -> bool:
        """Whether ranks compute on the host."""
        return self.spec.ranks.device.type == "cpu"

    @property
    def width(self) -> int:
        """Bytes of a weight of the student."""
        return self.spec.deepspeed.weight_dtype.itemsize

    @property
    def is_autocast(self) -> bool:
        """Whether matrix products are computed in half precision from fp32 weights."""
        return self.spec.deepspeed.autocast_dtype is not None

    @property
    def in_four_bits(self) -> int:
        """Weights of linear modules of the layers that are held in 4 bits (QLoRA)."""
        lora = self.spec.settings.lora
        return sum(layer.frozen_linear for layer in self.student.layers) * (lora is not None and lora.load_in_4bit)

    @property
    def shared_weights(self) -> int:
        """Frozen weights that are the teacher's tensors, as frozen.py lets them be."""
        deepspeed = self.spec.deepspeed
        is_same = self.spec.teacher_dtype in (deepspeed.weight_dtype, deepspeed.autocast_dtype)
        if self.setting.stage == 3 or self.setting.teacher != "live" or not is_same:
            return 0
        return self.student.frozen_linear - self.in_four_bits

    @property
    def memory(self) -> Memory:
        """Bytes that the setting takes; docs/explanation/resources.md has every formula in words."""
        spec, student, teacher, setting = self.spec, self.student, self.teacher, self.setting
        weights, optimizer, gradients, step = _states(self)
        activations, one_layer = _activations(self)
        head = _head(self)
        on_device, host = _teacher(self)
        communication, gathered = _buffers(self)
        kept = not setting.offload_optimizer
        offloaded = 0 if kept else optimizer + gradients + _pinned(self)
        host += spec.ranks.per_node * (offloaded + setting.offload_parameters * weights)
        optimizer, weights = optimizer * kept, weights * (not setting.offload_parameters)
        fixed = FIXED_BYTES["cpu"] if self.on_cpu else FIXED_BYTES["cuda"] * (1 + (spec.ranks.count > 1))
        always = weights + optimizer + on_device + fixed
        # gradients of an earlier micro-batch wait; ZeRO 3 has their place from the beginning
        waiting = gradients * kept * (setting.accumulation > 1 or setting.stage == 3)
        head_gradient = 4 * student.head * student.head_trained
        forward = activations + max(head, head_gradient + one_layer) + waiting
        backward = gradients * (kept or setting.stage < 2) + max(one_layer, step * kept)
        whole = self.width * student.parameters
        settings = spec.settings
        # outside of training, for which ZeRO 3 gathers it whole on every rank
        runs = settings.watch is not None or settings.on_policy is not None
        peaks = (
            always + communication + gathered + max(forward, backward),
            fixed + (_own_weights(self, shared=0) + on_device) * (setting.stage < 3),  # they are loaded
            always + gradients * kept + communication + whole if runs and setting.stage == 3 else 0,
        )
        # read into the memory of a CPU first, but by GPUs that hold models whole and not in 4 bits
        loading = whole * (self.on_cpu or setting.stage == 3 or setting.offload_parameters or self.in_four_bits > 0)
        if setting.teacher == "offloaded" or (setting.teacher == "live" and (self.on_cpu or setting.stage == 3)):
            loading += spec.teacher_dtype.itemsize * teacher.parameters
        return Memory(
            weights=weights,
            gradients=gradients * kept,
            optimizer=optimizer,
            activations=activations,
            head=head,
            teacher=on_device,
            buffers=communication + gathered,
            fixed=fixed,
            peak=max(peaks),
            host=max(host, spec.ranks.per_node * loading // (spec.ranks.count if setting.stage == 3 else 1)),
        )


def job(spec: TrainSpec) -> Job:
    """The size of the training that ``spec`` describes, from configurations; no weight is read.

    Raises:
        UserError: a batch that its ranks cannot share; NotEstimated.
    """
    deepspeed, settings, plan = spec.deepspeed, spec.settings, spec.plan
    trainer = DEFAULTS | settings.trainer
    rows, accumulation = spec.batch_split
    setting = Setting(
        rows,
        accumulation,
        checkpointing=bool(next((trainer[key] for key in CHECKPOINTING if trainer.get(key) is not None), False)),
        stage=deepspeed.stage,
        offload_optimizer=deepspeed.offloads("offload_optimizer"),
        offload_parameters=deepspeed.offloads("offload_param"),
        teacher=spec.teacher_place,
    )
    try:
        student = student_size(
            spec.student.config,
            sequence_length=settings.sequence_length,
            prepare=partial(make_trainable_alike, spec=spec),
            dtype=torch.float32 if deepspeed.weight_dtype.itemsize == 4 else torch.bfloat16,
            autocast=deepspeed.autocast_dtype is not None,
            attention=spec.student.load.attention,
            changed={*map(plan.keep.index, plan.reweighted)},
        )
        teacher = teacher_size(spec.teacher.config, attention=spec.teacher.load.attention)
    except RuntimeError as error:  # torch's, of operations that need numbers
        reason = str(error).strip().splitlines()[0][:120]
        raise NotEstimated(
            f"{text_config(spec.student.config).model_type}: cannot be run without data, so its memory cannot be "
            f"estimated ({reason}); try a few steps with distill.trainer.max_steps"
        ) from error
    return Job(spec, student, teacher, setting)


def optimizer_bytes(spec: TrainSpec) -> float:
    """Bytes of the moments of one trained weight, by the name of the optimizer: the DeepSpeed configuration's, else
    that of distill.trainer."""
    own = spec.settings.trainer.get("optim") or TrainingArguments.__dataclass_fields__["optim"].default
    named = str((spec.deepspeed.config.get("optimizer") or {}).get("type", own)).lower()
    width = next((width for end, width in WIDTHS.items() if named.endswith(end)), 4)
    return width * MOMENTS.get(named.removeprefix("paged_").split("_")[0], 2)


def _own_weights(job: Job, *, shared: int) -> int:
    """Bytes of a whole student on one device, without the ``shared`` weights."""
    quarter = job.in_four_bits
    return job.width * (job.student.parameters - quarter - shared) + int(QUARTER_BYTES * quarter)


def _states(job: Job) -> tuple[int, int, int, int]:
    """Weights, optimizer with master copies, gradients, and what the step itself adds."""
    trained, stage, width = job.student.trained, job.setting.stage, job.width
    shards, weights = job.spec.ranks.count if stage else 1, _own_weights(job, shared=job.shared_weights)
    moments = int(optimizer_bytes(job.spec) * trained) // shards
    if stage == 0:
        return weights, moments, width * trained, 0
    # stages 1 and 2 copy the weights they step, also where those are fp32 already; 3 only where they are not
    optimizer = moments + (4 * trained // shards if stage < 3 or width < 4 else 0)
    shard = 4 * trained // shards
    if stage == 1 and width < 4:  # beside the gradients as they come their fp32 sum, whole
        return weights, optimizer, (width + 4) * trained, 0
    if stage == 1:
        return weights, optimizer, width * trained, shard
    if stage == 2:
        return weights, optimizer, shard, shard  # flattened once more for the step
    return weights // shards, optimizer, shard, 0


def _pinned(job: Job) -> int:
    """What an offloaded optimizer of ZeRO 1 and 2 keeps on the host beside states and gradients: a rank's part of the
    weights on their way back, and the sum of its gradients where a step has several micro-batches."""
    if job.setting.stage not in (1, 2):
        return 0
    return job.width * job.student.trained // job.spec.ranks.count * (1 + (job.setting.accumulation > 1))


def _copies(job: Job) -> int:
    """Low-precision copies of the layers' weights, which autocast makes and keeps."""
    if job.setting.stage == 3:  # DeepSpeed's own linear function keeps none
        return 0
    has_none = job.shared_weights or job.in_four_bits  # of what is frozen
    return sum(
        layer.kept.fixed - (min(layer.kept.fixed, 2 * layer.frozen_linear) if has_none else 0)
        for layer in job.student.layers
    )


def _activations(job: Job) -> tuple[int, int]:
    """What is kept until the backward pass with what models hand to the loss, and what one layer takes while it is
    worked on."""
    student, setting, settings = job.student, job.setting, job.spec.settings
    rows, state = setting.rows, setting.rows * settings.sequence_length * student.hidden * student.state_bytes
    # final states: the student's and their supervised copy and gradient, and a live teacher's and theirs
    handed = 3 * state
    if setting.teacher in ("live", "offloaded"):
        handed += 2 * state * job.spec.teacher_dtype.itemsize // student.state_bytes
    always = handed + _copies(job) + student.outside.of(rows)
    trainer = settings.trainer
    share = FUSED_SHARE if trainer.get("use_liger_kernel") else COMPILED_SHARE if trainer.get("torch_compile") else 1
    of_layers = [int(share * layer.kept.per_row) * rows for layer in student.layers]
    kept = sum(layer > 0 for layer in of_layers) * state if setting.checkpointing else sum(of_layers)
    return always + kept, max(of_layers)


def _head(job: Job) -> int:
    student, settings, setting = job.student, job.spec.settings, job.setting
    tokens = min(CHUNK, most_tokens(student.vocabulary), setting.rows * (settings.sequence_length - 1))
    width, beside = 2 if job.is_autocast else job.width, 0 if job.on_cpu else LOGIT_BYTES
    if settings.trainer.get("torch_compile"):
        beside = COMPILED_LOGIT_BYTES
    logits = tokens * student.vocabulary * (RAW_LOGITS * width + beside)
    is_shared = not student.head_trained and job.shared_weights > 0
    low = width * student.head if job.is_autocast and not is_shared else 0  # the head's copy
    # the sum over chunks in fp32, and this chunk's
    gradient = (4 + width) * student.head if student.head_trained else 0
    gathered = 0
    if setting.stage == 3 and job.spec.ranks.count > 1:
        gathered = job.width * student.head
        gathered += job.spec.teacher_dtype.itemsize * job.teacher.head * (setting.teacher == "live")
    return logits + low + gradient + gathered


def _teacher(job: Job) -> tuple[int, int]:
    """On the device of a rank, and on the host of a node."""
    teacher, ranks, place = job.teacher, job.spec.ranks, job.setting.teacher
    width, largest = job.spec.teacher_dtype.itemsize, max(layer.parameters for layer in teacher.layers)
    if place in ("none", "recorded"):
        return 0, 0
    if place == "offloaded":  # a layer that runs and the next one on its way, embeddings or head
        return width * (2 * largest + teacher.head), ranks.per_node * width * teacher.parameters
    if job.setting.stage == 3:
        shard = width * teacher.parameters // ranks.count
        return shard + (2 * width * largest if ranks.count > 1 else 0), 0
    return width * teacher.parameters, 0


def _buffers(job: Job) -> tuple[int, int]:
    """For gradients on their way, and for gathered weights."""
    student, stage, zero = job.student, job.setting.stage, job.spec.deepspeed.zero
    if stage == 0:
        # the tensor that fills a buffer may be the largest
        at_once = REDUCED_AT_ONCE + student.head * student.head_trained
        return 0 if job.spec.ranks.count == 1 else job.width * min(at_once, student.trained), 0
    bucket = zero.get("reduce_bucket_size", BUCKET_ELEMENTS)
    bucket = job.teacher.hidden**2 if bucket == "auto" else int(bucket)  # what transformers fills in
    kinds = 2 if job.is_autocast else 1  # one for what is sent in bf16, one for the rest
    allocated = bucket * kinds * (1 + bool(stage < 3 and zero.get("overlap_comm")))
    # allocated whole; but a CPU gives memory only for what is filled
    filled = min(allocated, student.trained) if job.on_cpu else allocated
    gathered = job.width * min(LIVE_ELEMENTS, student.parameters) if stage == 3 else 0
    if stage == 3 and (of_node := zero.get("zero_hpz_partition_size", 1)) > 1:
        gathered += job.width * student.parameters // of_node  # the node's own copy, dealt out over its ranks
    return filled * job.width, gathered
