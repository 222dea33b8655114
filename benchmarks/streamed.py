"""Memory, time and bytes read of measuring layer by layer beside measuring a loaded model, each in its own process.

    python benchmarks/streamed.py [--gigabytes 4] [--memory-gigabytes 1] [--tokens 4096] [--model FOLDER]

Without --model a random Llama of that size is written to a temporary folder first. Both processes may take the given
memory for weights and states on top of what Python and its libraries take; the kernel holds them to it (RLIMIT_DATA).
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import tempfile
import time
from pathlib import Path

import torch
from side_by_side import in_a_process, write_large
from transformers import LlamaConfig

from shoal.compress.measure import measure_importance
from shoal.compress.streamed import measure_streamed
from shoal.compress.variants.streamed import Streaming
from shoal.data.packing import PackedRows
from shoal.machine import STATUS, peak_memory
from shoal.models.anatomy import decoder_layers
from shoal.models.checkpoint_files import checkpoint_bytes
from shoal.models.load import load_model, without_data
from shoal.numerics import fast_dtype

METRICS = ("block_influence", "angular")
LAYERS_PER_FILE = 4


def write_model(folder: Path, num_bytes: int) -> None:
    """A random Llama in a precision that is fast here."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_hidden_layers=1,
        tie_word_embeddings=True,
        dtype=fast_dtype(torch.device("cpu")).dtype,
    )
    per_layer = sum(p.nbytes for p in decoder_layers(without_data(config))[0].parameters())
    config.num_hidden_layers = max(LAYERS_PER_FILE, num_bytes // per_layer)
    write_large(folder, config, shard_bytes=LAYERS_PER_FILE * per_layer)


def measure(arguments: argparse.Namespace, memory_bytes: int | None) -> dict[str, object]:
    """Measure in this process, and say what that took."""
    folder, length = arguments.model, arguments.length
    ids_NS = torch.randint(0, 1000, (arguments.tokens // length, length), generator=torch.Generator().manual_seed(0))
    rows = PackedRows(ids_NS, torch.arange(length).repeat(len(ids_NS), 1))
    if memory_bytes is not None:
        data = re.search(r"VmData:\s+(\d+)", STATUS.read_text())
        assert data is not None
        room = 1024 * int(data[1]) + memory_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (room, room))
    before, read, start = peak_memory(), bytes_read(), time.perf_counter()
    try:
        if arguments.way == "streamed":
            streaming = Streaming(memory_bytes=memory_bytes)
            scores = measure_streamed(folder, rows, metrics=METRICS, batch_size=4, streaming=streaming)
        else:
            scores = measure_importance(load_model(folder), rows, metrics=METRICS, batch_size=4)
    except (RuntimeError, MemoryError) as error:
        return {"refused": str(error).splitlines()[0]}
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "peak_memory_above_start": peak_memory() - before,
        "bytes_read_by_calls": bytes_read() - read,
        "block_influence": scores.layers["block_influence"],
    }


def bytes_read() -> int:
    """By calls; pages of mapped files are not among them."""
    return int(Path("/proc/self/io").read_text().split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measuring layer by layer beside measuring a loaded model")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--memory-gigabytes", type=float, default=1)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--way", choices=("loaded", "streamed"), help="only this, in this process")
    arguments = parser.parse_args()
    memory_bytes = int(arguments.memory_gigabytes * 1e9) or None
    if arguments.way:
        print(json.dumps(measure(arguments, memory_bytes)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.model or Path(temporary)
        if arguments.model is None:
            write_model(folder, int(arguments.gigabytes * 1e9))
        result: dict[str, object] = {"checkpoint_bytes": checkpoint_bytes(folder), "threads": torch.get_num_threads()}
        limit = arguments.memory_gigabytes
        for way, memory in (("loaded", 0.0), ("loaded", limit), ("streamed", limit)):
            options = ("--memory-gigabytes", memory, "--tokens", arguments.tokens, "--length", arguments.length)
            figures = in_a_process("--way", way, "--model", folder, *options)
            result[f"{way} in {memory:g} GB" if memory else f"{way} without limit"] = figures
    scores = [run.pop("block_influence") for run in result.values() if isinstance(run, dict) and "seconds" in run]
    result["largest_difference"] = max(abs(a - b) for a, b in zip(*scores, strict=True))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
