"""Run the recipes of the net and write their numbers: `python -m tests.net.record OUT.json`.

Every case has entries by name: numbers, lists of numbers, and texts. An entry that ends in `.bits` holds on processors
of one kind only, as it hangs on the last bit of a sum; all others hold everywhere, numbers within a tolerance.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

for folder in ("", "tests/support"):
    sys.path.insert(0, str(Path(__file__).parents[2] / folder))

from ranks import environment, run_ranks  # noqa: E402
from safetensors import safe_open  # noqa: E402
from tiny import tiny_checkpoint  # noqa: E402
from training_runs import terminate  # noqa: E402

from tests.net.compare import portable  # noqa: E402
from tests.net.recipes import CASES, COMMON, Case  # noqa: E402

SPEED = ("seconds", "per_s", "peak", "epoch", "memory")
"""Parts of names of logged values that differ from run to run."""
Entries = dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", help="names of cases, with commas between them")
    parser.add_argument("--portable", action="store_true", help="leave out what holds on this processor alone")
    options = parser.parse_args(arguments)
    names = options.only.split(",") if options.only else [*CASES, "python"]
    with tempfile.TemporaryDirectory() as folder:
        found = record(names, Path(folder))
    found = portable(found) if options.portable else found
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entries)}" for name, entries in found.items())
    options.out.write_text(f"{{\n{lines}\n}}\n")


def record(names: list[str], folder: Path) -> dict[str, Entries]:
    """Entries of the cases ``names``, run in ``folder``; of one that fails its last line."""
    for kind in ("llama", "gemma3"):
        tiny_checkpoint(folder, kind)
    needed = {before for name in names if name in CASES for before in (CASES[name].after, name)}
    found = {}
    for name in (name for name in CASES if name in needed):
        print(name, file=sys.stderr, flush=True)
        found[name] = run(name, CASES[name], folder)
    if "python" in names:
        from tests.net.in_memory import entries

        found["python"] = entries(folder / "llama")
    return {name: found[name] for name in names}


def run(name: str, case: Case, folder: Path) -> Entries:
    place = folder / name
    if case.after and (folder / case.after / "run").exists():
        shutil.copytree(folder / case.after / "run", place / "run")
    place.mkdir(exist_ok=True)
    (place / "chat.jsonl").write_text("".join(json.dumps({"messages": conversation(n)}) + "\n" for n in range(40)))
    recipe = {"model": str(folder / case.model), "run_dir": str(place / "run"), **settings_of(case)}
    (place / "recipe.json").write_text(json.dumps(recipe))
    for index, verb in enumerate(case.verbs):
        arguments = [verb, "--config", str(place / "recipe.json")]
        call = functools.partial(
            run_ranks, arguments, ranks=case.ranks, env=environment(WANDB_MODE="offline"), cwd=place
        )
        if case.killed and index == 0:
            call(before=functools.partial(terminate, 4))
        result = call()
        if result.returncode:
            return {"failed": result.stderr.strip().splitlines()[-1:]}
    found = {key: value for verb in case.verbs for key, value in READERS[verb](place / "run")}
    return {f"{key}.bits": value for key, value in found.items()} if case.sampled else found


def settings_of(case: Case) -> dict[str, Any]:
    """Those of the case before it, else the common ones, with its own in their place."""
    before = settings_of(CASES[case.after]) if case.after else COMMON
    return before | {section: before.get(section, {}) | own for section, own in case.settings.items()}


def conversation(number: int) -> list[dict[str, str]]:
    asked = f"What is {number} plus {number % 7}?"
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": f"It is {number + number % 7}."}]


def opened(file: Path) -> dict[str, Any]:
    """The content of an artifact's file, whether it is told to the public or not."""
    body = json.loads(file.read_text())
    return body | body["internal"]


def importance(run: Path) -> Iterator[tuple[str, Any]]:
    found = opened(run / "importance.json")
    for kind in ("layers", "runs"):
        yield from ((f"{kind}.{name}", values) for name, values in found[kind].items())
    for name, steps in found["orders"].items():
        yield f"orders.{name}", [[*step["unit"]["layers"], step["unit"]["part"], step["score"]] for step in steps]
    sweeps = [found["atlas"]["sweep"] if found["atlas"] else None, *found.get("sweeps", {}).values()]
    for sweep in filter(None, sweeps):
        for column in sweep["columns"]:
            scores = [column["baseline"]["value"], *(effect["score"]["value"] for effect in column["effects"])]
            yield f"sweep.{sweep['operator']}.{column['task']}", scores


