"""Which recipe gives back most, outside the form of its text: one cut, several ways to heal it.

    python benchmarks/recovery.py OUT [--seconds 720 | --tokens 80000] [--seeds 0 1 2] [--arms mixed by_source ...]
        [--drop 13 25 26] [--data-dir DIR] [--general FOLDER_OR_FILE ...] [--compensate both] [--control]

Every arm is a recipe of its own, run by `shoal distill` and `shoal eval`; cut, row length and batch are the same, so
are the items: those asked in the trained form (in), the same in forms that no text has (twin), abilities that no text
trains (out) and, with --data-dir (a folder as eval.data_dir takes it), public benchmarks. Arms are ranked by the mean
over twin, out and public. Equal wall time: an arm's tokens per second are measured in a short run first, and its
budget set so that its schedule ends when the time does. What is there is not done again, so a broken run goes on.

General text is what every machine has (documentation, docstrings, readmes), or that of --general. From the first cut
up, at a learning rate of 1e-3, if nothing else is said:

by_source      the teacher's distributions of 49 % general text, cross-entropy on 21 % instructions and 30 % abilities
               in all trained forms: the quickstart's recipe
mixed          half of each on the same text
mixed_kl       the teacher's distributions alone
mixed_lora     mixed, everything through LoRA adapters (Gromov et al. 2024, arXiv:2403.17887)
one_form       cross-entropy; 40 % Python's documentation, 60 % abilities in the form that `in` asks
general_kl     the teacher's distributions on general text alone
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from side_by_side import run_shoal, write_recipe

from shoal.artifacts.evaluation import Evaluation, ItemScore, TaskScore
from shoal.artifacts.training import Training
from shoal.eval.compare.standings import HEADLINE, Scores, even_weights, summed_change
from shoal.stats.paired import form_gap, form_gap_change, interval, no_retention, paired
from shoal.task_words import COLUMNS

DROP = (12, 13, 14, 21, 25, 26)
PROTOCOLS = {"retrieval": "continuation generation", "knowledge": "continuation generation"}
TASKS = (
    *(
        f"{task}{form}_{protocol}"
        for task in PROTOCOLS
        for form in ("", "_twin")
        for protocol in PROTOCOLS[task].split()
    ),
    *("reasoning_1step_continuation", "reasoning_1step_twin_continuation", "reasoning_worked", "reasoning_twin_worked"),
    *("needle_20sentences_generation", "knowledge_out_continuation", "knowledge_out_generation"),
    *("multi_hop_k1_continuation", "copying_offset1_continuation", "brackets_depth3_continuation"),
)
PUBLIC_TASKS = (
    *("arc_easy_continuation", "hellaswag_continuation", "piqa_continuation", "openbookqa_continuation"),
    *("lambada_continuation", "lambada_worked", "nq_passage_generation", "wikitext2_rolling"),
)
FIVE_POINTS = 400
"""Items that tell five points of accuracy, paired, of which a quarter changes: 1.96 sqrt(.25 / 400) = .049."""
LIMITS = {
    "needle_20sentences_generation": 60,
    **dict.fromkeys(PUBLIC_TASKS, FIVE_POINTS),
    "lambada_worked": 200,
    "wikitext2_rolling": 3,  # whole articles
}
GENERAL = {"docstrings": 7 / 14, "python_docs": 5 / 14, "readmes": 2 / 14}
"""Shares of what is there without --general; with the shares of an arm that names none, the quickstart's mixture."""
ONE_FORM = ({"path": "python_docs", "weight": 0.4}, {"path": "ability_texts_one_form", "weight": 0.6})
CROSS_ENTROPY = [{"kind": "cross_entropy"}]
TEACHER = [{"kind": "forward_kl"}]
ARMS: dict[str, dict[str, Any]] = {
    "by_source": {"losses": [*TEACHER, *CROSS_ENTROPY], "by_source": True},
    "mixed": {},
    "mixed_kl": {"losses": TEACHER},
    "mixed_lora": {"trainable": "all", "lora": {"rank": 64}},
    "one_form": {"data": ONE_FORM, "losses": CROSS_ENTROPY},
    "general_kl": {"general": 1.0, "losses": TEACHER},
}
"""What an arm says of section `distill`, and of its own: `general` is the share of general text, `by_source` gives each
source one loss."""
OWN_KEYS = {"general", "by_source"}
PROBE_STEPS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    budgets = parser.add_mutually_exclusive_group(required=True)
    budgets.add_argument("--seconds", type=float, help="equal wall time of training")
    budgets.add_argument("--tokens", type=int, help="equal tokens")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS])
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--drop", type=int, nargs="+", default=DROP)
    parser.add_argument("--data-dir", help="public benchmarks, as eval.data_dir takes them")
    parser.add_argument("--general", nargs="+", help="sources of general text, in equal shares")
    parser.add_argument("--compensate", choices=("scale", "linear", "both"), help="prune.compensate of every arm")
    parser.add_argument("--control", action="store_true", help="train the uncut teacher on the same rows too")
    arguments = parser.parse_args()
    if arguments.seconds and arguments.compensate:
        parser.error("--seconds: --compensate takes time before the first step, which is not counted; give --tokens")
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
    for role in ("teacher", "pruned"):  # under every arm of one seed; `shoal eval` checks that
        done = sorted(folder_of(arguments).glob(f"*-{seed}/eval/{role}.json"))
        if done and not (run_dir / "eval" / f"{role}.json").exists():
            (run_dir / "eval").mkdir(exist_ok=True)
            shutil.copy2(done[0], run_dir / "eval")
    run_shoal("eval", file)


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
        run_shoal("prune", file)
        run_shoal("distill", file)
    seconds = [row["seconds"] for row in Training.read(probe / Training.FILE).history]
    token_s = (seconds[-1] - seconds[0]) / ((len(seconds) - 1) * row_tokens)
    return max(row_tokens, math.floor(arguments.seconds / token_s / row_tokens) * row_tokens)


