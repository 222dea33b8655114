"""Precision by device: what `auto` means for `dtype` and `distill.precision`, and how fast it is there.

Products in bfloat16 are 2 to 10 times as fast as in float32 where the device has instructions for them (AMX, AMD's
AVX512-BF16, GPUs from Ampere on), and 5 to 60 times as slow where it has not, as on most laptops.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from shoal.machine import bfloat16_instructions, device_name, now, num_cores

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Choice:
    """The precision that a device multiplies fast in."""

    dtype: str
    reason: str


def fast_dtype(device: torch.device) -> Choice:
    """The precision that `auto` means on ``device``: bfloat16 where it has instructions for it; float16, which needs
    its losses scaled, on GPUs that have instructions for that alone."""
    name = device_name(device)
    if bfloat16_instructions(device):
        return Choice("bfloat16", f"{name} multiplies fast in bfloat16")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0):
        return Choice("float16", f"{name} multiplies fast in float16 and not in bfloat16")
    return Choice("float32", f"{name} does not multiply fast in bfloat16")


def flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of matrix products in ``dtype`` on the whole device, all cores of a CPU: what a training is measured
    against."""
    return _product_rate(device.type, dtype) * (num_cores() if device.type == "cpu" else 1)


@cache
def _product_rate(kind: str, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of some products, the first of which brings the device to work; of one core of a CPU."""
    size, device, threads = 512 if kind == "cpu" else 4096, torch.device(kind), torch.get_num_threads()
    factor, seconds = torch.randn(size, size, device=device, dtype=dtype), []
    torch.set_num_threads(1)  # threads that wait for each other on a busy machine would be measured instead
    try:
        for _ in range(16):
            started = now(device)
            torch.mm(factor, factor)
            seconds.append(now(device) - started)
    finally:
        torch.set_num_threads(threads)
    return 2 * size**3 / min(seconds)
