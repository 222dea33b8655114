"""Speed, memory and size of several models, in turns, so that a busy moment of the machine hits all of them."""

from __future__ import annotations

import logging
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.evaluation import BatchSpeed, Speed, SpeedScore
from shoal.errors import UserError
from shoal.inference.decoder import Decoder
from shoal.machine import device_memory, now
from shoal.models.anatomy import text_config
from shoal.models.checkpoint_files import checkpoint_bytes
from shoal.models.load import Checkpoint, loaded_bytes, num_parameters
from shoal.progress import progress
from shoal.runtime import device

log = logging.getLogger(__name__)

BATCH_SIZES = {"cpu": (1, 4)}
"""Batch sizes by kind of device; the first is what a single user sees."""
OTHER_BATCH_SIZES = (1, 8, 32)
"""Batch sizes on an accelerator."""
PROMPT_TOKENS, NEW_TOKENS, REPEATS = 256, 32, 5
"""Of every turn; rounds of the first batch size."""
FEWER_REPEATS = 3
"""Rounds of the batch sizes after the first, which take longer and vary less."""
KINDS = ("prefill", "decode", "first_token")


@dataclass(frozen=True)
class _Entry:
    """One role's model and what is known of it before it runs."""

    decoder: Decoder
    weight_bytes: int
    """Bytes of parameters and buffers in memory."""
    num_bytes: int
    """Bytes of the weights on disk."""


def measure_speed(
    checkpoints: Mapping[str, Checkpoint], *, provenance: Provenance, batch_sizes: Sequence[int] | None = None
) -> Speed:
    """Median speeds of every role at every batch size, over rounds in which each role takes one turn.

    Checkpoints are loaded here and kept in memory together: reloading between turns would measure a cold model. The
    first round of a batch size warms up, measures memory and is not timed; the order of the roles turns from round to
    round. Random tokens: speed does not depend on what is read. ``batch_sizes`` None = BATCH_SIZES; a size for which
    the memory will not do is left out, and the result says so.

    Raises:
        UserError: a prompt that does not fit the model's positions, or a model that keeps no cache of keys and values.
    """
    entries = {role: _entry(role, checkpoint) for role, checkpoint in checkpoints.items()}
    first = next(iter(entries.values())).decoder
    sizes = rounds_of(batch_sizes, first.device.type)
    batches: dict[str, list[BatchSpeed]] = {role: [] for role in entries}
    left_out: list[str] = []
    for size, rounds in sizes.items():
        if reason := _why_too_large(size, entries, batches):
            log.warning("speed: %s", reason)
            left_out.append(reason)
            continue
        for role, speed in _measured(entries, size, rounds).items():
            batches[role].append(speed)
            log.info(
                "speed: %s, %d at once: prefill %.0f, decode %.1f tokens/s, first token after %.2f s",
                *(role, size, speed.prefill_tokens_per_s, speed.decode_tokens_per_s, speed.first_token_s),
            )
    return Speed(
        provenance=provenance,
        roles={role: _score(entry, batches[role]) for role, entry in entries.items()},
        batch_size=next(iter(sizes)),
        prompt_tokens=PROMPT_TOKENS,
        new_tokens=NEW_TOKENS,
        dtype=str(first.model.dtype).removeprefix("torch."),
        left_out=tuple(left_out),
    )


def rounds_of(batch_sizes: Sequence[int] | None, device: str) -> dict[int, int]:
    """Batch size -> rounds that are timed, the smallest first; None = those of this kind of device."""
    first, *others = sorted(set(batch_sizes or BATCH_SIZES.get(device, OTHER_BATCH_SIZES)))
    return {first: REPEATS, **dict.fromkeys(others, FEWER_REPEATS)}


def _entry(role: str, checkpoint: Checkpoint) -> _Entry:
    """The model of ``role`` in memory, once it is known to take the tokens of a turn and to keep a cache."""
    num_tokens = PROMPT_TOKENS + NEW_TOKENS
    needed, free = loaded_bytes(checkpoint.folder, checkpoint.config, checkpoint.load.dtype), device_memory(device())
    positions = getattr(text_config(checkpoint.config), "max_position_embeddings", None) or num_tokens
    if needed > free:
        why = (
            f"needs {needed / 1000000000.0:.1f} GB on top of the models before it, and {free / 1000000000.0:.1f} GB "
            "are free"
        )
    elif num_tokens > positions:
        why = f"has {positions} positions, but prompt and new tokens make {num_tokens}"
    else:
        model = checkpoint.model(device=device())
        decoder = Decoder(model)
        if decoder.can_branch:
            return _Entry(decoder, int(model.get_memory_footprint()), checkpoint_bytes(checkpoint.folder))
        why = "keeps no cache of keys and values to measure decoding with"
    raise UserError(f"speed: {role} {why}; set eval.speed: false")


def _measured(entries: Mapping[str, _Entry], batch_size: int, rounds: int) -> dict[str, BatchSpeed]:
    """Every role's speeds at one batch size."""
    samples = {role: {kind: [] for kind in KINDS} for role in entries}
    order = list(entries)
    turns = [role for turn in range(rounds) for role in order[turn % len(order) :] + order[: turn % len(order)]]
    with progress(f"speed: {batch_size} at once", total=len(order) + len(turns), unit="turns") as step:
        peaks: dict[str, int] = {}
        for role, entry in entries.items():
            growth = peak_growth(entry.decoder.device, lambda entry=entry: _one_turn(entry.decoder, batch_size))
            peaks[role] = entry.weight_bytes + growth
            step()
        for role in turns:
            first_s, decode_s = _one_turn(entries[role].decoder, batch_size)
            step()
            samples[role]["prefill"].append(batch_size * PROMPT_TOKENS / first_s)
            samples[role]["decode"].append(batch_size * NEW_TOKENS / decode_s)
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


def _one_turn(decoder: Decoder, batch_size: int) -> tuple[float, float]:
    """Seconds of reading the prompt until the first new token is known, and of the NEW_TOKENS after it."""
    vocab_size = text_config(decoder.model.config).vocab_size
    prompt_BS = torch.randint(0, vocab_size, (batch_size, PROMPT_TOKENS), device=decoder.device)
    cache = decoder.new_cache()
    started = now(decoder.device)
    token_B = decoder.logits(decoder.hidden(prompt_BS, cache=cache)[:, -1]).argmax(dim=-1)
    read = now(decoder.device)
    for _ in range(NEW_TOKENS):
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
                f"batch size {size} is skipped: {role} would need {needed / 1000000000.0:.1f} GB on top of its "
                f"weights, and {free / 1000000000.0:.1f} GB are free"
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