def general_text(arguments: argparse.Namespace) -> Mapping[str, float]:
    return {path: 1 / len(arguments.general) for path in arguments.general} if arguments.general else GENERAL


def mixture(arm: str, general: Mapping[str, float]) -> list[dict[str, Any]]:
    """Sources of an arm that names none of its own."""
    general_share = ARMS[arm].get("general", 0.49)
    abilities = (1.0 - general_share) * 10 / 17
    weights = {path: general_share * share for path, share in general.items()}
    weights |= {"instructions": 1.0 - general_share - abilities, "ability_texts": abilities}
    loss_of = {path: ["forward_kl" if path in general else "cross_entropy"] for path in weights}
    return [
        {"path": path, "weight": round(weight, 4), **({"losses": loss_of[path]} if "by_source" in ARMS[arm] else {})}
        for path, weight in weights.items()
        if weight > 1e-6
    ]


def recipe(arm: str, seed: int, arguments: argparse.Namespace, *, run_dir: Path, tokens: int) -> Path:
    trainer = {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "lr_scheduler_type": "linear"}
    trainer |= {"warmup_steps": 5, "save_strategy": "no"}
    distill: dict[str, Any] = {
        "data": mixture(arm, general_text(arguments)),
        "losses": [{"kind": "forward_kl", "weight": 0.5}, {"kind": "cross_entropy", "weight": 0.5}],
        "num_tokens": tokens,
        "sequence_length": 512,
        "trainable": "from_first_cut",
        "watch": None,
        "deepspeed": "deepspeed/zero0.json",  # one rank shares nothing out
        **{key: list(value) if key == "data" else value for key, value in ARMS[arm].items() if key not in OWN_KEYS},
        "trainer": trainer,
    }
    settings = {
        "model": "demo:smollm2-135m",
        "run_dir": str(run_dir),
        "seed": seed,
        "prune": {"drop": list(arguments.drop), "compensate": arguments.compensate},
        "distill": distill,
        "eval": {
            "tasks": [*TASKS, *(PUBLIC_TASKS if arguments.data_dir else ())],
            "limit": arguments.limit,
            "limits": {
                task: min(limit, 4 * arguments.limit)
                for task, limit in LIMITS.items()
                if task in TASKS or arguments.data_dir
            },
            "data_dir": arguments.data_dir,
            "control": arguments.control,
            "perplexity_data": "python_docs_heldout",
            "perplexity_tokens": 8192,
            "sequence_length": 512,
            "speed": False,
        },
    }
    return write_recipe(settings)


def table(arguments: argparse.Namespace) -> str:
    """Three tables with a row per arm: mean share kept by column, form gaps, every task; means over the seeds."""
    runs = {
        arm: {
            seed: run
            for seed in arguments.seeds
            if ((run := folder_of(arguments) / f"{arm}-{seed}") / "eval/distilled.json").exists()
        }
        for arm in arguments.arms
    }
    reference = next(own for own in runs.values() if own)
    teacher, pruned = (pooled(reference.values(), role) for role in ("teacher", "pruned"))
    rows: dict[str, tuple[Scores, Scores | None]] = {"pruned": (pruned, None)}
    for arm, own in ((arm, own) for arm, own in runs.items() if own):
        training = [Training.read(run / Training.FILE) for run in own.values()]
        title = f"{arm} ({training[0].num_tokens:,} tokens; {', '.join(f'{one.seconds:.0f}' for one in training)} s)"
        common = [seed for seed in own if seed in reference and own is not reference]
        rows[title] = (
            pooled(own.values(), "distilled"),
            pooled([reference[seed] for seed in common], "distilled") if common else None,
        )
        if all((run / "eval/control.json").exists() for run in own.values()):
            rows[f"control of {arm}"] = (pooled(own.values(), "control"), None)
    return "\n\n".join((kept_by_column(teacher, rows), form_gaps(teacher, rows), by_task(teacher, rows)))


