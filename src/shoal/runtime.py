"""Ranks, logging, seeding, and the stamp of the environment that goes into every artifact."""

from __future__ import annotations

import ctypes
import importlib.metadata
import logging
import os
import platform
import random
import signal
import sys
from typing import Any

import numpy as np
import torch

STAMPED_PACKAGES = ("torch", "transformers", "deepspeed", "peft", "trl", "accelerate", "datasets", "lm_eval")


def rank() -> int:
    """This process's rank over all nodes; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """True on the one process that logs and writes shared files."""
    return rank() == 0


def device() -> torch.device:
    """The accelerator of this rank, else the CPU."""
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        return torch.device(kind.type, int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def set_up_logging(level: int = logging.INFO) -> None:
    """Rank 0 logs at ``level`` to stderr, the others only what went wrong; library chatter is turned down.

    The quickstart's reader should see shoal's lines, not those of six libraries.
    """
    prefix = f"[rank {rank()}] " if world_size() > 1 else ""
    logging.basicConfig(
        level=level if is_main() else logging.ERROR,
        format=f"%(asctime)s {prefix}%(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    for noisy in ("httpx", "httpcore", "filelock", "fsspec", "matplotlib", "datasets", "lm_eval", "urllib3", "absl"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    logging.getLogger("transformers").setLevel(logging.ERROR)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def die_with_parent() -> None:
    """Ask the kernel to end this process when its parent ends (Linux; elsewhere nothing happens).

    A killed launcher otherwise leaves its ranks training as orphans that hold the run directory and the devices.
    """
    if not sys.platform.startswith("linux"):
        return
    parent_before = os.getppid()
    pr_set_pdeathsig = 1
    ctypes.CDLL("libc.so.6", use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent_before:  # it died between the two calls
        os.kill(os.getpid(), signal.SIGKILL)


def environment() -> dict[str, Any]:
    """Versions and machine facts that a reader needs to repeat a figure."""
    packages = {name: importlib.metadata.version(name) for name in STAMPED_PACKAGES}
    return {
        "shoal": importlib.metadata.version("shoal"),
        "python": platform.python_version(),
        **packages,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu_threads": torch.get_num_threads(),
        "world_size": world_size(),
    }
