"""The learning rate of trainings that are loops of our own."""

from __future__ import annotations

import math

WARMUP_SHARE = 0.05


def warmup_cosine(step: int, num_steps: int, *, final: float) -> float:
    """Share of the peak rate at ``step``, from 0: a linear warm-up, then half a cosine down to the share ``final``."""
    warmup = max(1, round(WARMUP_SHARE * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
