"""`shoal doctor`: what the machines of a training have, found against expected. Without a launcher it starts a rank per
GPU here; under one (`torchrun ... --module shoal.launch.cli doctor`) all nodes are looked at, and rank 0 tells."""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from shoal import runtime
from shoal.errors import UserError
from shoal.formatting import aligned, bytes_text
from shoal.machine import available_memory, device_memory, device_name, flops_per_second, free_disk, now, ranks_to_start
from shoal.progress import doing, loading
from shoal.ranks import is_main, world_size

from .launch import LaunchEnded, start_ranks

NO_GPU = "no GPU: trainings run on the CPU"
LEAST_FREE = 0.9
"""Share of a GPU's memory that is free where nobody else uses it."""
LEAST_HOST = 8_000_000_000
"""Bytes of host memory for a rank: libraries, rows, and what is pinned."""
MOST_CLOCK_S = 1.0
MOST_LATE_S = 5.0
"""Seconds after which a shared disk shows every node a new file."""
LEAST_GB_S = {"cuda": (20.0, 5.0), "cpu": (0.1, 0.05)}
"""GB/s of a rank that adds up numbers, within and between nodes: PCIe has more, and a network card of 100 Gb/s."""
LEAST_SHARE = {"cuda": 0.1, "cpu": 0.01}
"""Share of the rate of products alone that 20 steps of a small model reach; a device in trouble has far less."""
MOST_SPREAD = {"cuda": 1.3, "cpu": 3.0}
"""Times that the fastest rank may be as fast as the slowest: above that one is throttled or shared, as cores are."""
STEPS = 20


@dataclass(frozen=True)
class Row:
    """One thing that was looked at."""

    what: str
    found: str
    expected: str
    verdict: Literal["ok", "wrong", "not looked at"]


def doctor(asked: argparse.Namespace) -> Any:
    """A table of what was found, as rows with --json; the command ends with code 1 where something is wrong."""
    if "LOCAL_RANK" not in os.environ and (ranks := ranks_to_start(None)) > 1:
        words = ["doctor", "--run-dir", asked.run_dir, *(["--json"] if asked.as_json else [])]
        try:
            start_ranks("doctor", ranks, words)
        except LaunchEnded as ended:
            if ended.text:  # it was stopped
                raise
            asked.exit_code = ended.code  # the table has said why
        return ""
    with loading():
        runtime.set_up_distributed(600)
    with doing("looking at this machine"):
        rows = list(_rows(Path(asked.run_dir).expanduser()))
    runtime.leave_distributed()
    asked.exit_code = int(any(row.verdict == "wrong" for row in rows))
    if not is_main():
        return ""
    cells = [("", "found", "expected", ""), *((row.what, row.found, row.expected, row.verdict) for row in rows)]
    return [asdict(row) for row in rows] if asked.as_json else "\n".join(aligned(cells, left=range(4)))


def _rows(run_dir: Path) -> Iterator[Row]:
    device = runtime.device()
    yield _devices(device)
    if device.type == "cuda":
        yield _row("bfloat16", "capability", torch.cuda.get_device_capability(device)[0], least=8)
        free = device_memory(device) / torch.cuda.get_device_properties(device).total_memory
        yield _row("GPU memory free", "share", free, least=LEAST_FREE)
    else:
        yield from (Row(what, NO_GPU, "", "not looked at") for what in ("bfloat16", "GPU memory free"))
    yield from _kernels(device)
    yield _row("host memory free", "GB a rank", _host_memory() / 1e9, least=LEAST_HOST / 1e9)
    yield from _disk(run_dir)
    yield from _together(device)
    yield from _steps(device)


def _row(what: str, unit: str, found: float, *, least: float | None = None, most: float | None = None) -> Row:
    """What the worst rank has of ``what``."""
    own = runtime.together(lambda: (float(found), socket.gethostname()))
    worst, host = min(own) if most is None else max(own)
    is_well = worst <= most if most is not None else worst >= (least or 0)
    place = f" ({host})" if len({name for _, name in own}) > 1 else ""
    limit = "" if least == most is None else f"{least:g} or more" if most is None else f"{most:g} or less"
    return Row(what, f"{worst:,.3g} {unit}{place}", limit, "ok" if is_well else "wrong")


def _devices(device: torch.device) -> Row:
    names = Counter(runtime.together(lambda: device_name(device)))
    found = ", ".join(f"{count} x {name}" for name, count in names.items())
    return Row("devices", found, "one kind", "ok" if len(names) == 1 else "wrong")


def _host_memory() -> float:
    hosts = Counter(runtime.together(socket.gethostname))
    return available_memory() / hosts[socket.gethostname()]


def _kernels(device: torch.device) -> Iterator[Row]:
    """Packages of kernels, imported and run where there is a GPU to run them on."""
    for package, run in (("flash_attn", _flash), ("liger_kernel", _liger), ("bitsandbytes", _bitsandbytes)):
        if importlib.util.find_spec(package) is None:
            yield Row(package, "not installed", "", "not looked at")
        elif device.type != "cuda":
            yield Row(package, NO_GPU, "", "not looked at")
        else:
            yield _tried(package, lambda run=run: run(torch.randn(1, 64, 4, 64, device=device, dtype=torch.bfloat16)))


