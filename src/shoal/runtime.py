"""Ranks, logging, seeding, and the stamp of the environment that goes into every artifact."""

from __future__ import annotations

import gc
import importlib.metadata
import itertools
import logging
import os
import platform
import random
import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from transformers.utils import logging as transformers_logging

from shoal.errors import UserError
from shoal.machine import card
from shoal.ranks import NO_GPU, VOICE, free_port, is_main, local_rank, no_gpu, rank, world_size

T = TypeVar("T")
log = logging.getLogger(__name__)
SEEN_S = 120
"""Seconds after which a disk is not shared that does not show a file."""

NOISY = (
    *("httpx", "httpcore", "httpx2", "httpcore2", "filelock", "fsspec", "matplotlib", "datasets"),
    *("lm_eval", "urllib3", "absl", "DeepSpeed", "accelerate", "huggingface_hub"),
)
"""Loggers that say errors only."""
GPU, DRIVER = Path("/dev/nvidia0"), Path("/proc/driver/nvidia/version")
"""Files by which Linux tells of an NVIDIA GPU, and of its driver."""
COMPUTING = ("torch", "transformers", "deepspeed")
"""Packages whose versions shape the last digits of losses and scores."""
STAMPED_PACKAGES = (*COMPUTING, "peft", "trl", "accelerate", "datasets", "lm_eval")


def device() -> torch.device:
    """The accelerator of this rank, else the CPU."""
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        return torch.device(kind.type, local_rank())
    return torch.device("cpu")


