"""How much memory training will take, from configurations alone. B rows, S sequence, D hidden, V vocabulary.

What models take and autograd keeps is counted in sizes.py. What DeepSpeed keeps is a formula per ZeRO stage, read from
its sources (0.19) and checked against runs: docs/scaling.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..engine.sharding import REDUCED_AT_ONCE
from ..generated.sampling import few_shapes
from ..student.sizes import ModelSize
from ..student.spec import TeacherPlace
from .optimizers import ADAM, OptimizerState

LOGIT_BYTES = 28
"""Bytes of a chunk's logit on a GPU beside the raw ones: log-softmax and softmax of both models in fp32, a term's
product and its gradient, and their sum. On a CPU these exist for a block that fits its cache."""
COMPILED_LOGIT_BYTES = 4
"""The same of a compiled loss: one tensor in fp32 where a term scatters (dkd, recorded signals), else nothing."""
RAW_LOGITS = 3
"""Student's, teacher's, and their gradient, in the precision of the head's product."""
BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's own reduce_bucket_size."""
LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's own stage3_max_live_parameters: gathered ones that may stay until they are used again."""
LIBRARY_BYTES = 600_000_000
"""Bytes of torch, transformers and DeepSpeed in a process on a CPU."""
FIXED_BYTES = {"cpu": LIBRARY_BYTES + 500_000_000, "cuda": 1_500_000_000}
"""Bytes of a process beside what it trains: on a CPU the libraries, and what the allocator keeps of freed memory (seen
in runs); on a GPU the context, cuBLAS' and NCCL's buffers (a usual figure, not measured here)."""

QUARTER_BYTES = 4.13 / 8
"""Bytes of a weight in 4 bits, with its share of the scales (QLoRA, arXiv:2305.14314, section 3)."""
PRODUCTS_SHARE = 0.5
"""Share of what a layer keeps that selective checkpointing leaves, the results of matrix products and attention: 0.47
for Qwen3-8B by the formula in docs/scaling.md."""
FUSED_SHARE = 0.8
"""Share of what a layer keeps that is left with Liger's kernels, which keep three tensors of an MLP's width and not
four, and of a norm its input alone: 0.77 for a Llama layer by the formula in docs/scaling.md."""
COMPILED_SHARE = 0.72
"""The same of a compiled layer, which computes again what is cheap: counted on small layers of Llama and Qwen 3 it is
0.60 to 0.64 under autocast, 0.67 to 0.72 with bf16 weights."""
SCORED_LOGITS = 1 << 25
"""Logits that exist at one time when a model is scored, and twice."""
DRAWN_BYTES = 36
"""Bytes of a logit of tokens that are drawn: raw, in fp32, and three tensors of fp64."""
KEY_BYTES, VALUE_BYTES = 4, 2
"""Bytes of a number in the cache of a model under bf16 autocast: rotary embedding makes keys fp32 again."""

Sharing = Literal["none", "linear", "all"]


