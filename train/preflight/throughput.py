"""How long training will take: operations per token, and a short probe of the real objective where it fits."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.data.packing import SOURCES
from shoal.machine import now
from shoal.models.anatomy import text_config
from shoal.numerics import flops_per_second
from shoal.progress import doing
from shoal.recipe.distill import Record

from ..objective.capture import Captured
from ..objective.host_batch import ON_HOST, on_host
from ..objective.layer_losses import StateLosses
from ..objective.objective import SharedPrefix, Signals
from ..student.sizes import ModelSize, built
from ..student.spec import TrainSpec
from ..teacher.wiring import make_trainable_alike, wire
from .memory import Setting
from .optimizers import timed_optimizer

PROBE_BATCHES = 3
"""Whole micro-batches of a probe; the fastest counts, the first also brings the machine to work."""
FIRST_TOKENS = 16
"""Tokens of the first piece that a probe runs; it grows by GROWTH to a whole micro-batch, while there is time."""
GROWTH = 4
PROBE_S = 15.0
"""Seconds after which no further piece is begun."""


@dataclass(frozen=True)
class Pace:
    """What a probe has measured on this machine, one rank."""

    tokens_per_s: float
    """Tokens per second of forward and backward passes."""
    optimizer_s: float
    """Seconds of one optimizer step over everything that is trained."""
    loss: float
    """Loss of one token of models with random weights, in nats: it says only that the objective ran."""
    num_tokens: int
    """Tokens of the largest piece that was run: a whole micro-batch, or what there was time for."""


def flops_per_token(student: ModelSize, teacher: ModelSize, setting: Setting, *, shared: bool) -> float:
    """Floating point operations of one token of one micro-batch: teacher, student, both directions.

    Two per weight and direction, and attention over the whole row, which packed rows compute in full and mask. Element
    by element work is left out, and so is the optimizer. ``shared``: the student does not run its lowest frozen
    layers; a live teacher runs them for both.
    """
    length = setting.sequence_length
    total, teacher_runs = 0.0, setting.teacher in ("live", "offloaded")
    for layer in student.layers:
        forward = 2 * layer.matrices + student.pair_flops * length
        works = layer.kept.per_row > 0
        if works:  # the gradient of what attention reads takes twice its forward, whatever is trained
            backward = forward + student.pair_flops * length + 2 * layer.trained_matrices
            total += forward * (1 + (setting.checkpointing and not setting.selective)) + backward
        elif not shared:
            total += forward
    total += 2 * student.head * (2 + student.head_trained)
    if teacher_runs:
        layers = [2 * layer.matrices + teacher.pair_flops * length for layer in teacher.layers]
        for_both = sum(layer.kept.per_row == 0 for layer in student.layers) if shared else 0
        total += sum(layers[:for_both]) + setting.asked * (sum(layers[for_both:]) + 2 * teacher.head)
    return total


def most_tokens_per_s(spec: TrainSpec, flops: float | None) -> float | None:
    """Tokens per second of all ranks if every one of the ``flops`` operations of a token were as fast as a matrix
    product; None where these could not be counted."""
    if flops is None:
        return None
    return spec.ranks.machines * flops_per_second(spec.ranks.device, spec.deepspeed.product_dtype) / flops


def probe(spec: TrainSpec, setting: Setting) -> Pace:
    """Run a few micro-batches of the real objective on random weights: how fast it is depends on their shapes alone.

    One rank, without DeepSpeed: what ranks send each other is not in it. Takes the memory that training takes at ZeRO
    stage 0. Where a whole micro-batch would take longer than PROBE_S, a piece of it stands for it: the time of a token
    then leaves out what attention takes more in longer rows.
    """
    torch.manual_seed(0)
    live, attention, device = None, spec.teacher.load.attention, spec.ranks.device
    with doing("building models of random weights"), torch.device(device):
        student = built(spec.student.config, dtype=torch.float32, attention=attention).train()
        make_trainable_alike(student, spec)
        if spec.runs_teacher:
            live = (
                built(spec.teacher.config, dtype=spec.teacher_dtype, attention=attention).requires_grad_(False).eval()
            )
    if setting.checkpointing and not setting.selective:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = timed_optimizer((p for p in student.parameters() if p.requires_grad), spec.settings, spec.deepspeed)
    vocabulary, begun = text_config(spec.student.config).vocab_size, now(device)
    fastest, tokens, loss = math.inf, 0, math.nan
    with _step(spec, student, live, autocast=setting.autocast) as step:
        for piece in _pieces(setting):
            size = piece.rows * piece.sequence_length
            expected = size * fastest / tokens if tokens else 0.0
            if now(device) - begun + expected > PROBE_S and tokens:
                break
            batch = _batch(vocabulary, piece, device, spec)
            with doing(f"timing {size:,} tokens of the objective"):
                started = now(device)
                total = step(batch)
                loss = total.item() / size
                (total / size).backward()
                taken = now(device) - started
            fastest, tokens = taken if size > tokens else min(fastest, taken), size
    with doing("timing the optimizer"):
        optimizer.step()  # makes its moments
        started = now(device)
        optimizer.step()
    return Pace(tokens / fastest, now(device) - started, loss, tokens)


def _pieces(setting: Setting) -> Iterator[Setting]:
    """What a probe runs, the smallest twice: the first run of all brings the machine to work and foretells nothing."""
    length = min(FIRST_TOKENS, setting.sequence_length)
    yield replace(setting, rows=1, sequence_length=length)
    while length < setting.sequence_length:
        yield replace(setting, rows=1, sequence_length=length)
        length *= GROWTH
    whole = setting.rows
    if whole > 1:
        yield replace(setting, rows=1)
    for _ in range(PROBE_BATCHES):
        yield setting


@dataclass(frozen=True)
class _RandomRecording:
    """Signals of the shapes of recorded ones."""

    vocabulary: int
    hidden: int
    states: StateLosses | None
    prefix: SharedPrefix | None
    top_k: int = Record().top_k

    def __call__(self, batch: Mapping[str, Tensor]) -> Signals:
        ids_BS = batch["input_ids"]
        scores_BSK = torch.randn(*ids_BS.shape, self.top_k + 1, device=ids_BS.device)
        if self.prefix is not None:
            self.prefix.take(torch.randn(*ids_BS.shape, self.hidden, device=ids_BS.device))
        captured = Captured()
        for layer in () if self.states is None else self.states.teacher_layers:
            captured.states[layer] = torch.randn(*ids_BS.shape, self.hidden, device=ids_BS.device)
        return Signals(
            ids_BSK=torch.arange(self.top_k, device=ids_BS.device).expand(*ids_BS.shape, -1) % self.vocabulary,
            log_probs_BSK=scores_BSK.log_softmax(-1)[..., :-1],
            captured=captured,
        )


@contextlib.contextmanager
def _step(
    spec: TrainSpec, student: PreTrainedModel, live: PreTrainedModel | None, *, autocast: bool
) -> Iterator[Callable[[dict[str, Any]], Tensor]]:
    """Batch -> the loss sum of one micro-batch, as the trainer computes it. Models are themselves again behind it, and
    so is what kernels were put into for all models of a family."""
    config = text_config(student.config)
    # to compile takes longer than what is timed here
    spec = replace(spec, settings=replace(spec.settings, compile=False))
    wiring = wire(spec, student, live, partial(_RandomRecording, config.vocab_size, config.hidden_size))

    def step(batch: dict[str, Any]) -> Tensor:
        signals = wiring.teacher(batch)
        replaying = contextlib.nullcontext() if wiring.prefix is None else wiring.prefix.replaying(torch.float32)
        with replaying, torch.autocast(student.device.type, spec.deepspeed.product_dtype, enabled=autocast):
            return student(**batch, signals=signals)[0]

    wiring.objective.install()
    try:
        yield step
    finally:
        wiring.objective.uninstall()


def _batch(vocabulary: int, setting: Setting, device: torch.device, spec: TrainSpec) -> dict[str, Any]:
    """Random tokens, two documents to a row: packed rows take another way through attention than whole ones. As many
    rows as a micro-batch has on average, rounded up, are of a source that the teacher is asked about."""
    shape = (setting.rows, setting.sequence_length)
    ids = torch.randint(0, vocabulary, shape, device=device)
    positions = torch.arange(setting.sequence_length, device=device) % max(2, setting.sequence_length // 2)
    batch = {"input_ids": ids, "position_ids": positions.repeat(setting.rows, 1), "labels": ids}
    if (asked := spec.asked_sources) is None:
        return batch
    others = {*range(len(spec.settings.data))} - asked
    sources_BS = torch.full(shape, min(others, default=0))
    if asked:
        sources_BS[: math.ceil(setting.asked * setting.rows)] = min(asked)
    return {**batch, ON_HOST: on_host({**batch, SOURCES: sources_BS})}
