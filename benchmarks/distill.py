"""Chunked loss against whole logits: peak memory and tokens/s of a real training step, side by side.

Each variant runs in a process of its own, because a process cannot lower its peak; the variants take turns, so that a
busy machine slows both. `whole` is what a straightforward trainer does: full-vocabulary logits of teacher and student
for the whole batch, then KL by autograd.

    python benchmarks/distill.py [--sequence 1024] [--batch 4] [--repeats 2] [--checkpointing]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from torch.nn import functional

from shoal.compress.surgery import cut_model
from shoal.data import load_texts, pack
from shoal.models import load_model, load_tokenizer, resolve_model
from shoal.section import DataSource
from shoal.terms import ForwardKL
from shoal.train.student import Objective, Signals, final_hidden, output_head, to_logits

DROP = (3, 13, 14, 17, 25, 26)
STEPS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--variant", choices=["chunked", "whole"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        print(json.dumps(run_variant(arguments)))
        return
    results: dict[str, list[dict[str, Any]]] = {"chunked": [], "whole": []}
    for _ in range(arguments.repeats):
        for variant, found in results.items():
            command = [sys.executable, __file__, "--variant", variant, *sys.argv[1:]]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found.append(json.loads(output.splitlines()[-1]))
    report(results, arguments)


def run_variant(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train STEPS steps; the peak is what the step adds to, and includes, weights of teacher and student."""
    folder = resolve_model("demo:smollm2-135m")
    tokenizer = load_tokenizer(folder)
    teacher = load_model(folder, dtype=arguments.precision).requires_grad_(False)
    student = cut_model(load_model(folder, dtype="float32"), DROP)
    student.train()
    if arguments.checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    source = DataSource("python_docs")
    rows = pack(
        [(source, load_texts(source))],
        tokenizer,
        sequence_length=arguments.sequence,
        num_tokens=arguments.sequence * arguments.batch,
        seed=0,
    )
    batch = {
        "input_ids": rows.input_ids_NS,
        "position_ids": rows.position_ids_NS,
        "labels": rows.labels_NS,
    }
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    if arguments.variant == "chunked":
        Objective(student, to_logits(teacher), terms=(ForwardKL(),), chunk=arguments.chunk).install()
    losses, seconds = [], []
    for _ in range(STEPS):
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.precision == "bfloat16"):
            loss = (
                chunked(student, teacher, batch) if arguments.variant == "chunked" else whole(student, teacher, batch)
            )
        (loss / (batch["labels"][:, 1:] >= 0).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
        losses.append(loss.item())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"loss": losses, "peak": peak, "tokens_per_s": rows.input_ids_NS.numel() / min(seconds)}


def chunked(student: Any, teacher: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        hidden = final_hidden(teacher, batch["input_ids"], batch["position_ids"])
    return student(**batch, signals=Signals(hidden))[0]


def whole(student: Any, teacher: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = (batch["input_ids"], batch["position_ids"])
    with torch.no_grad():
        teacher_logits = output_head(teacher)(final_hidden(teacher, *inputs))[:, :-1]
    student_logits = output_head(student)(final_hidden(student, *inputs))[:, :-1]
    kl = functional.kl_div(
        functional.log_softmax(student_logits.float(), -1),
        functional.log_softmax(teacher_logits.float(), -1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    return (kl * (batch["labels"][:, 1:] >= 0)).sum()


def report(results: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> None:
    peaks = {name: max(run["peak"] for run in runs) for name, runs in results.items()}
    speeds = {name: statistics.median(run["tokens_per_s"] for run in runs) for name, runs in results.items()}
    print(
        f"sequence {arguments.sequence}, batch {arguments.batch}, vocabulary 49,152, {arguments.precision}, "
        f"checkpointing {'on' if arguments.checkpointing else 'off'}, {torch.get_num_threads()} threads"
    )
    for name in results:
        peak, loss = f"{peaks[name] / 1e6:8,.0f} MB", results[name][0]["loss"][0]
        print(f"{name:8}  peak {peak}   {speeds[name]:6.0f} tokens/s   loss of the first step {loss:.4f}")
    print(f"ratio     peak {peaks['chunked'] / peaks['whole']:.2f}          {speeds['chunked'] / speeds['whole']:.2f}")
    first, other = (results[name][0]["loss"][0] for name in ("chunked", "whole"))
    print(f"relative difference of that loss {abs(first - other) / abs(other):.1e}")


if __name__ == "__main__":
    main()
