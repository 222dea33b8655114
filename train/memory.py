"""How much memory training will take, from configurations alone. B rows, S sequence, D hidden, V vocabulary.

What autograd keeps is not a table's: the student runs once without data (torch's fake tensors) and the tensors saved
for the backward pass are counted, so that every family, precision and frozen layer is counted as it is. What DeepSpeed
keeps is a formula per ZeRO stage, read from its sources (0.19) and checked against runs: docs/scaling.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from shoal.models import decoder_layers, num_parameters, text_config

from .student import final_hidden, output_head

LOGIT_BYTES = 28
"""Per logit of a chunk on a GPU beside the raw ones: log-softmax and softmax of both models in fp32, a term's product
and its gradient, and their sum. On a CPU these exist for a block that fits its cache."""
RAW_LOGITS = 3
"""Student's, teacher's, and their gradient, in the precision of the head's product."""
BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's own reduce_bucket_size."""
LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's own stage3_max_live_parameters: gathered ones that may stay until they are used again."""
LIBRARY_BYTES = 600_000_000
"""Of torch, transformers and DeepSpeed in a process on a CPU."""
FIXED_BYTES = {"cpu": LIBRARY_BYTES + 500_000_000, "cuda": 1_500_000_000}
"""Of a process beside what it trains: on a CPU the libraries, and what the allocator keeps of freed memory (seen in
runs); on a GPU the context, cuBLAS' and NCCL's buffers (a usual figure, not measured here)."""

TeacherPlace = Literal["none", "live", "offloaded", "recorded"]


@dataclass(frozen=True)
class Kept:
    """Bytes that autograd keeps for the backward pass."""

    fixed: int = 0
    """Whatever the batch: low-precision copies of the weights, tables of positions."""
    per_row: int = 0

    def of(self, rows: int) -> int:
        """For a micro-batch."""
        return self.fixed + rows * self.per_row


@dataclass(frozen=True)
class LayerSize:
    """One decoder layer."""

    parameters: int
    trained: int
    matrices: int
    """Weights of linear maps: two floating point operations each per token."""
    kept: Kept = Kept()


@dataclass(frozen=True)
class ModelSize:
    """A model that was built without its weights."""

    parameters: int
    """Tied ones once."""
    trained: int
    layers: tuple[LayerSize, ...]
    head: int
    """Weights of the map to the vocabulary."""
    head_trained: bool
    vocabulary: int
    hidden: int
    state_bytes: int
    """Of one number of the hidden states."""
    pair_flops: int
    """Of attention, one layer, per pair of tokens: scores and values, all heads."""
    outside: Kept = Kept()
    """Kept before the first layer and after the last one."""


@dataclass(frozen=True)
class Setting:
    """What decides how much memory a rank takes, and how long a step."""

    rows: int
    """Of a micro-batch on one rank."""
    sequence_length: int
    head_chunk: int
    accumulation: int = 1
    checkpointing: bool = False
    stage: int = 0
    ranks: int = 1
    ranks_per_node: int = 1
    offload_optimizer: bool = False
    offload_parameters: bool = False
    bucket: int = BUCKET_ELEMENTS
    overlap: bool = False
    live: int = LIVE_ELEMENTS
    weight_bytes: int = 4
    autocast: bool = True
    teacher: TeacherPlace = "live"
    teacher_bytes: int = 2
    """Per weight."""
    device: str = "cuda"


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank's device at its peak, and on one node's host."""

    weights: int
    gradients: int
    optimizer: int
    """Moments, and the fp32 copies that ZeRO keeps of the weights."""
    activations: int
    """And hidden states handed from teacher to student."""
    head: int
    """Logits of a chunk, and what its gradient needs."""
    teacher: int
    buffers: int
    """DeepSpeed's, for communication and gathered weights."""
    fixed: int
    """Of the process."""
    peak: int
    """Not the sum: activations are gone when the optimizer steps."""
    host: int
    """Per node, beyond what loading takes for a moment."""
    host_to_load: int
    """Per node: every rank holds whole models on the host until they are moved or sharded."""


