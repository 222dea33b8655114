"""`shoal doctor`: what the machines of a training have, found against expected. Without a launcher it starts a rank per
GPU here; under one (`torchrun ... --module shoal.launch.cli doctor`) all nodes are looked at, and rank 0 tells."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from shoal import runtime
from shoal.atomic_files import free_disk
from shoal.errors import UserError
from shoal.formatting import aligned, bytes_text
from shoal.installed import untested
from shoal.machine import available_memory, device_memory, device_name, flops_per_second, now, ranks_to_start
from shoal.progress import doing, loading
from shoal.ranks import is_main, world_size

from .launch import LaunchEnded, start_ranks

NO_GPU = "no GPU: training runs on the CPU"
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
KERNELS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "flash_attn": lambda package, x: package.flash_attn_func(x, x, x, causal=True),
    "liger_kernel.ops.rms_norm": lambda package, x: package.LigerRMSNormFunction.apply(x, x[0, 0, 0], 1e-6),
    "bitsandbytes.functional": lambda package, x: package.dequantize_4bit(*package.quantize_4bit(x, quant_type="nf4")),
}
"""Module of kernels -> what is tried of it, with numbers of shape (B, S, H, D)."""


class Row(NamedTuple):
    """One thing that was looked at."""

    what: str
    found: str
    expected: str
    verdict: str
    """One of VERDICTS."""
    badness: float = 0.0
    """What puts ranks of one verdict in order."""


VERDICTS = ("ok", "not checked", "wrong")


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
        own = list(_rows(Path(asked.run_dir).expanduser()))
        rows = [_worst(same) for same in zip(*runtime.together(lambda: own), strict=True)]
    runtime.leave_distributed()
    asked.exit_code = int(any(row.verdict == "wrong" for row in rows))
    if not is_main():
        return ""
    told = [row[:4] for row in rows]
    if asked.as_json:
        return [dict(zip(Row._fields, row, strict=False)) for row in told]
    return "\n".join(aligned([("", "found", "expected", ""), *told], left=range(4)))


def _rows(run_dir: Path) -> Iterator[Row]:
    yield _libraries()
    device = runtime.device()
    names = Counter(runtime.together(lambda: device_name(device)))
    found = ", ".join(f"{count} x {name}" for name, count in names.items())
    yield Row("devices", found, "one kind", "ok" if len(names) == 1 else "wrong")
    if device.type == "cuda":
        yield _row("bfloat16", "capability", torch.cuda.get_device_capability(device)[0], least=8)
        free = device_memory(device) / torch.cuda.get_device_properties(device).total_memory
        yield _row("GPU memory free", "share", free, least=LEAST_FREE)
    else:
        yield from (Row(what, NO_GPU, "", "not checked") for what in ("bfloat16", "GPU memory free"))
    yield from (_kernel(package, device) for package in KERNELS)
    here = runtime.together(socket.gethostname).count(socket.gethostname())
    yield _row("host memory free", "GB a rank", available_memory() / here / 1e9, least=LEAST_HOST / 1e9)
    yield from _disk(run_dir)
    yield from _together(device)
    yield from _steps(device)


def _libraries() -> Row:
    """The libraries whose versions shoal is not tested with."""
    others = list(untested())
    if not others:
        return Row("libraries", "tested versions", "", "ok")
    found = ", ".join(f"{name} {version or 'not installed'}" for name, version, _ in others)
    expected = ", ".join(f"{name}{wanted}" for name, _, wanted in others)
    return Row("libraries", found, expected, "wrong")


def _worst(same: Sequence[Row]) -> Row:
    """What the table says of what every rank has found: the worst of it, which is wrong where ranks differ."""
    rank, worst = max(enumerate(same), key=lambda own: (VERDICTS.index(own[1].verdict), own[1].badness, -own[0]))
    if len({(row.verdict, row.badness) for row in same}) > 1:
        worst = worst._replace(found=f"{worst.found} (rank {rank})")
    return worst if len({row.verdict for row in same}) == 1 else worst._replace(verdict="wrong")


def _row(what: str, unit: str, found: float, *, least: float | None = None, most: float | None = None) -> Row:
    """What this rank has of ``what``."""
    is_well = found <= most if most is not None else found >= (least or 0)
    limit = "" if least == most is None else f"{least:g} or more" if most is None else f"{most:g} or less"
    badness = -found if most is None else found
    return Row(what, f"{found:,.3g} {unit}", limit, "ok" if is_well else "wrong", badness)


def _kernel(package: str, device: torch.device) -> Row:
    """Whether ``package``, whose errors are its own and of any kind, is here and gives numbers."""
    if importlib.util.find_spec(package.partition(".")[0]) is None:
        return Row(package, "not installed", "", "not checked")
    if device.type != "cuda":
        return Row(package, NO_GPU, "", "not checked")
    try:
        given = torch.randn(1, 64, 4, 64, device=device, dtype=torch.bfloat16)
        is_well = bool(KERNELS[package](importlib.import_module(package), given).isfinite().all())
        found = "runs" if is_well else "produces numbers that are not finite"
    except Exception as error:
        is_well, found = False, f"{type(error).__name__}: {error}".splitlines()[0][:80]
    return Row(package, found, "runs", "ok" if is_well else "wrong")


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
    else:
        begun = time.monotonic()
        try:
            runtime.everyone_sees(probe)
            yield _row("run directory", "s until all ranks see a new file", time.monotonic() - begun, most=MOST_LATE_S)
        except UserError as error:
            yield Row("run directory", str(error), "on a disk that all nodes share", "wrong")
        runtime.barrier()
        if is_main():
            probe.unlink()
    yield Row("disk free", bytes_text(free_disk(run_dir)), "see the dry run", "ok")


def _together(device: torch.device) -> Iterator[Row]:
    """Clocks, and how fast ranks add up, on each node and over all."""
    if world_size() == 1:
        yield from (Row(what, "one rank", "", "not checked") for what in ("clocks", "all-reduce"))
        return
    dist.barrier()
    clocks = runtime.together(time.time)
    yield _row("clocks", "s apart", max(clocks) - min(clocks), most=MOST_CLOCK_S)
    hosts = runtime.together(socket.gethostname)
    ranks_of = {host: [rank for rank, own in enumerate(hosts) if own == host] for host in sorted({*hosts})}
    # every rank makes all of them
    groups: dict[str, Any] = {host: dist.new_group(ranks) for host, ranks in ranks_of.items()}
    within, between = LEAST_GB_S[device.type]
    if max(map(len, ranks_of.values())) > 1:
        rate = _bus_rate(device, groups[socket.gethostname()])
        yield _row("all-reduce within a node", "GB/s", rate, least=within)
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
    sizes = {"vocab_size": 256, "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=16)).to(device)  # pyright: ignore
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
    rate = 6 * sum(p.numel() for p in model.parameters()) * ids_BS.numel() / min(seconds)
    share, rates = rate / flops_per_second(device, dtype), runtime.together(lambda: rate)
    yield _row(f"{STEPS} steps of a small model", "of the rate of products", share, least=LEAST_SHARE[device.type])
    yield _row("spread of ranks", "times the slowest", max(rates) / min(rates), most=MOST_SPREAD[device.type])
    falls, found = bool(losses[-1] < losses[0]), f"{losses[0]:.3f} to {losses[-1]:.3f}"
    yield Row("its loss", "falls" if falls else found, "falls", "ok" if falls else "wrong")