def _tried(what: str, run: Callable[[], Tensor]) -> Row:
    """Whether ``run``, whose errors are a package's own and of any kind, gives numbers."""
    try:
        is_well, found = bool(run().isfinite().all()), "runs"
    except Exception as error:
        is_well, found = False, f"{type(error).__name__}: {error}".splitlines()[0][:80]
    return Row(what, found, "runs", "ok" if is_well else "wrong")


def _flash(x_BSHD: Tensor) -> Tensor:
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    return flash_attn_func(x_BSHD, x_BSHD, x_BSHD, causal=True)


def _liger(x_BSHD: Tensor) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # pyright: ignore[reportMissingImports]

    return LigerRMSNormFunction.apply(x_BSHD, x_BSHD.new_ones(x_BSHD.shape[-1]), 1e-6)


def _bitsandbytes(x_BSHD: Tensor) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # pyright: ignore[reportMissingImports]

    return dequantize_4bit(*quantize_4bit(x_BSHD.flatten(), quant_type="nf4"))


def _disk(run_dir: Path) -> Iterator[Row]:
    """What rank 0 writes into ``run_dir`` and how late the others see it."""
    probe = run_dir / f".doctor-{runtime.agreed(lambda: uuid4().hex)}"

    def write() -> str:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            probe.touch()
        except OSError as error:
            return f"{error.strerror}"
        return ""

    if refused := runtime.agreed(write):
        yield Row("run directory", f"{run_dir}: {refused}", "writable", "wrong")
        return
    begun, late = time.monotonic(), ""
    try:
        runtime.everyone_sees(probe)
    except UserError as error:  # told by all together: a rank that went its own way would keep the others waiting
        late = str(error)
    seconds = time.monotonic() - begun
    late = max(runtime.together(lambda: late))
    if is_main():
        probe.unlink()
    if late:
        yield Row("run directory", late, "on a disk that all nodes share", "wrong")
        return
    yield _row("run directory", "s until all ranks see a new file", seconds, most=MOST_LATE_S)
    yield Row("disk free", bytes_text(free_disk(run_dir)), "see the dry run", "ok")


def _together(device: torch.device) -> Iterator[Row]:
    """Clocks, and how fast ranks add up, on each node and over all."""
    if world_size() == 1:
        yield from (Row(what, "one rank", "", "not looked at") for what in ("clocks", "all-reduce"))
        return
    dist.barrier()
    clocks = runtime.together(time.time)
    yield _row("clocks", "s apart", max(clocks) - min(clocks), most=MOST_CLOCK_S)
    hosts = runtime.together(socket.gethostname)
    groups: dict[str, Any] = {
        host: dist.new_group([rank for rank, own in enumerate(hosts) if own == host]) for host in sorted({*hosts})
    }
    within, between = LEAST_GB_S[device.type]
    if max(Counter(hosts).values()) > 1:
        own = groups[socket.gethostname()]
        yield _row("all-reduce within a node", "GB/s", _bus_rate(device, own), least=within)
    if len(groups) > 1:
        yield _row("all-reduce over all nodes", "GB/s", _bus_rate(device, None), least=between)


def _bus_rate(device: torch.device, group: dist.ProcessGroup | None) -> float:
    """GB/s that every rank sends while numbers are added up: a ring sends 2 (n - 1) / n of them."""
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return float("inf")
    numbers = torch.zeros(2**26 if device.type == "cuda" else 2**20, device=device)
    seconds = []
    for _ in range(5):
        begun = now(device)
        dist.all_reduce(numbers, group=group)
        seconds.append(now(device) - begun)
    return 2 * (ranks - 1) / ranks * numbers.nbytes / min(seconds) / 1e9


def _steps(device: torch.device) -> Iterator[Row]:
    """20 steps of a small random model, against the products that it is made of."""
    from transformers import LlamaConfig, LlamaForCausalLM

    on_gpu = device.type == "cuda"
    width, rows, length = (2048, 4, 2048) if on_gpu else (128, 2, 128)
    config = LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=4, num_attention_heads=16
    )
    model = LlamaForCausalLM(config).to(device)  # pyright: ignore[reportArgumentType]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids_BS = torch.randint(0, 256, (rows, length), device=device)
    dtype, seconds, losses = torch.bfloat16 if on_gpu else torch.float32, [], []
    for _ in range(STEPS):
        begun = now(device)
        with torch.autocast(device.type, dtype, enabled=on_gpu):
            loss = model(input_ids=ids_BS, labels=ids_BS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        seconds.append(now(device) - begun)
    fell = float(losses[-1]) < float(losses[0])
    rate = 6 * sum(p.numel() for p in model.parameters()) * ids_BS.numel() / min(seconds)
    share = rate / flops_per_second(device, dtype)
    yield _row(f"{STEPS} steps of a small model", "of the rate of products", share, least=LEAST_SHARE[device.type])
    rates = runtime.together(lambda: rate)
    yield _row("spread of ranks", "times the slowest", max(rates) / min(rates), most=MOST_SPREAD[device.type])
    yield Row(
        "its loss", "falls" if fell else f"{losses[0]:.3f} to {losses[-1]:.3f}", "falls", "ok" if fell else "wrong"
    )