@dataclass(frozen=True)
class Setting:
    """What decides how much memory a rank takes, and how long a step."""

    rows: int
    """Rows of a micro-batch on one rank."""
    sequence_length: int
    """Tokens of a row."""
    head_chunk: int
    """Tokens whose full-vocabulary logits exist at one time."""
    accumulation: int = 1
    """Micro-batches of an optimizer step on one rank."""
    checkpointing: bool = False
    """Activations of layers are computed again in the backward pass."""
    selective: bool = False
    """Checkpointing keeps what matrix products give (objective/activation_checkpointing.py)."""
    stage: int = 0
    """ZeRO stage, 0 to 3."""
    ranks: int = 1
    """Ranks over all nodes."""
    ranks_per_node: int = 1
    """Ranks that share the memory of one host."""
    optimizer: OptimizerState = ADAM
    """State that the optimizer keeps of every trained weight."""
    offload_optimizer: bool = False
    """Optimizer state and gradients lie on the host."""
    offload_parameters: bool = False
    """Weights lie on the host."""
    bucket: int = BUCKET_ELEMENTS
    """Gradients that ranks add up at one time."""
    overlap: bool = False
    """A second bucket is filled while the first is on its way."""
    live: int = LIVE_ELEMENTS
    """Weights that ZeRO 3 may hold gathered."""
    weight_bytes: int = 4
    """Bytes of a weight of the student."""
    gradient_bytes: int = 4
    """Bytes of a gradient while micro-batches add up."""
    autocast: bool = True
    """Matrix products are computed in half precision from fp32 weights."""
    teacher: TeacherPlace = "live"
    """Place that the teacher's signals come from."""
    teacher_bytes: int = 2
    """Bytes of a weight of the teacher."""
    device: str = "cuda"
    """Type of the device, as torch calls it."""
    sharing: Sharing = "none"
    """Frozen weights that are held once for student and teacher: linear maps and embeddings, or all."""
    four_bits: bool = False
    """Linear modules of the layers are held in 4 bits (QLoRA)."""
    fused: bool = False
    """Norms and MLPs run by Liger's kernels."""
    compiled: bool = False
    """Layers run compiled."""
    compiled_loss: bool = False
    """The loss at the head does."""
    stored_bytes: int = 2
    """Bytes of a weight in distilled/."""
    captured: int = 0
    """Bytes per token that loss terms on states hold: the teacher's states, and both models' attention inputs."""
    comparing: int = 0
    """Bytes per token of one comparison of states."""
    relation: int = 0
    """Bytes of one chunk of scores."""
    scored_rows: int = 0
    """Rows of a forward when distill.watch scores the student; 0 = nothing is watched."""
    samples: int = 0
    """Samples that stand in for one row of an on-policy step; 0 = there are no such steps."""
    sample_tokens: int = 0
    """Tokens of a sample, its prompt among them."""
    healed_layers: tuple[int, ...] = ()
    """Student layers that distill.local trains first."""
    healed_rows: int = 0
    """Rows of a forward in that stage."""
    writes: bool = False
    """The teacher writes text first, whole on every rank."""
    asked: float = 1.0
    """Share of the rows of which the teacher is asked; of the others a live one runs the shared layers alone."""


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
    peak_at: str
    """Work of the rank at that moment, in words."""
    host: int
    """Bytes per node, all the time."""
    host_briefly: int
    """Bytes per node while every rank holds whole models on the host, until they are moved or sharded, and while one
    holds the whole student to write it."""


def memory(student: ModelSize, teacher: ModelSize, setting: Setting) -> Memory:
    """What one rank takes with ``setting``; docs/scaling.md has every formula in words."""
    weights, optimizer, gradients, step = _states(student, setting)
    activations, one_layer = _activations(student, setting)
    states = _handed_over(student, setting)
    head = _head(student, teacher, setting)
    teacher_device, teacher_host = _teacher(teacher, setting)
    communication, gathered = _buffers(student, setting)
    host = teacher_host
    device_optimizer = optimizer
    if setting.offload_optimizer:
        host += setting.ranks_per_node * (optimizer + gradients)
        device_optimizer = 0
    elif setting.optimizer.paged and setting.device != "cpu":
        moments = _moments(student, setting)
        host += setting.ranks_per_node * moments
        device_optimizer -= moments
    if setting.offload_parameters:
        host += setting.ranks_per_node * weights
        weights = 0
    fixed = FIXED_BYTES["cpu" if setting.device == "cpu" else "cuda"]
    always = weights + device_optimizer + teacher_device + fixed
    # gradients of an earlier micro-batch wait; ZeRO 3 has their place from the beginning
    waiting = gradients if setting.accumulation > 1 or setting.stage == 3 else 0
    on_device = not setting.offload_optimizer
    head_gradient = 4 * student.head if student.head_trained else 0
    comparing = setting.rows * setting.sequence_length * setting.comparing + setting.relation
    forward = activations + states + max(head, head_gradient + max(one_layer, comparing)) + waiting * on_device
    backward = gradients * (on_device or setting.stage < 2) + max(one_layer, step * on_device)
    stays = gradients * on_device + communication if setting.stage == 3 else 0
    peaks = {
        "training": always + communication + gathered + max(forward, backward),
        "loading": fixed + (_own_weights(student, setting, shares=False) + teacher_device) * (setting.stage < 3),
        "scoring": always + stays + _scoring(student, setting),
        "sampling": always + stays + _sampling(student, setting),
        "saving": always + stays + _saving(student, setting) * (setting.device == "cpu"),
        "the local stage": fixed + _healing(student, teacher, setting),
        "the teacher's writing": fixed + setting.writes * setting.teacher_bytes * teacher.parameters,
    }
    peak_at = max(peaks, key=lambda name: peaks[name])
    held = setting.teacher in ("live", "offloaded")
    loading = setting.weight_bytes * student.parameters + setting.teacher_bytes * held * teacher.parameters
    return Memory(
        weights=weights,
        gradients=gradients * on_device,
        optimizer=device_optimizer,
        activations=activations + states,
        head=head,
        teacher=teacher_device,
        buffers=communication + gathered,
        fixed=fixed,
        peak=peaks[peak_at],
        peak_at=peak_at,
        host=host,
        host_briefly=max(
            setting.ranks_per_node * loading // (setting.ranks if setting.stage == 3 else 1),
            host + _saving(student, setting),
        ),
    )


