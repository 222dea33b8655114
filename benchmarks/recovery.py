"""Which recipe gives back most, outside the form of its text: one cut, several ways to heal it.

    python benchmarks/recovery.py OUT [--seconds 720 | --tokens 80000] [--seeds 0 1 2] [--arms mixed by_source ...]
        [--drop 13 25 26] [--data-dir DIR] [--compensate both] [--control]

Every arm is the quickstart's recipe with other losses or text, run by `shoal distill` and `shoal eval`; cut, row length
and batch are the same, so are the items: the quickstart's, and with --data-dir (a folder as eval.data_dir takes it)
those of suite `transfer`. In the end `shoal compare` ranks the arms, by their means over the seeds. Equal wall time: an
arm's tokens per second are measured in a short run first, and its budget set so that its schedule ends when the time
does. What is there is not done again, so a broken run goes on.

by_source      the teacher's distributions of 49 % general text, cross-entropy on 21 % instructions and 30 % abilities
               in all trained forms: the quickstart's recipe
mixed          half of each on the same text
mixed_kl       the teacher's distributions alone
mixed_lora     mixed, everything through LoRA adapters (Gromov et al. 2024, arXiv:2403.17887)
one_form       cross-entropy; 40 % Python's documentation, 60 % abilities in the form that `in` asks
"""

from __future__ import annotations

import argparse
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from shoal.artifacts.evaluation import ROLES, Scores, TaskScore
from shoal.artifacts.training import Training
from shoal.stats.paired import interval

DROP = (12, 13, 14, 21, 25, 26)
QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
MIXED = [{"kind": "forward_kl", "weight": 0.5}, {"kind": "cross_entropy", "weight": 0.5}]
ONE_FORM = [{"path": "python_docs", "weight": 0.4}, {"path": "ability_texts_one_form", "weight": 0.6}]
ARMS: dict[str, dict[str, Any]] = {
    "by_source": {},
    "mixed": {"losses": MIXED},
    "mixed_kl": {"losses": [{"kind": "forward_kl"}]},
    "mixed_lora": {"losses": MIXED, "trainable": "all", "lora": {"r": 64}},
    "one_form": {"losses": [{"kind": "cross_entropy"}], "data": ONE_FORM},
}
"""What section `distill` of an arm has otherwise than the quickstart's; losses are then those of all sources."""
PROBE_STEPS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    budgets = parser.add_mutually_exclusive_group(required=True)
    budgets.add_argument("--seconds", type=float, help="equal wall time of training")
    budgets.add_argument("--tokens", type=int, help="equal tokens")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS])
    parser.add_argument("--limit", type=int, default=200, help="most items of a task")
    parser.add_argument("--drop", type=int, nargs="+", default=DROP)
    parser.add_argument("--data-dir", help="public benchmarks, as eval.data_dir takes them")
    parser.add_argument(
        "--compensate", choices=("scale", "linear", "both"), help="method of compensate in prune.changes of every arm"
    )
    parser.add_argument("--control", action="store_true", help="train the uncut teacher on the same rows too")
    arguments = parser.parse_args()
    if arguments.seconds and arguments.compensate:
        parser.error("--seconds: --compensate takes time before the first step, which is not counted; give --tokens")
    for arm in arguments.arms:
        for seed in arguments.seeds:
            heal(arm, seed, arguments)
    here = folder_of(arguments)
    of_arms = [pooled([here / f"{arm}-{seed}" for seed in arguments.seeds], here / arm) for arm in arguments.arms]
    if len(of_arms) > 1:
        run_shoal("compare", *of_arms, "--out", here / "compare")


def heal(arm: str, seed: int, arguments: argparse.Namespace) -> None:
    """Train and evaluate one arm under one seed."""
    tokens = arguments.tokens or budget(arm, arguments)
    run_dir = folder_of(arguments) / f"{arm}-{seed}"
    file = recipe(arm, seed, arguments, run_dir=run_dir, tokens=tokens)
    run_shoal("distill", "--config", file)
    for role in ("teacher", "pruned"):  # under every arm of one seed; `shoal eval` checks that
        done = sorted(folder_of(arguments).glob(f"*-{seed}/eval/{role}.json"))
        if done and not (run_dir / "eval" / f"{role}.json").exists():
            (run_dir / "eval").mkdir(exist_ok=True)
            shutil.copy2(done[0], run_dir / "eval")
    run_shoal("eval", "--config", file)


