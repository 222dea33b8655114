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
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from shoal.artifacts.artifact import Provenance, PruningPlan
from shoal.atomic_files import write_json
from shoal.compress.apply import apply_plan
from shoal.compress.surgery.cut_model import cut_model
from shoal.machine import peak_memory
from shoal.models.checkpoint_files import INDEX_FILE, checkpoint_bytes, weight_files
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
        make_teacher(folder / "teacher", arguments.layers, int(arguments.shard_gb * 1e9))
        cut("shoal", folder, arguments.layers)
        (folder / "shoal").rename(folder / "kept")
        results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for repeat in range(arguments.repeats + 1):  # the first turn warms the caches up
            first = repeat % len(WAYS)  # who comes after whom matters: memory has to be freed for the next
            for way in (*WAYS[first:], *WAYS[:first]):
                subprocess.run(["sync"], check=True)
                result = take_turn(way, folder, arguments)
                shutil.rmtree(folder / way)
                if repeat:
                    results[way].append(result)
        report(results, folder)


def make_teacher(folder: Path, num_layers: int, max_shard_bytes: int) -> None:
    """A checkpoint of random numbers, written shard by shard."""
    words = Tokenizer(WordLevel({f"word{index}": index for index in range(32_000)}, unk_token="word0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="word1").save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=num_layers, num_attention_heads=16, dtype="bfloat16"
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    shards: list[dict[str, torch.Size]] = [{}]
    size = 0
    for name, shape in shapes.items():
        if shards[-1] and size + 2 * shape.numel() > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += 2 * shape.numel()
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shard.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    write_json(folder / INDEX_FILE, {"metadata": {}, "weight_map": weight_map})


def take_turn(way: str, folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """A process of its own for shoal and for the model in memory, because a process cannot lower its peak."""
    if way in ("shoal", "in_memory"):
        options = ["--way", way, "--folder", str(folder), "--layers", str(arguments.layers)]
        output = subprocess.run([sys.executable, __file__, *options], check=True, capture_output=True, text=True).stdout
        return json.loads(output.splitlines()[-1])
    (folder / way).mkdir()
    start = time.perf_counter()
    sources = [str(file) for file in weight_files(folder / "kept")]
    subprocess.run(["cp", *sources, str(folder / way)], check=True)
    if way == "cp_flushed":
        subprocess.run(["sync", *(str(file) for file in (folder / way).iterdir())], check=True)
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

    def peak(way: str) -> float:
        return max(turn["peak_bytes"] for turn in results[way])

    result: dict[str, Any] = {
        "teacher_gb": round(checkpoint_bytes(folder / "teacher") / 1e9, 2),
        "kept_gb": round(checkpoint_bytes(folder / "kept") / 1e9, 2),
        "largest_shard_gb": round(largest / 1e9, 2),
        "seconds": {way: [round(turn["seconds"], 2) for turn in turns] for way, turns in results.items()},
        "time_against_cp": ratio("shoal", "cp"),
        "time_against_cp_flushed": ratio("shoal", "cp_flushed"),
        "time_target": TIME_TARGET,
        "in_memory_time_against_cp": ratio("in_memory", "cp"),
        "peak_gb": {way: round(peak(way) / 1e9, 2) for way in ("shoal", "in_memory")},
        "peak_against_largest_shard": round(peak("shoal") / largest, 3),
        "in_memory_peak_against_largest_shard": round(peak("in_memory") / largest, 3),
        "memory_target": MEMORY_TARGET,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