@contextlib.contextmanager
def without_data() -> Iterator[None]:
    """Models built and run here have shapes and no numbers, and take no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True), no_init_weights():
        yield


def built(config: PreTrainedConfig, *, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The causal language model of ``config``, its weights whatever the surrounding context makes of them."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    model.tie_weights()  # is part of the initialisation that without_data leaves out
    return model


def teacher_size(config: PreTrainedConfig, *, attention: str = "sdpa") -> ModelSize:
    """Sizes of a model that nothing is trained of."""
    with without_data():
        model = built(config, dtype=torch.bfloat16, attention=attention).requires_grad_(False)
        return _sizes(model)


def student_size(
    config: PreTrainedConfig,
    *,
    sequence_length: int,
    prepare: Callable[[PreTrainedModel], None],
    dtype: torch.dtype = torch.float32,
    autocast: bool = True,
    attention: str = "sdpa",
) -> ModelSize:
    """Sizes of the student, and what autograd keeps of one row of ``sequence_length`` tokens per layer.

    ``prepare`` freezes what is not trained. The row holds several documents, as packed rows do: masks then are tensors.

    Raises:
        RuntimeError: the family looks at numbers while it runs, as mixtures of experts may.
    """
    with without_data():
        model = built(config, dtype=dtype, attention=attention)
        prepare(model)
        model.train()
        one, state_bytes = _kept(model, 1, sequence_length, autocast=autocast)
        two, _ = _kept(model, 2, sequence_length, autocast=autocast)
        *layers, outside = (Kept(2 * a - b, b - a) for a, b in zip(one, two, strict=True))
        sizes = _sizes(model)
    counted = tuple(replace(layer, kept=kept) for layer, kept in zip(sizes.layers, layers, strict=True))
    return replace(sizes, layers=counted, outside=outside, state_bytes=state_bytes)


def _kept(model: PreTrainedModel, rows: int, length: int, *, autocast: bool) -> tuple[list[int], int]:
    """Bytes saved for the backward pass by each layer and, last, outside of them; and a hidden number's bytes."""
    layers = decoder_layers(model)
    totals, where = [0] * (len(layers) + 1), [len(layers)]
    seen: dict[int, Tensor] = {}  # the tensors too: an address may be used again once its owner is gone
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and storage._cdata not in seen:
            seen[storage._cdata] = tensor
            totals[where[0]] += storage.nbytes()
        return tensor

    handles = []
    for index, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(lambda *_, index=index: where.__setitem__(0, index)))
        handles.append(layer.register_forward_hook(lambda *_: where.__setitem__(0, len(layers))))
    ids = torch.zeros(rows, length, dtype=torch.long)
    positions = (torch.arange(length) % max(2, length // 2)).repeat(rows, 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden_BSD = final_hidden(model, ids, positions)
    for handle in handles:
        handle.remove()
    return totals, hidden_BSD.element_size()


def _sizes(model: PreTrainedModel) -> ModelSize:
    config, head = text_config(model.config), output_head(model)
    heads = getattr(config, "num_attention_heads", 0)
    width = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
    return ModelSize(
        parameters=num_parameters(model),
        trained=_trained(model),
        layers=tuple(
            LayerSize(
                num_parameters(layer),
                _trained(layer),
                sum(p.numel() for p in layer.parameters() if p.dim() > 1),
            )
            for layer in decoder_layers(model)
        ),
        head=head.weight.numel(),
        head_trained=head.weight.requires_grad,
        vocabulary=head.weight.shape[0],
        hidden=config.hidden_size,
        state_bytes=head.weight.element_size(),
        pair_flops=4 * heads * width,
    )


def _trained(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def memory(student: ModelSize, teacher: ModelSize, setting: Setting) -> Memory:
    """What one rank takes with ``setting``; docs/scaling.md has every formula in words."""
    weights, optimizer, gradients, step = _states(student, setting)
    activations, one_layer = _activations(student, setting)
    states = _handed_over(student, setting)
    head = _head(student, teacher, setting)
    teacher_device, teacher_host = _teacher(teacher, setting)
    buffers = _buffers(student, setting)
    host = teacher_host
    device_optimizer = optimizer
    if setting.offload_optimizer:
        host += setting.ranks_per_node * (optimizer + gradients)
        device_optimizer = 0
    if setting.offload_parameters:
        host += setting.ranks_per_node * weights
        weights = 0
    fixed = FIXED_BYTES["cpu" if setting.device == "cpu" else "cuda"]
    always = weights + device_optimizer + teacher_device + buffers + fixed
    # gradients of an earlier micro-batch wait; ZeRO 3 has their place from the beginning
    waiting = gradients if setting.accumulation > 1 or setting.stage == 3 else 0
    on_device = not setting.offload_optimizer
    head_gradient = 4 * student.head if student.head_trained else 0
    forward = activations + states + max(head, head_gradient + one_layer) + waiting * on_device
    backward = gradients * (on_device or setting.stage < 2) + max(one_layer, step * on_device)
    return Memory(
        weights=weights,
        gradients=gradients * on_device,
        optimizer=device_optimizer,
        activations=activations + states,
        head=head,
        teacher=teacher_device,
        buffers=buffers,
        fixed=fixed,
        peak=always + max(forward, backward),
        host=host,
        host_to_load=setting.ranks_per_node
        * (4 * student.parameters + setting.teacher_bytes * (setting.teacher != "recorded") * teacher.parameters)
        // (setting.ranks if setting.stage == 3 else 1),
    )


def _states(student: ModelSize, setting: Setting) -> tuple[int, int, int, int]:
    """Weights, optimizer with master copies, gradients, and what the step itself adds."""
    all_, trained, shards = student.parameters, student.trained, setting.ranks
    width = setting.weight_bytes
    if setting.stage == 0:
        return width * all_, 8 * trained, width * trained, 0
    # stages 1 and 2 copy the weights they step, also where those are fp32 already; 3 only where they are not
    master = 4 * trained // shards if setting.stage < 3 or width < 4 else 0
    optimizer = 8 * trained // shards + master
    shard = 4 * trained // shards
    if setting.stage == 1:
        return width * all_, optimizer, width * trained, shard
    if setting.stage == 2:
        return width * all_, optimizer, shard, shard  # flattened once more for the step
    return width * all_ // shards, optimizer, shard, 0


def _activations(student: ModelSize, setting: Setting) -> tuple[int, int]:
    """What is kept until the backward pass, and what one layer takes while it is worked on."""
    rows = setting.rows
    # under ZeRO 3 DeepSpeed's own linear function keeps no low-precision copy of a weight
    copies = 0 if setting.stage == 3 else sum(layer.kept.fixed for layer in student.layers)
    one_layer = max(layer.kept.per_row for layer in student.layers) * rows
    if not setting.checkpointing:
        kept = sum(layer.kept.per_row for layer in student.layers) * rows
        return copies + kept + student.outside.of(rows), one_layer
    inputs = sum(layer.kept.per_row > 0 for layer in student.layers) * _state(student, setting)
    return copies + inputs + student.outside.of(rows), one_layer


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
    logits = tokens * student.vocabulary * (RAW_LOGITS * width + (LOGIT_BYTES if setting.device != "cpu" else 0))
    low = width * student.head if setting.autocast else 0  # the head's copy
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


def _buffers(student: ModelSize, setting: Setting) -> int:
    kinds = 2 if setting.autocast else 1  # one for what is sent in bf16, one for the rest
    if setting.stage == 0:
        return 0 if setting.ranks == 1 else setting.weight_bytes * min(BUCKET_ELEMENTS, student.trained)
    allocated = setting.bucket * kinds * (1 + (setting.overlap and setting.stage < 3))
    # allocated whole; but a CPU gives memory only for what is filled
    filled = allocated if setting.device != "cpu" else min(allocated, student.trained)
    gathered = setting.weight_bytes * min(setting.live, student.parameters) if setting.stage == 3 else 0
    return gathered + filled * setting.weight_bytes