def plan(run: Path) -> Iterator[tuple[str, Any]]:
    found = opened(run / "plan.json")
    yield "plan.drop", found["drop"]
    yield "plan.reason.bits", found["reason"]
    changed = bool(found.get("gaps") or found.get("width"))
    yield from weights(run / "student", "student", exact=not changed)


def weights(folder: Path, name: str, *, exact: bool = False) -> Iterator[tuple[str, Any]]:
    """What the tensors of a checkpoint are: their norms and shapes, and a hash of all their bytes."""
    digest, norms, shapes = hashlib.sha256(), [], []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in sorted(tensors.keys()):
                tensor = tensors.get_tensor(key)
                shapes.append(f"{key} {tensor.dtype} {tuple(tensor.shape)}")
                norms.append(tensor.double().norm().item())
                digest.update(shapes[-1].encode() + tensor.float().numpy().tobytes())
    yield f"{name}.shapes", hashlib.sha256("\n".join(shapes).encode()).hexdigest()[:16]
    if not exact:
        yield f"{name}.norms", norms
    yield f"{name}.tensors{'' if exact else '.bits'}", digest.hexdigest()


def training(run: Path) -> Iterator[tuple[str, Any]]:
    yield from curves(json.loads((run / "distill.json").read_text()), "distilled")
    yield from weights(run / "distilled", "distilled")
    if (run / "control").exists():
        yield from curves(json.loads((run / "control/distill.json").read_text()), "control")
        yield from weights(run / "control/distilled", "control")
    for file in sorted(run.glob("text/rows-*/*.npy")):
        yield f"rows.{file.stem}", hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def curves(found: dict[str, Any], name: str) -> Iterator[tuple[str, Any]]:
    keys = dict.fromkeys(key for row in found["history"] for key in row)
    for key in keys:
        if not any(part in key for part in SPEED):
            yield f"{name}.{key}", [row[key] for row in found["history"] if key in row]
    yield f"{name}.sources", [[source, counts["tokens"]] for source, counts in found["data"]["sources"].items()]


def signals(run: Path) -> Iterator[tuple[str, Any]]:
    yield from weights(run / "signals", "signals")


def scores(run: Path) -> Iterator[tuple[str, Any]]:
    for file in sorted((run / "eval").glob("*.json")):
        found = json.loads(file.read_text())
        items = file.with_suffix(".items.jsonl").read_text().split("\n")
        kept = [json.loads(line) for line in filter(None, items)]
        for task in found["tasks"]:
            place = f"eval.{file.stem}.{task['task']}"
            yield place, [task["score"], task["chance"], task["n"]]
            yield f"{place}.interval.bits", [task["ci_low"], task["ci_high"]]
            own = [item for item in kept if all(item[key] == task[key] for key in ("task", "protocol", "metric"))]
            answers = [[item["id"], item["score"], item["prediction"]] for item in own]
            yield f"{place}.items.bits", hashlib.sha256(json.dumps(answers).encode()).hexdigest()[:16]
        yield f"eval.{file.stem}.size", [found["num_parameters"], found["num_layers"], found["num_bytes"]]


def report(run: Path) -> Iterator[tuple[str, Any]]:
    """The report's first table: what was lost and recovered."""
    lines = (run / "report.md").read_text().replace("\\", "").replace("*", "").splitlines()
    table = [line for line in lines[: lines.index("## Read with care")] if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    yield "report.rows", [cell[0] for cell in cells if not set(cell[0]) <= set(":- ")]
    yield "report.cells.bits", [cell for cell in cells if not set(cell[0]) <= set(":- ")]


READERS = {
    "measure": importance,
    "prune": plan,
    "record": signals,
    "distill": training,
    "eval": scores,
    "report": report,
}

if __name__ == "__main__":
    os.environ.update(
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR="cpu",
        HF_HUB_OFFLINE="1",
        HF_DATASETS_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
    )
    main()
