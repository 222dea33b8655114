"""Speed, memory and size of several models, in turns, so that a busy moment of the machine hits all of them.

Beside what is measured stands what the number of layers lets expect: see expectation.
"""

from __future__ import annotations

import copy
import logging
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.evaluation import MODEL
from shoal.artifacts.speed import BatchSpeed, Speed, SpeedScore
from shoal.errors import UserError
from shoal.inference.decoder import Decoder
from shoal.machine import device_memory, now
from shoal.models.anatomy import text_config
from shoal.models.checkpoint_files import checkpoint_bytes
from shoal.models.cost import Cost, decode_bytes, model_cost, prefill_flops
from shoal.models.load import Checkpoint, loaded_bytes, num_parameters, without_data
from shoal.progress import progress
from shoal.runtime import device

log = logging.getLogger(__name__)

BATCH_SIZES = {"cpu": (1, 4)}
"""Batch sizes by kind of device; the first is what a single user sees."""
OTHER_BATCH_SIZES = (1, 8, 32)
"""Batch sizes on an accelerator."""
FEWER_REPEATS = 3
"""Rounds of the batch sizes after the first, which take longer and vary less."""
KINDS = ("prefill", "decode", "first_token")
HALF_DEPTH = "half of the teacher's layers"
"""Name in the log of what is measured where no role is a cut of the teacher."""


@dataclass(frozen=True)
class _Entry:
    """One role's model and what is known of it before it runs."""

    decoder: Decoder
    weight_bytes: int
    """Bytes of parameters and buffers in memory."""
    num_bytes: int | None
    """Bytes of the weights on disk; None = the model came from no folder."""


def measure_speed(
    models: Mapping[str, Checkpoint | PreTrainedModel],
    *,
    provenance: Provenance,
    batch_sizes: Sequence[int] | None = None,
    cut_half: Callable[[PreTrainedModel], PreTrainedModel] | None = None,
    prompt_tokens: int = 256,
    new_tokens: int = 32,
    repeats: int = 5,
) -> Speed:
    """Median speeds of every role at every batch size, over rounds in which each role takes one turn.

    Checkpoints are loaded here and kept in memory together: reloading between turns would measure a cold model. The
    first round of a batch size warms up, measures memory and is not timed; the order of the roles turns from round to
    round. Random tokens: speed does not depend on what is read. ``batch_sizes`` None = BATCH_SIZES; a size for which
    the memory will not do is left out, and the result says so. ``cut_half`` gives the teacher without half of its
    layers, in the same storage: that model takes its turns too where no role has fewer layers than the teacher.

    Raises:
        UserError: a prompt that does not fit the model's positions, or a model that keeps no cache of keys and values.
    """
    entries = {role: _entry(role, model, prompt_tokens + new_tokens) for role, model in models.items()}
    if cut_half and (half := _half_depth(entries, cut_half)):
        entries[HALF_DEPTH] = half
    first = next(iter(entries.values())).decoder
    sizes = sorted(set(batch_sizes or BATCH_SIZES.get(first.device.type, OTHER_BATCH_SIZES)))
    batches: dict[str, list[BatchSpeed]] = {role: [] for role in entries}
    left_out: list[str] = []
    for size in sizes:
        if reason := _why_too_large(size, entries, batches):
            log.warning("speed: %s", reason)
            left_out.append(reason)
            continue
        rounds = repeats if size == sizes[0] else min(repeats, FEWER_REPEATS)
        for role, speed in _measured(entries, (size, prompt_tokens, new_tokens), rounds).items():
            batches[role].append(speed)
            log.info(
                "speed: %s, %d at once: prefill %.0f, decode %.1f tokens/s, first token after %.2f s",
                *(role, size, speed.prefill_tokens_per_s, speed.decode_tokens_per_s, speed.first_token_s),
            )
    roles = {role: _score(entry, batches[role]) for role, entry in entries.items()}
    half_depth = roles.pop(HALF_DEPTH, None)
    return Speed(
        provenance=provenance,
        half_depth=half_depth,
        roles=_with_expectations(roles, entries, prompt_tokens, new_tokens),
        batch_size=sizes[0],
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        dtype=str(first.model.dtype).removeprefix("torch."),
        left_out=tuple(left_out),
    )


def expectation(
    teacher: Cost, num_layers: int, *, batch_size: int, prompt_tokens: int, new_tokens: int, bytes_per_parameter: float
) -> tuple[float, float]:
    """Factors by which prefill and decoding should be faster with ``num_layers`` layers like the teacher's.

    Reading a prompt takes multiplications, writing takes reading weights and cache from memory; what is outside the
    layers stays. So a model of half the layers is less than twice as fast, most of all where its vocabulary is large.
    """
    student, length = teacher.at_depth(num_layers), prompt_tokens + new_tokens // 2
    work = [prefill_flops(cost, prompt_tokens) for cost in (teacher, student)]
    read = [
        decode_bytes(cost, bytes_per_parameter=bytes_per_parameter, num_tokens=length, batch_size=batch_size)
        for cost in (teacher, student)
    ]
    return work[0] / work[1], read[0] / read[1]