def shared_weights(student: ModelSize, setting: Setting) -> int:
    """Frozen weights that are the teacher's tensors."""
    if setting.stage == 3 or setting.teacher != "live" or setting.sharing == "none":
        return 0
    shared = student.frozen if setting.sharing == "all" else student.frozen_linear
    return shared - _in_four_bits(student, setting)


def _in_four_bits(student: ModelSize, setting: Setting) -> int:
    return sum(layer.frozen_linear for layer in student.layers) if setting.four_bits else 0


def _own_weights(student: ModelSize, setting: Setting, *, shares: bool) -> int:
    """Bytes of a whole student on one device, with or without what it shares with the teacher."""
    quarter = _in_four_bits(student, setting)
    plain = student.parameters - quarter - (shared_weights(student, setting) if shares else 0)
    return setting.weight_bytes * plain + int(QUARTER_BYTES * quarter)


def _states(student: ModelSize, setting: Setting) -> tuple[int, int, int, int]:
    """Weights, optimizer with master copies, gradients, and what the step itself adds."""
    trained, shards = student.trained, setting.ranks
    width, weights = setting.weight_bytes, _own_weights(student, setting, shares=True)
    if setting.stage == 0:
        return weights, _moments(student, setting), width * trained, 0
    # stages 1 and 2 copy the weights they step, also where those are fp32 already; 3 only where they are not
    master = 4 * trained // shards if setting.stage < 3 or width < 4 else 0
    optimizer = _moments(student, setting) + master
    shard = 4 * trained // shards
    if setting.stage == 1 and setting.gradient_bytes > width:  # beside the gradients as they come their sum, whole
        return weights, optimizer, (width + setting.gradient_bytes) * trained, 0
    if setting.stage == 1:
        return weights, optimizer, width * trained, shard
    if setting.stage == 2:
        return weights, optimizer, shard, shard  # flattened once more for the step
    return weights // shards, optimizer, shard, 0


def _moments(student: ModelSize, setting: Setting) -> int:
    """Bytes of the optimizer's moments on one rank."""
    return setting.optimizer.num_bytes(student.trained, stage=setting.stage) // (setting.ranks if setting.stage else 1)


def _copies(student: ModelSize, setting: Setting) -> int:
    """Low-precision copies of the layers' weights, which autocast makes and keeps."""
    if setting.stage == 3:  # DeepSpeed's own linear function keeps none
        return 0
    fixed = sum(layer.kept.fixed for layer in student.layers)
    if shared_weights(student, setting) or setting.four_bits:
        fixed -= sum(min(layer.kept.fixed, 2 * layer.frozen_linear) for layer in student.layers)
    return fixed


def _activations(student: ModelSize, setting: Setting) -> tuple[int, int]:
    """What is kept until the backward pass, and what one layer takes while it is worked on."""
    rows = setting.rows
    always = _copies(student, setting) + rows * setting.sequence_length * setting.captured + student.outside.of(rows)
    share = max(FUSED_SHARE * setting.fused, COMPILED_SHARE * setting.compiled) or 1
    one_layer = int(share * max(layer.kept.per_row for layer in student.layers) * rows)
    kept = int(share * sum(layer.kept.per_row for layer in student.layers) * rows)
    if not setting.checkpointing:
        return always + kept, one_layer
    if setting.selective:
        return always + int(PRODUCTS_SHARE * kept), one_layer
    return always + sum(layer.kept.per_row > 0 for layer in student.layers) * _state(student, setting), one_layer


def _whole(student: ModelSize, setting: Setting) -> int:
    """What running the student outside of training adds to its weights: at stage 3 it is gathered whole on every rank;
    elsewhere autocast copies what is trained."""
    if setting.stage == 3:
        return setting.weight_bytes * student.parameters
    return _copies(student, setting) + 2 * student.head * student.head_trained * setting.autocast


def _scoring(student: ModelSize, setting: Setting) -> int:
    if not setting.scored_rows:
        return 0
    layer = max(layer.kept.per_row for layer in student.layers)
    tokens = setting.scored_rows * setting.sequence_length
    return (
        _whole(student, setting) + setting.scored_rows * layer + 2 * 4 * min(SCORED_LOGITS, tokens * student.vocabulary)
    )