def folder_of(arguments: argparse.Namespace) -> Path:
    budget = f"{arguments.tokens}-tokens" if arguments.tokens else f"{arguments.seconds:g}-seconds"
    closed = f"-{arguments.compensate}" if arguments.compensate else ""
    return arguments.out / f"without-{cut_of(arguments)}{closed}-{budget}"


def cut_of(arguments: argparse.Namespace) -> str:
    return "-".join(map(str, sorted(arguments.drop)))


def budget(arm: str, arguments: argparse.Namespace) -> int:
    """Tokens that the arm trains on in the time given, by a short run's steps but the first."""
    row_tokens = 2 * 512
    probe = arguments.out / "probe" / cut_of(arguments) / arm
    if not (probe / Training.FILE).exists():
        file = recipe(arm, 0, arguments, run_dir=probe, tokens=(PROBE_STEPS + 1) * row_tokens)
        run_shoal("prune", "--config", file)
        run_shoal("distill", "--config", file)
    seconds = [row["seconds"] for row in Training.load(probe / Training.FILE).history]
    token_s = (seconds[-1] - seconds[0]) / ((len(seconds) - 1) * row_tokens)
    return max(row_tokens, math.floor(arguments.seconds / token_s / row_tokens) * row_tokens)


def recipe(arm: str, seed: int, arguments: argparse.Namespace, *, run_dir: Path, tokens: int) -> Path:
    """The file of the quickstart's recipe, changed as the arm and the command line say."""
    settings = yaml.safe_load(QUICKSTART.read_text())
    distill = settings["distill"] | {"num_tokens": tokens, "watch": None, **ARMS[arm]}
    if "losses" in ARMS[arm]:
        distill["data"] = [{"path": source["path"], "weight": source["weight"]} for source in distill["data"]]
    distill["trainer"]["save_strategy"] = "no"
    scored = {"limit": arguments.limit, "data_dir": arguments.data_dir, "control": arguments.control, "speed": False}
    changes = [{"kind": "compensate", "method": arguments.compensate}] if arguments.compensate else []
    read = {"data": ["python_docs", "docstrings", "instructions", "ability_texts"], "num_tokens": 65_536}
    settings |= {
        "run_dir": str(run_dir),
        "seed": seed,
        "full_size_gflops": None,
        "measure": settings.get("measure", {}) | read,
        "prune": {"drop": list(arguments.drop), "changes": changes},
        "distill": distill,
        "eval": settings["eval"] | scored | ({"tasks": "transfer"} if arguments.data_dir else {}),
        "track": {"wandb": "off"},
    }
    run_dir.mkdir(parents=True, exist_ok=True)
    file = run_dir / "benchmark.yaml"
    file.write_text(yaml.safe_dump(settings, sort_keys=False))
    return file


def run_shoal(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "shoal.launch.cli", *map(str, words)], check=True)


def pooled(runs: Sequence[Path], folder: Path) -> Path:
    """``folder`` with the scores of an arm over several seeds, as `shoal compare` reads them."""
    for role in ROLES:
        files = [run / "eval" / f"{role}.json" for run in runs]
        if all(file.is_file() for file in files):
            evaluations = [Scores.load(file) for file in files]
            tasks = tuple(pooled_task(same) for same in zip(*(own.tasks for own in evaluations), strict=True))
            replace(evaluations[0], tasks=tasks).save(folder / "eval" / f"{role}.json")
    return folder


def pooled_task(same: Sequence[TaskScore]) -> TaskScore:
    """A task's score over several seeds, which ask the same items: what one item counts is its mean over them."""
    first = same[0]
    by_id = {item.id: [] for item in first.items}
    for item in (item for task in same for item in task.items):
        by_id[item.id].append(item)
    items = tuple(
        replace(own[0], score=fmean(i.score for i in own), weight=fmean(i.weight for i in own))
        for own in by_id.values()
    )
    task = replace(first, items=items, n=len(items), prompts="", score=fmean(task.score for task in same))
    low, high = interval(task)
    return replace(task, ci_low=low, ci_high=high)


if __name__ == "__main__":
    main()