def queued(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The values on the device by the time that it comes to use them; nobody waits for the copy, which a GPU makes by
    itself only from memory that stays where it is."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


def check_device(wanted: str) -> None:
    """Warn of a GPU that is here and that torch does not see.

    Raises:
        UserError: ``wanted`` is cuda and torch sees none, or cpu and it sees one; a launcher has started several ranks
            for GPUs that torch does not see: they would train on the CPU for weeks.
    """
    seen = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if wanted == "cpu" and seen is not None:
        raise UserError(
            f"device: is cpu, but torch uses {seen.type} in this process already; start the process with "
            "CUDA_VISIBLE_DEVICES="
        )
    if wanted == "cpu" or (seen is not None and (wanted == "auto" or seen.type == "cuda")):
        return
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    reason = "CUDA_VISIBLE_DEVICES hides all" if is_hidden else _why_unseen()
    if wanted == "cuda":
        raise no_gpu(reason)
    if GPU.exists() and not is_hidden and world_size() > 1:
        raise UserError(f"device: this machine has a GPU, but torch does not see it: {reason}; or set device: cpu")
    if GPU.exists() and not is_hidden:
        log.warning(
            "device: everything runs on the CPU, although this machine has a GPU: %s; set device: cpu to confirm",
            reason,
        )


def _why_unseen() -> str:
    if not GPU.exists():
        return NO_GPU
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a build with CUDA"
    told = DRIVER.read_text(encoding="utf-8", errors="replace") if DRIVER.is_file() else ""
    version = re.search(r"\d+\.\d+(\.\d+)?", told)
    driver = f"driver {version[0]}" if version else "a driver of unknown version"
    return (
        f"{driver}, but torch {torch.__version__} is built for CUDA {torch.version.cuda}; update the driver, or "
        "install a torch for an older CUDA"
    )


def turn_down_libraries() -> None:
    """Turn down the chatter of libraries, unless all is to be told: the quickstart's reader should see shoal's lines,
    not those of six others."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns at import where it has to guess
    if VOICE.loudness == "verbose":
        return
    transformers_logging.disable_progress_bar()
    for noisy in NOISY:
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # libraries that call each other by old names: nothing that a reader of a run could do about it
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|transformers|deepspeed|accelerate|trl)\b")
    logging.getLogger("transformers").setLevel(logging.ERROR)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def environment() -> dict[str, Any]:
    """Versions and machine facts that a reader needs to repeat a figure."""
    packages = {name: importlib.metadata.version(name) for name in STAMPED_PACKAGES}
    return {
        "shoal": importlib.metadata.version("shoal"),
        "python": platform.python_version(),
        **packages,
        "torch": str(torch.__version__),  # with the build, such as +cu130, which the package's own number may lack
        "device": card(local_rank()).name if torch.cuda.is_available() else "cpu",
        "cpu_threads": torch.get_num_threads(),
        "world_size": world_size(),
        **({"hub_kernels": kernels} if (kernels := loaded_kernels()) else {}),
    }


def warn_of_versions(made: object, before: Mapping[str, Any]) -> None:
    """Log which libraries that compute are not those of the environment ``before``, in which ``made`` was made."""
    now = environment()
    changed = [
        f"{name} {before[name]} (this is {now[name]})"
        for name in COMPUTING
        if name in before and before[name] != now[name]
    ]
    if changed:
        log.warning(
            "%s: was made with %s; new numbers may differ from the old ones in the last digits",
            made,
            ", ".join(changed),
        )


def loaded_kernels() -> dict[str, str]:
    """Repository -> commit of every kernel of the Hub that this process has loaded, whoever asked for it."""
    kernels: Any = sys.modules.get("kernels")  # where it is not imported, nobody has loaded one
    loaded = [] if kernels is None else kernels.get_loaded_kernels()
    found = {}
    for kernel in loaded:
        if kernel.repo_info is None:  # of a folder, by LOCAL_KERNELS
            found[str(kernel.metadata.name)] = f"local, {kernel.metadata.id}"
        else:
            found[kernel.repo_info.repo_id] = str(kernel.repo_info.revision)
    return dict(sorted(found.items()))


def set_up_distributed(timeout_s: int) -> None:
    """Join the other ranks where a launcher started several processes, or be a world of one.

    DeepSpeed and the Trainer need an initialised process group before TrainingArguments exist: otherwise the world size
    is taken as 1 while the configuration is resolved. Torch's own timeout is the one that ends a hang.

    Raises:
        UserError: the port is taken, or the other ranks cannot be reached.
    """
    if dist.is_initialized():
        return
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
        )
    if torch.accelerator.device_count() == 1:
        os.environ["LOCAL_RANK"] = "0"  # of a process that sees its own device alone, as under srun --gpus-per-task
    own_device = device()
    if own_device.type != "cpu":
        torch.accelerator.set_device_index(own_device.index)
    backend = "gloo" if own_device.type == "cpu" else "nccl"
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    # DeepSpeed's own groups are made without a timeout, and torch's default is 10 minutes under NCCL
    limit = timedelta(seconds=timeout_s)
    distributed_c10d.default_pg_timeout = limit
    distributed_c10d.default_pg_nccl_timeout = limit  # pyright: ignore[reportPrivateImportUsage]
    try:
        dist.init_process_group(backend, timeout=limit)
    except (dist.DistNetworkError, dist.DistStoreError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            reason = "the port is in use by another process"
        raise UserError(
            f"rank {rank()} cannot join the other ranks at {address}: {reason}; "
            "choose another port with --master_port, and check that every node reaches that address"
        ) from error


def barrier() -> None:
    """Wait for all ranks, where they have joined, for as long as it takes.

    A collective that waited for work of one rank alone, a download or a proof, would end after its timeout. A rank that
    is gone is not waited for: its launcher ends the others, or while they train their Heartbeat.

    Raises:
        torch.distributed.DistNetworkError: rank 0 is gone.
    """
    if not dist.is_initialized():
        return
    store, key, pause_s = distributed_c10d._get_default_store(), f"shoal/met/{next(_meetings)}", 0.01
    if store.add(f"{key}/ranks", 1) == dist.get_world_size():
        store.set(key, "")
    while not store.check([key]):
        time.sleep(pause_s)
        pause_s = min(1.0, 2 * pause_s)


_meetings = itertools.count()
"""Ranks meet in the same order, so they count alike."""


def agreed(decide: Callable[[], T]) -> T:
    """The decision of rank 0 on every rank that has joined; its refusal is everyone's.

    The others wait for as long as it takes, packing a billion tokens for hours too: the end of its process ends that.
    """
    if not dist.is_initialized():
        return decide()
    answer: list[Any] = [None, None]
    if is_main():
        try:
            answer[0] = decide()
        except UserError as error:
            answer[1] = str(error)
    barrier()
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]


def everyone_sees(path: Path) -> bool:
    """Whether rank 0 finds ``path``. Every rank calls this, and where it is there all return once they see it too:
    a shared disk shows another node what was just made up to a minute late, if that has looked for it before.

    Raises:
        UserError: another node does not see it.
    """
    if not agreed(path.exists):
        return False
    begun = time.monotonic()
    while not (path.parent.is_dir() and path.name in os.listdir(path.parent)):
        if time.monotonic() - begun > SEEN_S:
            raise UserError(
                f"{path}: rank 0 wrote it, but rank {rank()} does not see it after {SEEN_S} s; choose a run_dir on a "
                "disk that all nodes share"
            )
        time.sleep(0.5)
    return True


def together(decide: Callable[[], T]) -> list[T]:
    """What every rank decides, in their order, on every rank that has joined; the refusal of one is everyone's."""
    answer: tuple[Any, str | None]
    try:
        answer = (decide(), None)
    except UserError as error:
        answer = (None, str(error))
    answers: list[Any] = [answer]
    if dist.is_initialized():
        answers = [None] * dist.get_world_size()
        dist.all_gather_object(answers, answer)
    for _, refusal in answers:
        if refusal is not None:
            raise UserError(refusal)
    return [value for value, _ in answers]


def free_memory() -> None:
    """Give back what models held that nobody refers to any more, on the device too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def leave_distributed() -> None:
    """End the process group: its threads, left to the interpreter's exit, sometimes abort a process that succeeded."""
    if dist.is_initialized():
        barrier()
        dist.barrier()  # rank 0 holds what barrier() asks
        dist.destroy_process_group()