def _sampling(student: ModelSize, setting: Setting) -> int:
    """The cache at its fullest, and the logits of one token of every sample."""
    if not setting.samples:
        return 0
    samples, tokens = setting.rows * setting.samples, setting.sample_tokens
    if setting.compiled and setting.device != "cpu":
        samples, tokens = few_shapes(samples, tokens)
    width = KEY_BYTES + VALUE_BYTES if setting.autocast else 2 * setting.weight_bytes
    cache = samples * tokens * len(student.layers) * student.key_numbers * width
    return _whole(student, setting) + cache + samples * student.vocabulary * DRAWN_BYTES


def _saving(student: ModelSize, setting: Setting) -> int:
    """Of rank 0: a copy of what the student holds, the frozen weights as its files have them, and what was trained
    once more where that is written in fewer bits."""
    shared, frozen = shared_weights(student, setting), student.parameters - student.trained
    copy = _own_weights(student, setting, shares=True) + setting.teacher_bytes * shared
    rounded = student.trained if setting.stored_bytes < setting.weight_bytes else 0
    return copy + setting.stored_bytes * (frozen + rounded)


def _healing(student: ModelSize, teacher: ModelSize, setting: Setting) -> int:
    """Both models whole, gradient and moments of one layer per gap, the states it learns from and its own work."""
    if not setting.healed_layers:
        return 0
    weights = 4 * student.parameters + setting.teacher_bytes * teacher.parameters
    states = len(setting.healed_layers) * setting.healed_rows * setting.sequence_length * student.hidden
    work = setting.healed_rows * max(layer.kept.per_row for layer in student.layers)
    trained = sum(student.layers[layer].parameters for layer in setting.healed_layers)
    return weights + 12 * trained + setting.teacher_bytes * states + work


def _state(student: ModelSize, setting: Setting) -> int:
    return setting.rows * setting.sequence_length * student.hidden * student.state_bytes


def _handed_over(student: ModelSize, setting: Setting) -> int:
    """Final hidden states: the student's and their supervised copy and gradient, and the teacher's and theirs."""
    own = _state(student, setting)
    if setting.teacher in ("none", "recorded"):
        return 3 * own
    return 3 * own + 2 * own * setting.teacher_bytes // student.state_bytes


def _head(student: ModelSize, teacher: ModelSize, setting: Setting) -> int:
    tokens = min(setting.head_chunk, setting.rows * (setting.sequence_length - 1))
    width = 2 if setting.autocast else setting.weight_bytes
    beside = COMPILED_LOGIT_BYTES if setting.compiled_loss else 0 if setting.device == "cpu" else LOGIT_BYTES
    logits = tokens * student.vocabulary * (RAW_LOGITS * width + beside)
    shares_head = not student.head_trained and shared_weights(student, setting) > 0
    low = width * student.head if setting.autocast and not shares_head else 0  # the head's copy
    # the sum over chunks in fp32, and this chunk's
    gradient = (4 + width) * student.head if student.head_trained else 0
    gathered = 0
    if setting.stage == 3 and setting.ranks > 1:
        gathered = setting.weight_bytes * student.head
        gathered += setting.teacher_bytes * teacher.head * (setting.teacher == "live")
    return logits + low + gradient + gathered


def _teacher(teacher: ModelSize, setting: Setting) -> tuple[int, int]:
    """On the device of a rank, and on the host of a node."""
    width = setting.teacher_bytes
    largest = max(layer.parameters for layer in teacher.layers)
    if setting.teacher in ("none", "recorded"):
        return 0, 0
    if setting.teacher == "offloaded":  # a layer that runs and the next one on its way, embeddings or head
        return width * (2 * largest + teacher.head), setting.ranks_per_node * width * teacher.parameters
    if setting.stage == 3:
        shard = width * teacher.parameters // setting.ranks
        return shard + (2 * width * largest if setting.ranks > 1 else 0), 0
    return width * teacher.parameters, 0


def _buffers(student: ModelSize, setting: Setting) -> tuple[int, int]:
    """For gradients on their way, and for gathered weights."""
    kinds = 2 if setting.autocast else 1  # one for what is sent in bf16, one for the rest
    if setting.stage == 0:
        # the tensor that fills a buffer may be the largest
        at_once = REDUCED_AT_ONCE + student.head * student.head_trained
        return 0 if setting.ranks == 1 else setting.weight_bytes * min(at_once, student.trained), 0
    allocated = setting.bucket * kinds * (1 + (setting.overlap and setting.stage < 3))
    # allocated whole; but a CPU gives memory only for what is filled
    filled = allocated if setting.device != "cpu" else min(allocated, student.trained)
    gathered = setting.weight_bytes * min(setting.live, student.parameters) if setting.stage == 3 else 0
    return filled * setting.weight_bytes, gathered
