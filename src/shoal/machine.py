"""What this machine has free: memory of the host and of the accelerator, disk, and what multiplies.

Products in bfloat16 are 2 to 10 times as fast as in float32 where the device has instructions for them (AMX, AMD's
AVX512-BF16, GPUs from Ampere on), and 5 to 60 times as slow where it has not, as on most laptops.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from shoal.atomic_files import free_disk
from shoal.errors import UserError
from shoal.formatting import bytes_text
from shoal.ranks import allowed_cores
from shoal.yaml_text import own_yaml

CONTROL_GROUP = Path("/sys/fs/cgroup")
"""Folder in which Linux tells control groups, such as a container, their limits."""
OWN_GROUP = Path("/proc/self/cgroup")
"""File in which Linux tells a process its control group."""
STATUS = Path("/proc/self/status")
"""File in which Linux tells a process about itself."""
CPU_INFO = Path("/proc/cpuinfo")
"""File in which Linux describes the processors."""


def available_memory() -> int:
    """Bytes that this process can still get: free in the machine and, in a container or a job, below its limit."""
    available = psutil.virtual_memory().available
    lines = OWN_GROUP.read_text().splitlines() if OWN_GROUP.is_file() else []
    own = CONTROL_GROUP / next((line.removeprefix("0::/") for line in lines if line.startswith("0::")), "")
    for group in (own, *own.parents):  # SLURM limits a job, which a process sees as a group around its own
        limit, used = group / "memory.max", group / "memory.current"
        if limit.is_file() and used.is_file() and (maximum := limit.read_text().strip()).isdigit():
            available = min(available, int(maximum) - int(used.read_text()) + _cached_files(group))
    return available


def _cached_files(group: Path) -> int:
    """Bytes of files that ``group`` has read or written and the system keeps until somebody wants the memory."""
    told = group / "memory.stat"
    lines = [line.split() for line in told.read_text().splitlines()] if told.is_file() else []
    return sum(int(size) for name, size in lines if name in ("inactive_file", "active_file"))


def device_memory(device: torch.device) -> int:
    """Bytes free on ``device``; where it shares the machine's memory what available_memory says."""
    own = torch.get_device_module(device)
    if device.type == "cpu" or not hasattr(own, "mem_get_info"):
        return available_memory()
    # what this process has given back and torch keeps for it is free here, whatever the driver says
    return own.mem_get_info(device)[0] + own.memory_reserved(device) - own.memory_allocated(device)


def disk_line(needed: int, folder: Path) -> str:
    """Whether there is room in ``folder`` for so many more bytes, in words."""
    free = free_disk(folder)
    line = f"disk: {bytes_text(needed)} needed under {folder}, {bytes_text(free)} free there"
    return line if needed <= free else f"{line}: NOT ENOUGH; free some space, or set run_dir to another disk"


def peak_memory() -> int:
    """The most bytes that this process has held: on its device, or resident on a CPU.

    Resident memory is not asked of getrusage where Linux tells better: there it counts the process that started this
    one, too.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if STATUS.is_file():
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def num_cores() -> int:
    """Physical cores that this process may use: what a matrix product is spread over."""
    return min(allowed_cores(), psutil.cpu_count(logical=False) or allowed_cores())


def ranks_on_this_node() -> int:
    """Processes that a launcher has started here: torchrun and DeepSpeed's call it differently; 1 without one."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")
    return int(next((os.environ[name] for name in names if name in os.environ), "1"))


def ranks_to_start(wanted: int | None) -> int:
    """Processes of a training that is started on this machine: ``wanted``, else one per GPU, one on a CPU."""
    return wanted or (torch.accelerator.device_count() if torch.accelerator.is_available() else 1)


class Card(NamedTuple):
    """What a GPU says of itself."""

    name: str
    capability: tuple[int, int]


def card(index: int = 0) -> Card:
    """The GPU ``index`` of those that this process sees; raises as _asked."""
    name, (major, minor) = _asked("card", index)
    return Card(name, (major, minor))