Rows = Mapping[str, tuple[Scores, Scores | None]]
"""Title -> scores, and those of the first arm over the same seeds."""


def kept_by_column(teacher: Scores, rows: Rows) -> str:
    """The mean share kept of the teacher's distance to chance, by column and over those outside the trained form."""
    columns = column_weights(teacher)
    lines = [f"| arm | {' | '.join(columns)} |", f"|{' --- |' * (len(columns) + 1)}"]
    for title, (own, first) in rows.items():
        cells = [kept_text(teacher, rows["pruned"][0], own, weights, first) for weights in columns.values()]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def form_gaps(teacher: Scores, rows: Rows) -> str:
    """Score in the trained form minus that of the twin, and by how much it is larger than the first arm's."""
    pairs = [(task.twin_of, name) for name, task in teacher.items() if task.twin_of in teacher]
    lines = [f"| form gap | {' | '.join(own for own, _ in pairs)} |", f"|{' --- |' * (len(pairs) + 1)}"]
    for title, (of_arm, first) in {"teacher": (teacher, None), **rows}.items():
        cells = []
        for own, twin in pairs:
            gap = form_gap(of_arm[own], of_arm[twin])
            cell = f"{gap.difference:+.2f} [{gap.ci_low:+.2f}, {gap.ci_high:+.2f}]"
            if first is not None:
                change, low, high = form_gap_change((first[own], first[twin]), (of_arm[own], of_arm[twin]))
                cell += f"; over the first {change:+.2f} [{low:+.2f}, {high:+.2f}]"
            cells.append(cell)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def column_weights(teacher: Scores) -> dict[str, Mapping[str, float]]:
    """Weights of the tasks where the teacher is clear of chance: by column, and over all outside the trained form."""
    usable = [task for task in teacher.values() if not no_retention(task)]
    columns = {name: even_weights(own) for name in COLUMNS if (own := [t for t in usable if t.column == name])}
    outside = [task for task in usable if task.column in HEADLINE]
    return {**columns, "twin, out, public": even_weights(outside, lambda task: task.column)}


def kept_text(teacher: Scores, pruned: Scores, own: Scores, weights: Mapping[str, float], first: Scores | None) -> str:
    """Mean share kept with its interval, and its distance to the cut model's and to the first arm's."""
    scales = {name: weight / (teacher[name].score - teacher[name].chance) for name, weight in weights.items()}
    lost = summed_change(scales, teacher, own)
    cell = f"{1 + lost.value:.2f} [{1 + lost.ci_low:.2f}, {1 + lost.ci_high:.2f}]"
    if own is not pruned:
        gained = summed_change(scales, pruned, own)
        cell += f"; over pruned {gained.value:+.2f} [{gained.ci_low:+.2f}, {gained.ci_high:+.2f}]"
    if first is not None and first is not pruned:
        change = summed_change(scales, first, own)
        cell += f"; over the first {change.value:+.2f} [{change.ci_low:+.2f}, {change.ci_high:+.2f}]"
    return cell


def by_task(teacher: Scores, rows: Rows) -> str:
    """Every task's score with its interval, and how far it is from the first arm's."""
    titles = [f"{task.column or 'text'}: {name}" for name, task in teacher.items()]
    lines = [f"| arm | {' | '.join(titles)} |", f"|{' --- |' * (len(titles) + 1)}"]
    lines.append(f"| teacher | {' | '.join(f'{task.score:.3f}' for task in teacher.values())} |")
    for title, (own, first) in rows.items():
        cells = []
        for name, score in own.items():
            cell = f"{score.score:.3f} [{score.ci_low:.3f}, {score.ci_high:.3f}]"
            if first is not None:
                change = paired(first[name], score)
                cell += f"; {change.difference:+.3f} [{change.ci_low:+.3f}, {change.ci_high:+.3f}]"
            cells.append(cell)
        lines.append(f"| {title} | {' | '.join(cells)} |")
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


def scores(run_dir: Path, role: str) -> dict[str, TaskScore]:
    return {score.task: score for score in Evaluation.read(run_dir / "eval" / f"{role}.json").tasks}


if __name__ == "__main__":
    main()
