"""How much memory training will take, from configurations alone. B rows, S sequence, D hidden, V vocabulary.

What autograd keeps is not a table's: the student runs once without data (torch's fake tensors) and the tensors saved
for the backward pass are counted, so that every family, precision and frozen layer is counted as it is. What DeepSpeed
keeps is a formula per ZeRO stage, read from its sources (0.19) and checked against runs: docs/scaling.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from shoal.anatomy import anatomy
from shoal.models import decoder_layers, num_parameters, text_config

from .adapters import LINEAR
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

QUARTER_BYTES = 4.13 / 8
"""Of a weight in 4 bits, with its share of the scales (QLoRA, arXiv:2305.14314, section 3)."""
SCORED_LOGITS = 1 << 25
"""Logits that exist at one time when a model is scored, and twice."""
DRAWN_BYTES = 36
"""Per logit of tokens that are drawn: raw, in fp32, and three tensors of fp64."""
KEY_BYTES, VALUE_BYTES = 4, 2
"""Of a number in the cache of a model under bf16 autocast: rotary embedding makes keys fp32 again."""

TeacherPlace = Literal["idle", "live", "offloaded", "recorded"]
"""idle: loaded, though no loss term asks it anything."""
Sharing = Literal["none", "linear", "all"]


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
    trained_matrices: int = 0
    frozen: int = 0
    """Weights that are frozen and the teacher's."""
    frozen_linear: int = 0
    """Those of them in linear modules."""
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
    key_numbers: int
    """Of one token in one layer's cache; as many of values."""
    frozen: int = 0
    """Weights that are frozen and the teacher's, in and outside of layers; tied ones once."""
    frozen_linear: int = 0
    """Those of them in linear modules and plain embeddings."""
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
    sharing: Sharing = "none"
    """Frozen weights that are held once for student and teacher: linear maps and embeddings, or all."""
    four_bits: bool = False
    """Linear modules of the layers are held so (QLoRA)."""
    stored_bytes: int = 2
    """Per weight of distilled/."""
    captured: int = 0
    """Bytes per token that loss terms on states hold: the teacher's states, and both models' attention inputs."""
    comparing: int = 0
    """Bytes per token of one comparison of states."""
    relation: int = 0
    """Bytes of one chunk of scores."""
    scored_rows: int = 0
    """Of a forward when distill.watch scores the student; 0 = nothing is watched."""
    samples: int = 0
    """That stand in for one row of an on-policy step; 0 = there are none."""
    sample_tokens: int = 0
    """Prompt and all."""
    healed_layers: tuple[int, ...] = ()
    """Student layers that distill.local trains first."""
    healed_rows: int = 0
    """Of a forward there."""
    writes: bool = False
    """The teacher writes text first, whole on every rank."""


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
    peak_at: str
    """What the rank does then."""
    host: int
    """Per node, all the time."""
    host_briefly: int
    """Per node: every rank holds whole models on the host until they are moved or sharded, and one the whole student
    when it is written."""


