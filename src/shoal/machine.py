"""What this machine has free: memory of the host and of the accelerator, disk, and what multiplies."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
import time
from pathlib import Path

import psutil
import torch

CONTROL_GROUP = Path("/sys/fs/cgroup")
"""Folder in which Linux tells a container its limits."""
STATUS = Path("/proc/self/status")
"""File in which Linux tells a process about itself."""
CPU_INFO = Path("/proc/cpuinfo")
"""File in which Linux describes the processors."""


def available_memory() -> int:
    """Bytes that this process can still get: free in the machine and, in a container, below its limit."""
    available = psutil.virtual_memory().available
    limit, used = CONTROL_GROUP / "memory.max", CONTROL_GROUP / "memory.current"
    if limit.is_file() and used.is_file() and (maximum := limit.read_text().strip()).isdigit():
        available = min(available, int(maximum) - int(used.read_text()) + _cached_files())
    return available


def _cached_files() -> int:
    """Bytes of files that the container has read or written and the system keeps until somebody wants the memory."""
    told = CONTROL_GROUP / "memory.stat"
    lines = [line.split() for line in told.read_text().splitlines()] if told.is_file() else []
    return sum(int(size) for name, size in lines if name in ("inactive_file", "active_file"))


def device_memory(device: torch.device) -> int:
    """Bytes free on ``device``; where it shares the machine's memory what available_memory says."""
    told = None if device.type == "cpu" else getattr(torch.get_device_module(device), "mem_get_info", None)
    return available_memory() if told is None else told(device)[0]


def free_disk(path: Path) -> int:
    """Bytes free where ``path`` is, or will be once its folders are made."""
    parent = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(parent).free


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
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, psutil.cpu_count(logical=False) or allowed)


def ranks_on_this_node() -> int:
    """Processes that a launcher has started here: torchrun and DeepSpeed's call it differently; 1 without one."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")
    return int(next((os.environ[name] for name in names if name in os.environ), "1"))


def ranks_to_start(wanted: int | None) -> int:
    """Processes of a training that is started on this machine: ``wanted``, else one per GPU, one on a CPU."""
    return wanted or (torch.accelerator.device_count() if torch.accelerator.is_available() else 1)


def device_name(device: torch.device) -> str:
    """Name of ``device``; for a CPU as Linux gives it, with its instructions for bfloat16."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
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
        return "tensor cores" if torch.cuda.is_bf16_supported(including_emulation=False) else ""
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