def _entry(role: str, source: Checkpoint | PreTrainedModel, num_tokens: int) -> _Entry:
    """The model of ``role`` in memory, once it is known to take so many tokens and to keep a cache."""
    is_stored = isinstance(source, Checkpoint)
    if is_stored:
        needed = loaded_bytes(source.folder, source.config, source.load.dtype)
        if needed > (free := device_memory(device())):
            raise UserError(
                f"speed: {role} takes {needed / 1e9:.1f} GB beside the models before it, and {free / 1e9:.1f} GB are "
                "free; set eval.speed: false, or measure where all of them fit"
            )
    model = source.model(device=device()) if is_stored else source
    positions = getattr(text_config(model.config), "max_position_embeddings", None)
    if positions is not None and num_tokens > positions:
        raise UserError(
            f"speed: prompt and new tokens make {num_tokens}, but {role} has {positions} positions; "
            "set eval.speed: false"
        )
    decoder = Decoder(model)
    if not decoder.can_branch:
        raise UserError(
            f"speed: {role} keeps no cache of keys and values to measure decoding with; set eval.speed: false"
        )
    return _Entry(decoder, _weight_bytes(model), checkpoint_bytes(source.folder) if is_stored else None)


def _half_depth(entries: Mapping[str, _Entry], cut_half: Callable[[PreTrainedModel], PreTrainedModel]) -> _Entry | None:
    """The teacher at half its depth; None where a role is shallower already, or the teacher cannot be cut so."""
    depths = {role: text_config(entry.decoder.model.config).num_hidden_layers for role, entry in entries.items()}
    if "teacher" not in entries or depths["teacher"] < 2 or min(depths.values()) < depths["teacher"]:
        return None
    try:
        model = cut_half(entries["teacher"].decoder.model)
    except UserError as error:
        log.info("speed: nothing is measured at half the teacher's depth: %s", error)
        return None
    return _Entry(Decoder(model), _weight_bytes(model), None)


def _measured(entries: Mapping[str, _Entry], work: tuple[int, int, int], rounds: int) -> dict[str, BatchSpeed]:
    """Every role's speeds at one batch size; ``work`` = batch size, prompt tokens and new tokens."""
    batch_size, prompt_tokens, new_tokens = work
    samples = {role: {kind: [] for kind in KINDS} for role in entries}
    order = list(entries)
    turns = [role for turn in range(rounds) for role in order[turn % len(order) :] + order[: turn % len(order)]]
    with progress(f"speed: {batch_size} at once", total=len(order) + len(turns), unit="turns") as step:
        peaks: dict[str, int] = {}
        for role, entry in entries.items():
            growth = peak_growth(entry.decoder.device, lambda entry=entry: _one_turn(entry.decoder, *work))
            peaks[role] = entry.weight_bytes + growth
            step()
        for role in turns:
            first_s, decode_s = _one_turn(entries[role].decoder, *work)
            step()
            samples[role]["prefill"].append(batch_size * prompt_tokens / first_s)
            samples[role]["decode"].append(batch_size * new_tokens / decode_s)
            samples[role]["first_token"].append(first_s)
    return {
        role: BatchSpeed(
            batch_size,
            prefill_tokens_per_s=statistics.median(kinds["prefill"]),
            decode_tokens_per_s=statistics.median(kinds["decode"]),
            first_token_s=statistics.median(kinds["first_token"]),
            peak_memory_bytes=peaks[role],
            samples={kind: tuple(values) for kind, values in kinds.items()},
        )
        for role, kinds in samples.items()
    }


