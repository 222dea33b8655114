"""Prefill and decode speed of several models, in turns, so that a busy moment of the machine hits all of them."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from shoal.artifact import Provenance, Speed, SpeedScore
from shoal.errors import UserError
from shoal.models import load_model, text_config
from shoal.runtime import device

from .decoder import Decoder

log = logging.getLogger(__name__)


def measure_speed(
    models: Mapping[str, Path | PreTrainedModel],
    *,
    provenance: Provenance,
    batch_size: int = 1,
    prompt_tokens: int = 256,
    new_tokens: int = 32,
    repeats: int = 5,
    dtype: str = "auto",
    attention: str = "sdpa",
    trust_remote_code: bool = False,
) -> Speed:
    """Median tokens per second of every role, over ``repeats`` rounds in which each role takes one turn.

    Folders are loaded here and kept in memory together: reloading between turns would measure a cold model. The first
    round warms up and is not counted. Random tokens: speed does not depend on what is read.

    Raises:
        UserError: a prompt that does not fit the model's positions, or a model that keeps no cache of keys and values.
    """
    decoders: dict[str, Decoder] = {}
    for role, given in models.items():
        model = given
        if isinstance(given, Path):
            model = load_model(
                given, dtype=dtype, attention=attention, device=device(), trust_remote_code=trust_remote_code
            )
        assert isinstance(model, PreTrainedModel)
        decoders[role] = _checked(role, model, prompt_tokens + new_tokens)
    samples: dict[str, dict[str, list[float]]] = {role: {"prefill": [], "decode": []} for role in decoders}
    for turn in range(repeats + 1):
        for role, decoder in decoders.items():
            prefill_s, decode_s = _one_turn(decoder, batch_size, prompt_tokens, new_tokens)
            if turn > 0:
                samples[role]["prefill"].append(batch_size * prompt_tokens / prefill_s)
                samples[role]["decode"].append(batch_size * new_tokens / decode_s)
    roles = {role: _median(speeds) for role, speeds in samples.items()}
    for role, speed in roles.items():
        log.info(
            "speed: %s prefill %.0f, decode %.1f tokens/s", role, speed.prefill_tokens_per_s, speed.decode_tokens_per_s
        )
    first = next(iter(decoders.values())).model
    return Speed(provenance, roles, batch_size, prompt_tokens, new_tokens, str(first.dtype).removeprefix("torch."))


def _checked(role: str, model: PreTrainedModel, num_tokens: int) -> Decoder:
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
    return decoder


def _one_turn(decoder: Decoder, batch_size: int, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    """Seconds of reading the prompt up to the first new token's logits, and of the ``new_tokens`` after it."""
    vocab_size = text_config(decoder.model.config).vocab_size
    prompt_BS = torch.randint(0, vocab_size, (batch_size, prompt_tokens), device=decoder.device)
    cache = decoder.new_cache()
    started = _now(decoder.device)
    token_B = decoder.logits(decoder.hidden(prompt_BS, cache=cache)[:, -1]).argmax(dim=-1)
    read = _now(decoder.device)
    for _ in range(new_tokens):
        token_B = decoder.logits(decoder.hidden(token_B.unsqueeze(1), cache=cache)[:, -1]).argmax(dim=-1)
    written = _now(decoder.device)
    return read - started, written - read


def _now(where: torch.device) -> float:
    """Seconds, once all work given to an accelerator is done."""
    if where.type != "cpu":
        torch.accelerator.synchronize(where)
    return time.perf_counter()


def _median(speeds: dict[str, list[float]]) -> SpeedScore:
    return SpeedScore(
        prefill_tokens_per_s=statistics.median(speeds["prefill"]),
        decode_tokens_per_s=statistics.median(speeds["decode"]),
        samples={name: tuple(values) for name, values in speeds.items()},
    )
