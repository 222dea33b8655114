"""Cutting a checkpoint by shards beside `cp` of the bytes it keeps: wall time, and peak memory of the whole process.

    python benchmarks/surgery.py [--layers 32] [--shard-gb 1] [--repeats 8] [--folder FOLDER]

It makes a bfloat16 Llama of random numbers (4.6 GB as it stands) and drops every fourth layer. Four ways take turns:

- `shoal`: apply_plan, proven by its files; every byte is on the disk when it returns.
- `cp`: coreutils' cp of files that hold the same bytes; most of them are still in the system's cache when it returns.
- `cp_flushed`: the same and `sync` of the copies, so that it promises as much as shoal does.
- `in_memory`: load the model, cut it, save it; what there was to do without this route.

Old copies are deleted between turns. The targets are 1.3 for time against `cp`, and 1.5 for the peak resident memory of
shoal's process, interpreter and libraries included, against the largest shard.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from side_by_side import in_a_process, rotated, write_large
from transformers import LlamaConfig

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.plan import PruningPlan
from shoal.compress.apply import apply_plan
from shoal.compress.surgery.cut_model import cut_model
from shoal.machine import peak_memory
from shoal.models.checkpoint_files import checkpoint_bytes, weight_files
from shoal.models.load import load_model

TIME_TARGET, MEMORY_TARGET = 1.3, 1.5
WAYS = ("shoal", "cp", "cp_flushed", "in_memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--shard-gb", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; default: the system's temporary one")
    parser.add_argument("--way", choices=("shoal", "in_memory"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(cut(arguments.way, arguments.folder, arguments.layers)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        sizes: dict[str, Any] = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16}
        config = LlamaConfig(num_hidden_layers=arguments.layers, dtype="bfloat16", **sizes)
        write_large(folder / "teacher", config, shard_bytes=int(arguments.shard_gb * 1e9))
        cut("shoal", folder, arguments.layers)
        (folder / "shoal").rename(folder / "kept")
        results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for repeat in range(arguments.repeats + 1):  # the first turn warms the caches up
            for way in rotated(WAYS, repeat):  # memory of the one before has to be freed for the next
                subprocess.run(["sync"], check=True)
                result = take_turn(way, folder, arguments)
                shutil.rmtree(folder / way)
                if repeat:
                    results[way].append(result)
        report(results, folder)


def take_turn(way: str, folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """A process of its own for shoal and for the model in memory."""
    if way in ("shoal", "in_memory"):
        return in_a_process("--way", way, "--folder", folder, "--layers", arguments.layers)
    (folder / way).mkdir()
    start = time.perf_counter()
    subprocess.run(["cp", *weight_files(folder / "kept"), folder / way], check=True)
    if way == "cp_flushed":
        subprocess.run(["sync", *(folder / way).iterdir()], check=True)
    return {"seconds": time.perf_counter() - start}


def cut(way: str, folder: Path, num_layers: int) -> dict[str, float]:
    """Time without, memory with the interpreter and the libraries."""
    drop = tuple(range(3, num_layers, 4))
    start = time.perf_counter()
    if way == "shoal":
        plan = PruningPlan(Provenance({}), num_layers, drop, "the benchmark")
        apply_plan(folder / "teacher", plan, folder / way, proof="files")
    else:
        cut_model(load_model(folder / "teacher"), drop, share=True).save_pretrained(folder / way)
    return {"seconds": time.perf_counter() - start, "peak_bytes": peak_memory()}


def report(results: dict[str, list[dict[str, float]]], folder: Path) -> None:
    largest = max(file.stat().st_size for file in weight_files(folder / "teacher"))

    def ratio(way: str, other: str) -> float:
        pairs = zip(results[way], results[other], strict=True)
        return round(statistics.median(own["seconds"] / its["seconds"] for own, its in pairs), 3)

    peak = {way: max(turn["peak_bytes"] for turn in results[way]) for way in ("shoal", "in_memory")}
    result: dict[str, Any] = {
        "teacher_gb": round(checkpoint_bytes(folder / "teacher") / 1e9, 2),
        "kept_gb": round(checkpoint_bytes(folder / "kept") / 1e9, 2),
        "largest_shard_gb": round(largest / 1e9, 2),
        "seconds": {way: [round(turn["seconds"], 2) for turn in turns] for way, turns in results.items()},
        "time_against_cp": ratio("shoal", "cp"),
        "time_against_cp_flushed": ratio("shoal", "cp_flushed"),
        "time_target": TIME_TARGET,
        "in_memory_time_against_cp": ratio("in_memory", "cp"),
        "peak_gb": {way: round(size / 1e9, 2) for way, size in peak.items()},
        "peak_against_largest_shard": round(peak["shoal"] / largest, 3),
        "in_memory_peak_against_largest_shard": round(peak["in_memory"] / largest, 3),
        "memory_target": MEMORY_TARGET,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