def _one_turn(decoder: Decoder, batch_size: int, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    """Seconds of reading the prompt until the first new token is known, and of the ``new_tokens`` after it."""
    vocab_size = text_config(decoder.model.config).vocab_size
    prompt_BS = torch.randint(0, vocab_size, (batch_size, prompt_tokens), device=decoder.device)
    cache = decoder.new_cache()
    started = now(decoder.device)
    token_B = decoder.logits(decoder.hidden(prompt_BS, cache=cache)[:, -1]).argmax(dim=-1)
    read = now(decoder.device)
    for _ in range(new_tokens):
        token_B = decoder.logits(decoder.hidden(token_B.unsqueeze(1), cache=cache)[:, -1]).argmax(dim=-1)
    written = now(decoder.device)
    return read - started, written - read


def peak_growth(where: torch.device, work: Callable[[], object]) -> int:
    """Bytes of tensors that ``work`` adds to those from before, at its fullest moment.

    As torch's allocator counts them: on an accelerator all it hands out, on a CPU without what libraries take for
    themselves. Resident memory would tell less of one model, as all are in the same process and freed memory is kept.
    """
    if where.type != "cpu":
        before = torch.accelerator.memory_allocated(where)
        torch.accelerator.reset_peak_memory_stats(where)
        work()
        return torch.accelerator.max_memory_allocated(where) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler says on stderr that it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    results: Any = trace.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _weight_bytes(model: PreTrainedModel) -> int:
    storages = {
        storage.data_ptr(): storage.nbytes()
        for tensor in (*model.parameters(), *model.buffers())
        for storage in [tensor.untyped_storage()]
    }
    return sum(storages.values())


def _why_too_large(size: int, entries: Mapping[str, _Entry], measured: Mapping[str, Sequence[BatchSpeed]]) -> str:
    """Why a batch size will not fit, by what the last one took; empty where it will."""
    for role, entry in entries.items():
        if not measured[role] or (taken := measured[role][-1].peak_memory_bytes) is None:
            continue
        needed = (taken - entry.weight_bytes) * size / measured[role][-1].batch_size
        where = entry.decoder.device
        if where.type != "cpu":
            torch.accelerator.empty_cache()
        if needed > (free := device_memory(where)):
            return (
                f"batch size {size} is left out: {role} would need {needed / 1e9:.1f} GB besides its weights, and "
                f"{free / 1e9:.1f} GB are free"
            )
    return ""


def _score(entry: _Entry, batches: Sequence[BatchSpeed]) -> SpeedScore:
    return SpeedScore(
        prefill_tokens_per_s=batches[0].prefill_tokens_per_s,
        decode_tokens_per_s=batches[0].decode_tokens_per_s,
        samples={kind: batches[0].samples[kind] for kind in ("prefill", "decode")},
        batches=tuple(batches),
        num_layers=text_config(entry.decoder.model.config).num_hidden_layers,
        num_parameters=num_parameters(entry.decoder.model),
        num_bytes=entry.num_bytes,
        kv_bytes_per_token=entry.decoder.cache_bytes,
    )


def _with_expectations(
    roles: dict[str, SpeedScore], entries: Mapping[str, _Entry], prompt_tokens: int, new_tokens: int
) -> dict[str, SpeedScore]:
    """The same scores, beside each value that which the teacher's and the layer count let expect."""
    if "teacher" not in roles:
        return roles
    teacher, entry = roles["teacher"], entries["teacher"]
    model = entry.decoder.model
    try:
        cost = model_cost(without_data(copy.deepcopy(model.config), dtype=model.dtype))
    except UserError as error:
        log.info("speed: nothing is expected beforehand: %s", error)
        return roles
    width = sum(parameter.nbytes for parameter in model.parameters()) / num_parameters(model)
    expected = dict(roles)
    for role, score in roles.items():
        if role not in ("teacher", MODEL) and score.num_layers is not None:
            expected[role] = _expected(score, teacher, cost, width, prompt_tokens, new_tokens)
    return expected


def _expected(
    score: SpeedScore, teacher: SpeedScore, cost: Cost, width: float, prompt_tokens: int, new_tokens: int
) -> SpeedScore:
    assert score.num_layers is not None
    depth = cost.at_depth(score.num_layers)
    kept = depth.num_parameters / cost.num_parameters
    sizes = {"num_parameters": float(depth.num_parameters)}
    if teacher.num_bytes is not None:
        sizes["num_bytes"] = teacher.num_bytes * kept
    if teacher.kv_bytes_per_token is not None:
        sizes["kv_bytes_per_token"] = teacher.kv_bytes_per_token * score.num_layers / cost.num_layers
    batches = []
    for own, whole in zip(score.batches, teacher.batches, strict=True):
        faster_prefill, faster_decode = expectation(
            cost,
            score.num_layers,
            batch_size=own.batch_size,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            bytes_per_parameter=width,
        )
        expected = {
            "prefill_tokens_per_s": whole.prefill_tokens_per_s * faster_prefill,
            "decode_tokens_per_s": whole.decode_tokens_per_s * faster_decode,
            "first_token_s": whole.first_token_s / faster_prefill,
        }
        if whole.peak_memory_bytes is not None:
            cached = [side.cache_bytes(prompt_tokens + new_tokens) if side.cache else 0 for side in (cost, depth)]
            less = (cost.num_parameters - depth.num_parameters) * width + own.batch_size * (cached[0] - cached[1])
            expected["peak_memory_bytes"] = whole.peak_memory_bytes - less
        batches.append(replace(own, expected=expected))
    return replace(score, batches=tuple(batches), expected=sizes)