@contextlib.contextmanager
def without_data() -> Iterator[None]:
    """Models built and run here have shapes and no numbers, and take no memory.

    Modules are not moved: there is nothing to move, and torch cannot where something looks at a tensor without data.
    """
    move = nn.Module.to
    nn.Module.to = lambda module, *_args, **_kwargs: module  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), no_init_weights():
            yield
    finally:
        nn.Module.to = move


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
    prepare: Callable[[PreTrainedModel], object],
    dtype: torch.dtype = torch.float32,
    autocast: bool = True,
    attention: str = "sdpa",
    edited: Collection[int] = (),
) -> ModelSize:
    """Sizes of the student, and what autograd keeps of one row of ``sequence_length`` tokens per layer.

    ``prepare`` freezes what is not trained and adds what else is. The row holds several documents, as packed rows do:
    masks then are tensors. ``edited`` layers are not the teacher's, trained or not.

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
        sizes = _sizes(model, edited)
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


def _sizes(model: PreTrainedModel, edited: Collection[int] = ()) -> ModelSize:
    config, head = text_config(model.config), output_head(model)
    heads = getattr(config, "num_attention_heads", 0)
    width = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
    layers = tuple(_layer_size(layer, index in edited) for index, layer in enumerate(decoder_layers(model)))
    outside = _outside(model)
    return ModelSize(
        parameters=num_parameters(model),
        trained=_trained(model.parameters()),
        layers=layers,
        head=head.weight.numel(),
        head_trained=head.weight.requires_grad,
        vocabulary=head.weight.shape[0],
        hidden=config.hidden_size,
        state_bytes=head.weight.element_size(),
        pair_flops=4 * heads * width,
        key_numbers=(getattr(config, "num_key_value_heads", None) or heads) * width,
        frozen=sum(layer.frozen for layer in layers) + sum(p.numel() for p in outside if not p.requires_grad),
        frozen_linear=sum(layer.frozen_linear for layer in layers)
        + sum(p.numel() for p, kinds in outside.items() if not p.requires_grad and kinds <= {*LINEAR, nn.Embedding}),
    )


def _layer_size(layer: nn.Module, is_edited: bool) -> LayerSize:
    matrices = [p for p in layer.parameters() if p.dim() > 1]
    linear = {p for module in layer.modules() if type(module) in LINEAR for p in module.parameters(recurse=False)}
    return LayerSize(
        num_parameters(layer),
        _trained(layer.parameters()),
        sum(p.numel() for p in matrices),
        trained_matrices=_trained(matrices),
        frozen=0 if is_edited else sum(p.numel() for p in layer.parameters() if not p.requires_grad),
        frozen_linear=0 if is_edited else sum(p.numel() for p in linear if not p.requires_grad),
    )


def _outside(model: PreTrainedModel) -> dict[nn.Parameter, set[type[nn.Module]]]:
    """Parameters that no layer has, and the kinds of the modules that do: a tied one has two."""
    inside = {p for layer in anatomy(model).layers for p in layer.parameters()}
    found: dict[nn.Parameter, set[type[nn.Module]]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter not in inside:
                found.setdefault(parameter, set()).add(type(module))
    return found


def _trained(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)


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
        "saving": always + stays + (4 + setting.stored_bytes) * student.parameters * (setting.device == "cpu"),
        "the local stage": fixed + _healing(student, teacher, setting),
        "the teacher's writing": fixed + setting.writes * setting.teacher_bytes * teacher.parameters,
    }
    peak_at = max(peaks, key=lambda name: peaks[name])
    loading = 4 * student.parameters + setting.teacher_bytes * (setting.teacher != "recorded") * teacher.parameters
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
            host + (4 + setting.stored_bytes) * student.parameters,
        ),
    )


def shared_weights(student: ModelSize, setting: Setting) -> int:
    """Frozen weights that are the teacher's tensors."""
    if setting.stage == 3 or setting.teacher not in ("live", "idle") or setting.sharing == "none":
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
        return weights, 8 * trained, width * trained, 0
    # stages 1 and 2 copy the weights they step, also where those are fp32 already; 3 only where they are not
    master = 4 * trained // shards if setting.stage < 3 or width < 4 else 0
    optimizer = 8 * trained // shards + master
    shard = 4 * trained // shards
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
    """What is kept until the backward pass, and what one layer takes while it is worked on."""
    rows = setting.rows
    always = _copies(student, setting) + rows * setting.sequence_length * setting.captured + student.outside.of(rows)
    one_layer = max(layer.kept.per_row for layer in student.layers) * rows
    if not setting.checkpointing:
        return always + sum(layer.kept.per_row for layer in student.layers) * rows, one_layer
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
    samples = setting.rows * setting.samples
    width = KEY_BYTES + VALUE_BYTES if setting.autocast else 2 * setting.weight_bytes
    cache = samples * setting.sample_tokens * len(student.layers) * student.key_numbers * width
    return _whole(student, setting) + cache + samples * student.vocabulary * DRAWN_BYTES


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
    if setting.teacher in ("idle", "recorded"):
        return 3 * own
    return 3 * own + 2 * own * setting.teacher_bytes // student.state_bytes


def _head(student: ModelSize, teacher: ModelSize, setting: Setting) -> int:
    tokens = min(setting.head_chunk, setting.rows * (setting.sequence_length - 1))
    width = 2 if setting.autocast else setting.weight_bytes
    logits = tokens * student.vocabulary * (RAW_LOGITS * width + (LOGIT_BYTES if setting.device != "cpu" else 0))
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
    if setting.teacher == "recorded":
        return 0, 0
    if setting.teacher == "offloaded":  # a layer that runs and the next one on its way, embeddings or head
        return width * (2 * largest + teacher.head), setting.ranks_per_node * width * teacher.parameters
    if setting.stage == 3:
        shard = width * teacher.parameters // setting.ranks
        return shard + (2 * width * largest if setting.ranks > 1 and setting.teacher == "live" else 0), 0
    return width * teacher.parameters, 0


def _buffers(student: ModelSize, setting: Setting) -> tuple[int, int]:
    """For gradients on their way, and for gathered weights."""
    kinds = 2 if setting.autocast else 1  # one for what is sent in bf16, one for the rest
    if setting.stage == 0:
        return 0 if setting.ranks == 1 else setting.weight_bytes * min(BUCKET_ELEMENTS, student.trained), 0
    allocated = setting.bucket * kinds * (1 + (setting.overlap and setting.stage < 3))
    # allocated whole; but a CPU gives memory only for what is filled
    filled = allocated if setting.device != "cpu" else min(allocated, student.trained)
    gathered = setting.weight_bytes * min(setting.live, student.parameters) if setting.stage == 3 else 0
    return filled * setting.weight_bytes, gathered
