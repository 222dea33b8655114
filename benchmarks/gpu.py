"""`make gpu`: how fast training is on this card and what it takes, beside TRL and beside what the preflight tells.

    python -m benchmarks.gpu OUT [--budget 600] [--only WORD ...] [--device cpu [--tiny]]

Models are of Qwen3's shapes with random weights, made on the device; nothing is downloaded and no file is needed
beside the repository. Every case is a process of its own, so that memory is its own, and running out of memory is a
result. Cases come in the order of their importance; those that the budget has no time for are named as left out.
OUT/gpu.json holds every figure with card, driver, versions and commit, OUT/gpu.md a table of them,
OUT/logs what the processes said.

Without a GPU it prints what it would do. `--device cpu` measures the cases of a CPU, of the bundled model's shapes;
with `--tiny` all cases are tried with models of a few thousand weights, which shows that they work and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_cases import CASES, SIZES, Case
from benchmarks.gpu_work import measured
from shoal.atomic_files import write_json
from shoal.ranks import set_up_logging

LEAST_S = 12
"""Seconds below which no further case is begun."""
QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
LONGEST = 160
"""Characters of a reason that the page shows; gpu.json has all of it."""
COLUMNS = ("case", "tokens/s", "share of a product's rate", "peak, GB", "estimate, GB", "attention", "first loss")
COLUMNS += ("losses off those of the CPU",)
Row = Mapping[str, Any]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--budget", type=float, default=600, help="seconds of all cases together (600)")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="cases whose group, size or name holds one of these")
    parser.add_argument("--device", choices=["cpu"], help="measure there; default: on a GPU")
    parser.add_argument("--tiny", action="store_true", help="models of a few thousand weights, to try the command")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.case is not None:
        return measure_one(CASES[arguments.case], arguments)
    chosen = [case for case in CASES if is_wanted(case, arguments)]
    if all(case.kind == "card" for case in chosen):
        parser.error(f"--only: no case has {' or '.join(map(repr, arguments.only))} in its group, size or name")
    if arguments.device is None and not torch.cuda.is_available():
        print("No GPU is seen here: nothing is measured. On one, these cases would be, each in a process of its own:\n")
        print("\n".join(f"{case.group:9}  {case.size:5}  {case.name}" for case in chosen))
        return 0
    result = measure(chosen, arguments)
    print(markdown(result))
    print(f"\n{arguments.out / 'gpu.json'} holds every figure, {arguments.out / 'gpu.md'} this table.")
    return 1 if any(row.get("without", "").startswith("FAILED") for row in result["results"]) else 0


def is_wanted(case: Case, arguments: argparse.Namespace) -> bool:
    """Whether the command line asks for it; the card, which all figures are read by, is always."""
    if case.kind == "card":
        return True
    if (case.group == "cpu") != (arguments.device == "cpu") and not arguments.tiny:
        return False
    return arguments.only is None or any(
        word in (case.group, case.size) or word in case.name for word in arguments.only
    )


def measure(chosen: Sequence[Case], arguments: argparse.Namespace) -> dict[str, Any]:
    """Every figure of ``chosen``; written after each of them, so that what was measured survives what comes after."""
    begun, out = time.monotonic(), arguments.out
    (out / "logs").mkdir(parents=True, exist_ok=True)
    # the commit, and whether files differ from it; empty outside of a repository
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    result: dict[str, Any] = {
        "command": " ".join(sys.argv[1:]),
        "tiny": arguments.tiny,
        "budget_s": arguments.budget,
        "commit": described.stdout.strip(),
        "results": [],
    }
    for case in chosen:
        left = arguments.budget - (time.monotonic() - begun)
        figures: dict[str, Any] = {"without": f"left out: the budget of {arguments.budget:.0f} s was used up"}
        if left >= LEAST_S:
            figures = measured_apart(case, arguments, min(case.limit_s, left))
        row = {"name": case.name, "group": case.group, "size": case.size, "kind": case.kind} | figures
        result["results"].append(row)
        result["seconds"] = round(time.monotonic() - begun, 1)
        write_json(out / "gpu.json", result)
        (out / "gpu.md").write_text(markdown(result) + "\n", encoding="utf-8")
        print(f"{result['seconds']:6.0f} s  {case.size:5} {case.name}: {outcome(row)}", file=sys.stderr, flush=True)
    return result


def measured_apart(case: Case, arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """The figures of ``case``, measured by a process of its own; why there are none if it died, or was ended after so
    many seconds."""
    found = found_of(case, arguments)
    log = found.with_suffix(".txt")
    found.unlink(missing_ok=True)
    # of several GPUs the first: trainers would split a batch over all that they see
    gpus = "" if case.on_cpu else os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    command = [sys.executable, "-m", "benchmarks.gpu", str(arguments.out), "--case", str(CASES.index(case))]
    command += ["--tiny"] * arguments.tiny
    environment = {**QUIET, **os.environ, "CUDA_VISIBLE_DEVICES": gpus}
    with log.open("w") as file:
        try:
            done = subprocess.run(command, env=environment, stdout=file, stderr=file, timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"without": f"not measured: was not done after {seconds:.0f} s"}
    if found.is_file():
        return json.loads(found.read_bytes())
    return {"without": f"FAILED: its process ended with exit code {done.returncode}; see {log}"}


def measure_one(case: Case, arguments: argparse.Namespace) -> int:
    """Measure a case in this process, and write what was found."""
    set_up_logging()
    write_json(found_of(case, arguments), measured(case, SIZES["tiny" if arguments.tiny else case.size]))
    return 0


def found_of(case: Case, arguments: argparse.Namespace) -> Path:
    """Where its process writes the figures of ``case``."""
    return arguments.out / "logs" / f"{CASES.index(case):02d}.json"


def markdown(result: Row) -> str:
    """All of ``result`` as a page."""
    rows: Sequence[Row] = result["results"]
    card = next((row for row in rows if row["kind"] == "card" and "without" not in row), {})
    reference = next((row["losses"] for row in rows if row["name"] == "losses, CPU, float32" and "losses" in row), ())
    parts = ["TINY MODELS: the command was tried, and no figure says anything."] if result["tiny"] else []
    facts = ", ".join(
        f"{name} {value}" for name, value in card.items() if name not in ("name", "group", "size", "kind")
    )
    parts.append(f"{facts or 'unknown device'}; commit {result['commit']}; {result.get('seconds', 0):.0f} s in all.")
    lines = [cells(row, card, reference) for row in rows if "tokens_per_s" in row]
    parts.append("\n".join(f"| {' | '.join(line)} |" for line in (COLUMNS, ["---"] * len(COLUMNS), *lines)))
    parts.append("\n".join(f"- {row['size']} {row['name']}: {outcome(row)}" for row in rows if "without" in row))
    return "\n\n".join(filter(None, parts))


def cells(row: Row, card: Row, reference: Sequence[float]) -> list[str]:
    """A line of the table, by COLUMNS; a step's operations are those of whole rows."""
    tokens_per_s, peak, estimate, flops = (
        row.get(name, 0) for name in ("tokens_per_s", "peak", "estimate", "flops_per_token")
    )
    pairs = zip(row["losses"], reference, strict=True) if row["group"] == "losses" and reference else ()
    return [
        f"{row['group']}: {row['size']} {row['name']}",
        f"{tokens_per_s:,.0f}",
        f"{tokens_per_s * flops / card['product_flops_per_s']:.1%}" if flops and card else "",
        f"{peak / 1e9:.2f}",
        f"{estimate / 1e9:.2f} ({estimate / peak - 1:+.0%})" if estimate else "",
        row["attention"],
        f"{row['losses'][0]:.5f}",
        max((f"{abs(own / other - 1):.1e}" for own, other in pairs), key=float, default=""),
    ]


def outcome(row: Row) -> str:
    """What a case has come to, in a line."""
    if "tokens_per_s" in row:
        return f"{row['tokens_per_s']:,.0f} tokens/s, {row['peak'] / 1e9:.2f} GB"
    return str(row.get("without") or row["card"]).partition("\n")[0][:LONGEST]


if __name__ == "__main__":
    sys.exit(main())
