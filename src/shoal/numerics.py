"""Precision by device: what `auto` means for `dtype` and `distill.precision`, and why.

Products in bfloat16 are 2 to 10 times as fast as in float32 where the device has instructions for them (AVX512-BF16,
AMX, GPUs from Ampere on), and 5 to 60 times as slow where it has not, as on most laptops. No list of devices keeps up
with that, so each device is asked, by products that take a fraction of a second, and the answer is remembered.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from shoal.atomic_files import cache_dir, write_json
from shoal.errors import UserError
from shoal.machine import device_name, fastest_products, num_cores

DTYPES = ("float32", "bfloat16", "float16")
SIZE = {"cpu": 512}
"""Rows and columns of the products that are timed, by device type; elsewhere LARGE_SIZE. At the slowest rate seen, one
GFLOP/s, one of the smaller takes 0.3 s."""
LARGE_SIZE = 4096
GAIN = 1.2
"""Times that half precision has to be as fast as float32: what it rounds away is not given up for less."""
FLOAT16_GAIN = 1.5
"""Times that float16 has to be as fast as bfloat16, whose range needs no loss scaling."""
SLOW = 3.0
"""Times that a named precision may be slower than the device's best without a warning."""


@dataclass(frozen=True)
class Choice:
    """The precision that a device multiplies fast in."""

    dtype: str
    reason: str


def choose(rates: Mapping[str, float], device: str) -> Choice:
    """The precision for a device that multiplies at ``rates``, FLOP/s by the name of a dtype; ``device`` is its name.

    float16 is considered where ``rates`` has it: DeepSpeed does not train in it on a CPU.
    """
    half = "bfloat16"
    if rates.get("float16", 0.0) > FLOAT16_GAIN * rates["bfloat16"]:
        half = "float16"
    ratio = rates[half] / rates["float32"]
    speeds = f"{_giga(rates[half])} GFLOP/s in {half}, {_giga(rates['float32'])} in float32"
    if ratio >= GAIN:
        return Choice(half, f"{device} multiplies {_times(ratio)} as fast in {half} as in float32 ({speeds})")
    # a rate below float32's says more upside down: "8 times as slow" and not "0.13 times as fast"
    slower = f"{_times(1 / ratio)} as slow" if ratio < 1 else f"only {_times(ratio)} as fast"
    return Choice("float32", f"{device} multiplies {slower} in {half} ({speeds})")


def fast_dtype(device: torch.device) -> Choice:
    """The precision that `auto` means on ``device``."""
    rates = dict(product_rates(device))
    if device.type == "cpu":
        del rates["float16"]
    return choose(rates, device_name(device))


def slowness(dtype: str, device: torch.device) -> float:
    """How many times slower ``device`` multiplies in ``dtype`` than in what `auto` would be."""
    rates = product_rates(device)
    return rates[fast_dtype(device).dtype] / rates[dtype]


def product_rates(device: torch.device) -> Mapping[str, float]:
    """FLOP/s of matrix products by the name of their dtype, measured on first use and remembered for this machine."""
    return _product_rates(device.type, device_name(device))


def flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of matrix products in ``dtype`` on the whole device, all cores of a CPU: what a training is measured
    against."""
    rate = product_rates(device)[str(dtype).removeprefix("torch.")]
    return rate * (num_cores() if device.type == "cpu" else 1)


@cache
def _product_rates(kind: str, name: str) -> Mapping[str, float]:
    # instructions can be switched off, and a release of torch can learn to use them
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    key = " | ".join([name, torch.backends.cpu.get_cpu_capability() + limit, f"torch {torch.__version__}"])
    file = cache_dir() / "product_rates.json"
    known = _remembered(file)
    if key not in known:
        known[key] = _measured(torch.device(kind))
        with contextlib.suppress(OSError, UserError):  # a home that cannot be written to: measured again next time
            write_json(file, known)
    return known[key]


def _measured(device: torch.device) -> dict[str, float]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other on a busy machine would be measured instead
    try:
        rates = fastest_products(
            device, [getattr(torch, dtype) for dtype in DTYPES], size=SIZE.get(device.type, LARGE_SIZE), seconds=0.5
        )
    finally:
        torch.set_num_threads(threads)
    return {str(dtype).removeprefix("torch."): rate for dtype, rate in rates.items()}


def _remembered(file: Path) -> dict[str, dict[str, float]]:
    """The rates in ``file`` by machine; those that are not complete are measured again."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(stored, dict):
        return {}
    return {key: rates for key, rates in stored.items() if _are_rates(rates)}


def _are_rates(rates: object) -> bool:
    return (
        isinstance(rates, dict)
        and set(rates) == set(DTYPES)
        and all(isinstance(rate, float) and 0 < rate < float("inf") for rate in rates.values())
    )


def _times(ratio: float) -> str:
    return f"{ratio:.1f}".removesuffix(".0") + " times" if ratio < 10 else f"{ratio:,.0f} times"


def _giga(rate: float) -> str:
    return f"{rate / 1e9:,.0f}" if rate >= 1e10 else f"{rate / 1e9:.2g}"
