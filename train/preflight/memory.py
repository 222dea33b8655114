"""How much memory training will take, from configurations alone. B rows, S sequence, D hidden, V vocabulary.

What models take and autograd keeps is counted in sizes.py. What DeepSpeed keeps is a formula per ZeRO stage, read from
its sources (0.19) and checked against runs: docs/scaling.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..engine.sharding import REDUCED_AT_ONCE
from ..student.sizes import ModelSize
from ..student.spec import TeacherPlace

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
    optimizer_bytes: float = 8
    """Bytes of the moments of one trained weight."""
    offload_optimizer: bool = False
    """Optimizer state and gradients lie on the host."""
    offload_parameters: bool = False
    """Weights lie on the host."""
    bucket: int = BUCKET_ELEMENTS
    """Gradients that ranks add up at one time."""
    overlap: bool = False
    """A second bucket is filled while the first is on its way."""
    weight_bytes: int = 4
    """Bytes of a weight of the student."""
    autocast: bool = True
    """Matrix products are computed in half precision from fp32 weights."""
    teacher: TeacherPlace = "live"
    """Place that the teacher's signals come from."""
    teacher_bytes: int = 2
    """Bytes of a weight of the teacher."""
    device: str = "cuda"
    """Type of the device, as torch calls it."""
    shares: bool = False
    """Frozen linear maps and embeddings are held once for student and teacher."""
    four_bits: bool = False
    """Linear modules of the layers are held in 4 bits (QLoRA)."""
    compiled: bool = False
    """Layers run compiled."""
    kept_share: float = 1.0
    """Share of what a layer keeps for the backward pass that other kernels leave."""
    logit_bytes: int = 0
    """Bytes of a chunk's logit beside the raw ones."""
    captured: int = 0
    """Bytes per token that loss terms on states hold: the teacher's states, and both models' attention inputs."""
    gathers: bool = False
    """The student is run outside of training, for which ZeRO 3 gathers it whole on every rank."""
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
    host: int
    """Bytes per node at the fullest moment: what is offloaded, or whole models that are loaded there first."""


def memory(student: ModelSize, teacher: ModelSize, setting: Setting) -> Memory:
    """What one rank takes with ``setting``; docs/scaling.md has every formula in words."""
    weights, optimizer, gradients, step = _states(student, setting)
    activations, one_layer = _activations(student, setting)
    head = _head(student, teacher, setting)
    on_device, host = _teacher(teacher, setting)
    communication, gathered = _buffers(student, setting)
    kept = not setting.offload_optimizer
    host += setting.ranks_per_node * ((not kept) * (optimizer + gradients) + setting.offload_parameters * weights)
    optimizer, weights = optimizer * kept, weights * (not setting.offload_parameters)
    fixed = FIXED_BYTES["cpu" if setting.device == "cpu" else "cuda"]
    always = weights + optimizer + on_device + fixed
    # gradients of an earlier micro-batch wait; ZeRO 3 has their place from the beginning
    waiting = gradients * kept * (setting.accumulation > 1 or setting.stage == 3)
    head_gradient = 4 * student.head * student.head_trained
    forward = activations + max(head, head_gradient + one_layer) + waiting
    backward = gradients * (kept or setting.stage < 2) + max(one_layer, step * kept)
    whole = setting.weight_bytes * student.parameters
    peaks = (
        always + communication + gathered + max(forward, backward),
        fixed + (_own_weights(student, setting, shares=False) + on_device) * (setting.stage < 3),  # they are loaded
        always + gradients * kept + communication + whole if setting.gathers and setting.stage == 3 else 0,
    )
    loading = whole + setting.teacher_bytes * (setting.teacher in ("live", "offloaded")) * teacher.parameters
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
        host=max(host, setting.ranks_per_node * loading // (setting.ranks if setting.stage == 3 else 1)),
    )


def shared_weights(student: ModelSize, setting: Setting) -> int:
    """Frozen weights that are the teacher's tensors."""
    if setting.stage == 3 or setting.teacher != "live" or not setting.shares:
        return 0
    return student.frozen_linear - _in_four_bits(student, setting)


def _in_four_bits(student: ModelSize, setting: Setting) -> int:
    return sum(layer.frozen_linear for layer in student.layers) if setting.four_bits else 0


def _own_weights(student: ModelSize, setting: Setting, *, shares: bool) -> int:
    """Bytes of a whole student on one device, with or without what it shares with the teacher."""
    quarter = _in_four_bits(student, setting)
    plain = student.parameters - quarter - (shared_weights(student, setting) if shares else 0)
    return setting.weight_bytes * plain + int(QUARTER_BYTES * quarter)


def _states(student: ModelSize, setting: Setting) -> tuple[int, int, int, int]:
    """Weights, optimizer with master copies, gradients, and what the step itself adds."""
    trained, shards = student.trained, setting.ranks if setting.stage else 1
    width, weights = setting.weight_bytes, _own_weights(student, setting, shares=True)
    moments = int(setting.optimizer_bytes * trained) // shards
    if setting.stage == 0:
        return weights, moments, width * trained, 0
    # stages 1 and 2 copy the weights they step, also where those are fp32 already; 3 only where they are not
    optimizer = moments + (4 * trained // shards if setting.stage < 3 or width < 4 else 0)
    shard = 4 * trained // shards
    if setting.stage == 1 and width < 4:  # beside the gradients as they come their fp32 sum, whole
        return weights, optimizer, (width + 4) * trained, 0
    if setting.stage == 1:
        return weights, optimizer, width * trained, shard
    if setting.stage == 2:
        return weights, optimizer, shard, shard  # flattened once more for the step
    return weights // shards, optimizer, shard, 0


def _copies(student: ModelSize, setting: Setting) -> int:
    """Low-precision copies of the layers' weights, which autocast makes and keeps."""
    if setting.stage == 3:  # DeepSpeed's own linear function keeps none
        return 0
    fixed = sum(layer.kept.fixed for layer in student.layers)
    if shared_weights(student, setting) or setting.four_bits:
        fixed -= sum(min(layer.kept.fixed, 2 * layer.frozen_linear) for layer in student.layers)
    return fixed


def _activations(student: ModelSize, setting: Setting) -> tuple[int, int]:
    """What is kept until the backward pass with what models hand to the loss, and what one layer takes while it is
    worked on."""
    rows = setting.rows
    state = rows * setting.sequence_length * student.hidden * student.state_bytes
    # final states: the student's and their supervised copy and gradient, and a live teacher's and theirs
    handed = 3 * state
    if setting.teacher in ("live", "offloaded"):
        handed += 2 * state * setting.teacher_bytes // student.state_bytes
    always = handed + _copies(student, setting) + student.outside.of(rows)
    always += rows * setting.sequence_length * setting.captured
    of_layers = [int(setting.kept_share * layer.kept.per_row) * rows for layer in student.layers]
    if not setting.checkpointing:
        return always + sum(of_layers), max(of_layers)
    if setting.selective:
        return always + int(PRODUCTS_SHARE * sum(of_layers)), max(of_layers)
    return always + sum(kept > 0 for kept in of_layers) * state, max(of_layers)


def _head(student: ModelSize, teacher: ModelSize, setting: Setting) -> int:
    tokens = min(setting.head_chunk, setting.rows * (setting.sequence_length - 1))
    width = 2 if setting.autocast else setting.weight_bytes
    logits = tokens * student.vocabulary * (RAW_LOGITS * width + setting.logit_bytes)
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
    gathered = setting.weight_bytes * min(LIVE_ELEMENTS, student.parameters) if setting.stage == 3 else 0
    return filled * setting.weight_bytes, gathered
