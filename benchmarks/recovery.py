"""Which recipe gives back most: one cut, several ways to heal it, under equal wall time or equal tokens.

    python benchmarks/recovery.py OUT [--seconds 720 | --tokens 80000] [--seeds 0 1 2] [--arms default forward_kl ...]

Every arm is a recipe of its own, run by `shoal distill` and `shoal eval`; cut, data, row length and batch are the same,
and so are the evaluated items. Equal wall time: an arm's tokens per second are measured in a short run first, and its
budget set so that its schedule ends when the time does; an arm whose teacher writes has that much less time to train.
What is there is not done again, so a broken run goes on.

default        what configs/quickstart.yaml does: the text's own tokens, from the first cut up
teacher        the teacher's distributions instead, from the first cut up
both           half of each
cross_entropy  the text's own tokens, everything trained
lora           cross-entropy through LoRA adapters (Gromov et al. 2024, arXiv:2403.17887)
forward_kl     the teacher's distributions, everything trained (Minitron, arXiv:2407.14679)
streamline     only the layers before the gaps, on hidden states (LLM-Streamline, arXiv:2403.19135)
self_written   the default, with prose that the teacher wrote in place of the documentation (arXiv:2602.01997)
local          shoal's local heal first, then the default
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from side_by_side import run_shoal, write_recipe

from shoal.artifacts.artifact import Evaluation, ItemScore, TaskScore, Training
from shoal.stats.paired import interval, paired, retention

DROP = (12, 13, 14, 18, 21, 22, 25, 26)
TASKS = (
    "retrieval_continuation",
    "retrieval_generation",
    "knowledge_continuation",
    "knowledge_generation",
    "reasoning_1step_continuation",
    "reasoning_worked",
)
MIXTURE = ({"path": "python_docs", "weight": 0.4}, {"path": "ability_texts", "weight": 0.6})
EVERYTHING = {"trainable": "all", "trainer": {"learning_rate": 3e-4}}
"""With all weights trained, 1e-3 is worse than this; from the first cut up 5e-4 and 2e-3 are worse than 1e-3."""
TEACHER = [{"kind": "forward_kl"}]
ARMS: dict[str, dict[str, Any]] = {
    "default": {},
    "teacher": {"losses": TEACHER},
    "both": {"losses": [{"kind": "forward_kl", "weight": 0.5}, {"kind": "cross_entropy", "weight": 0.5}]},
    "cross_entropy": EVERYTHING,
    "lora": {"trainable": "all", "lora": {"rank": 64}},
    "forward_kl": {"losses": TEACHER, **EVERYTHING},
    "streamline": {"losses": [{"kind": "hidden_states"}], "trainable": "near_gaps"},
    "self_written": {
        "data": [
            {"path": "python_docs", "weight": 0.02},
            {"path": "teacher_text", "weight": 0.38},
            {"path": "ability_texts", "weight": 0.6},
        ]
    },
    "local": {"local": {"num_tokens": 16_384}},
}
PROBE_STEPS = 4
WRITTEN_SHARE = 1 / 8
"""Tokens that the teacher writes, of those trained on; at least LEAST_WRITTEN."""
LEAST_WRITTEN = 4000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    budgets = parser.add_mutually_exclusive_group(required=True)
    budgets.add_argument("--seconds", type=float, help="equal wall time of training")
    budgets.add_argument("--tokens", type=int, help="equal tokens")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--drop", type=int, nargs="+", default=DROP)
    arguments = parser.parse_args()
    for arm in arguments.arms:
        for seed in arguments.seeds:
            heal(arm, seed, arguments)
    print(table(arguments))


def heal(arm: str, seed: int, arguments: argparse.Namespace) -> None:
    """Train and evaluate one arm under one seed."""
    tokens = arguments.tokens or budget(arm, arguments)
    run_dir = folder_of(arguments) / f"{arm}-{seed}"
    file = recipe(arm, seed, arguments, run_dir=run_dir, tokens=tokens)
    run_shoal("distill", file)
    for role in ("teacher", "pruned"):  # the same under every arm of one seed; `shoal eval` checks that
        done = sorted(folder_of(arguments).glob(f"*-{seed}/eval/{role}.json"))
        if done and not (run_dir / "eval" / f"{role}.json").exists():
            (run_dir / "eval").mkdir(exist_ok=True)
            shutil.copy2(done[0], run_dir / "eval")
    run_shoal("eval", file)


def folder_of(arguments: argparse.Namespace) -> Path:
    return arguments.out / (f"{arguments.tokens}-tokens" if arguments.tokens else f"{arguments.seconds:g}-seconds")


def budget(arm: str, arguments: argparse.Namespace) -> int:
    """Tokens that the arm trains on in the time given, by a short run's steps but the first.

    What the teacher writes is timed as the difference to a second run, which finds it written.
    """
    row_tokens = 2 * 512
    probes = [arguments.out / "probe" / name for name in ((arm, f"{arm}-again") if writes(arm) else (arm,))]
    walls = [probe / "wall_s" for probe in probes]
    for probe, wall in zip(probes, walls, strict=True):
        file = recipe(arm, 0, arguments, run_dir=probe, tokens=(PROBE_STEPS + 1) * row_tokens)
        if not wall.exists():
            run_shoal("prune", file)
            began = time.monotonic()
            run_shoal("distill", file, "distill.local=null")
            wall.write_text(str(time.monotonic() - began))
    seconds = [row["seconds"] for row in Training.read(probes[-1] / Training.FILE).history]
    token_s = (seconds[-1] - seconds[0]) / ((len(seconds) - 1) * row_tokens)
    if writes(arm):
        first, again = (float(wall.read_text()) for wall in walls)
        token_s += WRITTEN_SHARE * (first - again) / LEAST_WRITTEN
    return max(row_tokens, math.floor(arguments.seconds / token_s / row_tokens) * row_tokens)


def writes(arm: str) -> bool:
    """Whether the teacher writes for this arm."""
    return any(source["path"] == "teacher_text" for source in ARMS[arm].get("data", ()))


def recipe(arm: str, seed: int, arguments: argparse.Namespace, *, run_dir: Path, tokens: int) -> Path:
    trainer = {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "lr_scheduler_type": "linear"}
    trainer |= {"warmup_steps": 5, "save_strategy": "no", **ARMS[arm].get("trainer", {})}
    distill: dict[str, Any] = {
        "data": list(MIXTURE),
        "losses": [{"kind": "cross_entropy"}],
        "num_tokens": tokens,
        "sequence_length": 512,
        "trainable": "from_first_cut",
        "watch": None,
        "deepspeed": "deepspeed/zero0.json",  # one rank shares nothing out
        **ARMS[arm],
        "trainer": trainer,
    }
    if writes(arm):
        num_written = max(LEAST_WRITTEN, round(WRITTEN_SHARE * tokens))
        distill["writing"] = {"num_tokens": num_written, "folder": str(arguments.out.resolve() / "written")}
    settings = {
        "model": "demo:smollm2-135m",
        "run_dir": str(run_dir),
        "seed": seed,
        "prune": {"drop": list(arguments.drop)},
        "distill": distill,
        "eval": {
            "tasks": list(TASKS),
            "limit": arguments.limit,
            "perplexity_data": "python_docs_heldout",
            "perplexity_tokens": 8192,
            "sequence_length": 512,
            "speed": False,
        },
    }
    return write_recipe(settings)


def table(arguments: argparse.Namespace) -> str:
    """One row per arm: the mean over its seeds and their range, what is kept, and how far it is from the first arm."""
    runs = {
        arm: {
            seed: run
            for seed in arguments.seeds
            if ((run := folder_of(arguments) / f"{arm}-{seed}") / "eval/distilled.json").exists()
        }
        for arm in arguments.arms
    }
    reference, *_ = runs.values()
    teacher, pruned = (pooled(reference.values(), role) for role in ("teacher", "pruned"))
    names = ["arm", *teacher]
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}", row("teacher", teacher), row("pruned", pruned)]
    for arm, own in ((arm, own) for arm, own in runs.items() if own):
        training = [Training.read(run / Training.FILE) for run in own.values()]
        seconds = ", ".join(f"{result.seconds:.0f}" for result in training)
        cells = [f"{arm} ({training[0].num_tokens:,} tokens; {seconds} s)"]
        common = [seed for seed in own if seed in reference and own is not reference]
        own_scores, reference_scores = (pooled([of[seed] for seed in common], "distilled") for of in (own, reference))
        for name, score in pooled(own.values(), "distilled").items():
            cell = f"{score.score:.3f} [{score.ci_low:.3f}, {score.ci_high:.3f}]"
            if len(own) > 1:
                values = [scores(run, "distilled")[name].score for run in own.values()]
                cell += f" ({min(values):.3f} to {max(values):.3f})"
            kept = retention(teacher[name], score)
            if kept.value is not None:
                cell += f"; keeps {kept.value:.2f} [{kept.ci_low:.2f}, {kept.ci_high:.2f}]"
            if common:
                change = paired(reference_scores[name], own_scores[name])
                cell += f"; {change.difference:+.3f} [{change.ci_low:+.3f}, {change.ci_high:+.3f}]"
            cells.append(cell)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def pooled(runs: Iterable[Path], role: str) -> dict[str, TaskScore]:
    """Scores over several seeds, which ask the same items: what one item counts is its mean over them."""
    by_run = [scores(run, role) for run in runs]
    by_task: dict[str, TaskScore] = {}
    for name in by_run[0] if by_run else ():
        tasks = [of_run[name] for of_run in by_run]
        by_id: dict[str, list[ItemScore]] = defaultdict(list)
        for item in (item for task in tasks for item in task.items):
            by_id[item.id].append(item)
        items = tuple(
            replace(same[0], score=fmean(i.score for i in same), weight=fmean(i.weight for i in same))
            for same in by_id.values()
        )
        task = replace(tasks[0], items=items, n=len(items), prompts="", score=fmean(task.score for task in tasks))
        low, high = interval(task)
        by_task[name] = replace(task, ci_low=low, ci_high=high)
    return by_task


def row(role: str, by_task: dict[str, TaskScore]) -> str:
    return f"| {role} | {' | '.join(f'{score.score:.3f}' for score in by_task.values())} |"


def scores(run_dir: Path, role: str) -> dict[str, TaskScore]:
    return {score.task: score for score in Evaluation.read(run_dir / "eval" / f"{role}.json").tasks}


if __name__ == "__main__":
    main()