@cache
def _asked(question: str, about: int | str) -> Any:
    """What a GPU answers: to a process of its own, unless this one is a rank or computes on the GPU already.

    Whoever asks has a context on the GPU until its end. Ranks that are started from here would miss that memory, and
    the whole GPU where it takes one process at a time.

    Raises:
        UserError: it does not answer.
    """
    if torch.cuda.is_initialized() or "LOCAL_RANK" in os.environ:
        return QUESTIONS[question](about)
    command = [sys.executable, "-m", "shoal.machine", question, json.dumps(about)]
    safe = {**os.environ, "PYTHONSAFEPATH": "1"}
    told = subprocess.run(command, env=safe, capture_output=True, text=True, check=False)
    if told.returncode != 0:
        reason = (told.stderr.strip().splitlines() or [f"exit code {told.returncode}"])[-1]
        raise UserError(f"device: the GPU does not respond: {reason}; see `nvidia-smi`, or set device: cpu")
    return json.loads(told.stdout)


def device_name(device: torch.device) -> str:
    """Name of ``device``; for a CPU as Linux gives it, with its instructions for bfloat16."""
    if device.type == "cuda":
        return card(device.index or 0).name
    if device.type != "cpu":
        return device.type
    facts = _processor()
    name = facts.get("model name") or platform.processor() or platform.machine()
    extra = bfloat16_instructions(device)
    return f"{name} with {extra}" if extra else name


def bfloat16_instructions(device: torch.device) -> str:
    """What ``device`` multiplies fast in bfloat16 with; empty where it has nothing for that.

    AVX512-BF16 doubles the rate of AMD's processors and halves that of Intel's, which shows it alone where a virtual
    machine hides AMX.
    """
    if device.type == "cuda":
        return "tensor cores" if torch.version.hip or card(device.index or 0).capability >= (8, 0) else ""
    if device.type != "cpu":
        return "instructions"
    facts = _processor()
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    known = ("amx_bf16", "bf16") if facts.get("vendor_id") == "GenuineIntel" else ("amx_bf16", "avx512_bf16", "bf16")
    return next((word for word in known if word in flags), "")


def _processor() -> dict[str, str]:
    """What Linux says of the first processor, by its names."""
    facts: dict[str, str] = {}
    if CPU_INFO.is_file():
        for line in CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
    return facts


def now(device: torch.device) -> float:
    """Seconds of a clock, once all work given to ``device`` is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Choice:
    """The precision that a device multiplies fast in."""

    dtype: str
    reason: str


def fast_dtype(device: torch.device) -> Choice:
    """The precision that `fast` means on ``device``: bfloat16 where it has instructions for it; float16, which needs
    its losses scaled, on GPUs that have instructions for that alone."""
    name = device_name(device)
    if bfloat16_instructions(device):
        return Choice("bfloat16", f"{name} multiplies fast in bfloat16")
    if device.type == "cuda" and card(device.index or 0).capability >= (7, 0):
        return Choice("float16", f"{name} multiplies fast in float16 and not in bfloat16")
    return Choice("float32", f"{name} does not multiply fast in bfloat16")


LESS = re.compile(r" MIG |Laptop|Max-Q|-\d+[ABCQ]$")
"""Parts of the names of slices of GPUs, and of GPUs that are slower than others of the same name."""


class DataSheet(NamedTuple):
    """What a maker says of a GPU; units stand in devices.yaml."""

    name: str
    half: float
    float32: float
    memory: float
    link: float


def data_sheet(device: torch.device) -> DataSheet | None:
    """The row of devices.yaml for ``device``; None = there is none, or it is less than its name says."""
    if device.type != "cuda" or LESS.search(name := device_name(device)):
        return None
    rows = (DataSheet(**row) for row in own_yaml(__file__, "devices.yaml"))
    return next((row for row in rows if re.search(rf"\b{re.escape(row.name)}\b", name)), None)


def flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of matrix products in ``dtype`` on the whole device, all cores of a CPU: what a training is measured
    against. Of a GPU that is known the data sheet's, which asks nothing of the GPU; of others measured."""
    if sheet := data_sheet(device):
        return sheet.float32 if dtype == torch.float32 else sheet.half
    if device.type == "cuda":
        return _asked("rate", str(dtype).removeprefix("torch."))
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


QUESTIONS = {
    "card": lambda index: Card(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)),
    "rate": lambda dtype: _product_rate("cuda", getattr(torch, dtype)),
}
"""What _asked asks a GPU."""

if __name__ == "__main__":
    json.dump(QUESTIONS[sys.argv[1]](json.loads(sys.argv[2])), sys.stdout)
