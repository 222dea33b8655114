"""Which process this is among those that work together, what it tells, and which variables of its environment libraries
may obey. Torch stays unloaded."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shoal.errors import UserError
from shoal.formatting import meant
from shoal.progress import Lines
from shoal.redaction import printable, redacted
from shoal.yaml_text import own_yaml

log = logging.getLogger(__name__)
VARIABLES = own_yaml(__file__)

Loudness = Literal["quiet", "usual", "verbose"]
"""What is told beside results: warnings alone; what goes on; that of libraries, of other ranks and of refusals too."""

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
"""Variables that every launcher gives each of its ranks."""
NO_GPU = "this machine has no NVIDIA GPU"
DEVICES = ("nvidia*", "dxg", "kfd", "dri", "accel*", "davinci*")
"""Files in /dev of accelerators that torch knows."""


def rank() -> int:
    """This process's rank over all nodes; 0 without a launcher. Raises as _place does."""
    return _place()[0]


def local_rank() -> int:
    """This process's rank on its node; 0 without a launcher. Raises as _place does."""
    return _place()[1]


def world_size() -> int:
    """Processes over all nodes; 1 without a launcher. Raises as _place does."""
    return _place()[2]


def _place() -> tuple[int, int, int]:
    """What the launcher says of this process, in the order of LAUNCHED.

    Raises:
        UserError: it says half of that, or what cannot be: left over from something else, it would make this a rank
            that writes nothing, or one that waits for ranks that nobody has started.
    """
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        # SLURM says it in a word of its own; else one process a node, as Kubeflow's PyTorchJob starts them
        os.environ.setdefault("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    said = {name: os.environ[name] for name in LAUNCHED if name in os.environ}
    if not said:
        return 0, 0, 1
    there = [int(value) if value.isdecimal() else -1 for value in said.values()]
    if not ((port := os.environ.get("MASTER_PORT", "0")).isdecimal() and int(port) < 2**16):
        raise UserError(f"MASTER_PORT={port}: must be a port number; choose one with --master_port")
    if len(there) == len(LAUNCHED) and min(there) >= 0 and max(there[:2]) < there[2]:
        return there[0], there[1], there[2]
    told = " ".join(f"{name}={value}" for name, value in said.items())
    raise UserError(
        f"{told}: set in the environment, but not by a launcher, which sets {', '.join(LAUNCHED)} together (the "
        f"first two below the last); `unset {' '.join(said)}`, or use deepspeed or torchrun"
    )


def refuse_no_address() -> None:
    """Refuse to be one of several ranks that are not told where they meet."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if world_size() > 1 and missing:
        raise UserError(
            f"{missing[0]}: is not set, and WORLD_SIZE={world_size()} ranks need it; "
            f"`unset {' '.join(LAUNCHED)}`, or use deepspeed or torchrun"
        )


def refuse_variables() -> None:
    """Refuse a variable that no library understands, that changes what numbers are computed in, or that is
    almost one of ours. Those of another launcher are removed."""
    for name in sorted(name for name in os.environ if name.startswith("SHOAL_")):
        if name not in VARIABLES["own"] and (hint := meant(name, VARIABLES["own"], "", cutoff=0.8)):
            raise UserError(f"{name}: shoal reads no such variable; {hint}")
    is_rank = "RANK" in os.environ
    for name, (form, words) in VARIABLES["form"].items():
        value = os.environ.get(name)
        if value is not None and not re.fullmatch(form, value.strip()) and not (is_rank and "MPI" in words):
            raise UserError(f"{name}: must be {words} (got {value!r}); set it so, or unset it")
    if (found := forget_launchers()) and not is_rank:
        log.info("%s: set by a launcher of accelerate, and without effect here: the recipe decides", ", ".join(found))


def forget_launchers() -> list[str]:
    """Remove what a launcher of accelerate has set, which would count for more than the settings; its names."""
    found = sorted(name for name in os.environ if name.startswith(tuple(VARIABLES["passed_over"])))
    for name in found:
        del os.environ[name]
    return found


def allowed_cores() -> int:
    """Cores that this process may use, those that share a physical one too."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def may_have_devices() -> bool:
    """Whether to ask torch for accelerators."""
    return "torch" in sys.modules or sys.platform != "linux" or any(any(Path("/dev").glob(name)) for name in DEVICES)


def no_gpu(reason: str) -> UserError:
    """The error of device: cuda without a GPU."""
    return UserError(f"device: is cuda, but torch finds no such GPU: {reason}; fix that, or set device: cpu")


def refuse_crowd(ranks: int) -> None:
    """Refuse more ``ranks`` on this machine than have a device of their own, or on a CPU a core. Torch counts devices,
    and is loaded for that only if there may be some.

    Raises:
        UserError: naming both numbers; ranks that share a core wait for each other, and a device takes one.
    """
    places, kind = allowed_cores(), "core"
    if may_have_devices():
        import torch

        if torch.accelerator.is_available():
            places, kind = torch.accelerator.device_count(), "device"
    if ranks > places:
        here = f"{places} {kind}{'s' * (places > 1)} here"
        raise UserError(f"num_processes: {ranks} ranks are more than the {here}; set it to {places} or fewer")


def is_main() -> bool:
    """True on the one process that logs and writes shared files."""
    return rank() == 0


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(redacted(super().format(record)))


@dataclass
class Voice:
    """What this process prints."""

    loudness: Loudness = "usual"
    """As set_up_logging was last called."""
    events: bool = False
    """Whether training prints its log.jsonl."""


VOICE = Voice()


def set_up_logging(chosen: Loudness = "usual") -> None:
    """Log to stderr: rank 0 what goes on, the others only what went wrong."""
    VOICE.loudness = chosen
    prefix = f"[rank {rank()}] " if world_size() > 1 else ""
    handler = Lines(sys.stderr)
    handler.setFormatter(_Printable(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
    level = logging.WARNING if chosen == "quiet" else logging.INFO
    is_told = is_main() or chosen == "verbose"
    logging.basicConfig(level=level if is_told else logging.ERROR, handlers=[handler], force=True)
    logging.getLogger("shoal").setLevel(logging.DEBUG if chosen == "verbose" else logging.NOTSET)


def free_port() -> int:
    """A TCP port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
