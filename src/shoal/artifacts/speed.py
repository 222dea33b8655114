"""eval/speed.json: how fast the roles read and write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from shoal.artifacts.artifact import Artifact


@dataclass(frozen=True)
class BatchSpeed:
    """Median speeds of one role at one batch size, and the most memory it took."""

    batch_size: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    first_token_s: float
    """Seconds from handing over the prompts to knowing the first new token of each."""
    peak_memory_bytes: int | None
    """Bytes of weights, cache and intermediate tensors at the fullest moment; None = not measured."""
    samples: dict[str, tuple[float, ...]]
    """Values of all repeats of `prefill`, `decode` and `first_token`, so that a reader sees the noise."""


@dataclass(frozen=True)
class SpeedScore:
    """Median speeds of one role at the first batch size, and its size."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    samples: dict[str, tuple[float, ...]]
    """Values of all repeats, so that a reader sees the noise."""
    batches: tuple[BatchSpeed, ...] = ()
    """Speeds by batch size, increasing."""
    num_layers: int | None = None
    num_parameters: int | None = None
    num_bytes: int | None = None
    """Bytes of the checkpoint's weights on disk."""
    kv_bytes_per_token: int | None = None
    """Bytes that one more token of one sequence adds to the cache."""


@dataclass(frozen=True)
class Speed(Artifact):
    """eval/speed.json: the roles' speeds, measured interleaved in one process."""

    FILE: ClassVar[str] = "eval/speed.json"
    SCHEMA: ClassVar[int] = 2

    roles: dict[str, SpeedScore]
    batch_size: int
    """First batch size, to which the speeds directly under a role belong."""
    prompt_tokens: int
    new_tokens: int
    dtype: str
    left_out: tuple[str, ...] = ()
    """Reasons why a batch size that was asked for is missing, a sentence each."""
