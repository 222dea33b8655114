"""Which recipe gives back most, outside the form of its text: one cut, several ways to heal it.

    python benchmarks/recovery.py OUT [--seconds 720 | --tokens 80000] [--seeds 0 1 2] [--arms mixed forms ...]
        [--drop 13 25 26] [--data-dir DIR] [--general FOLDER_OR_FILE ...] [--search-tokens 8192] [--control]

Every arm is a recipe of its own, run by `shoal distill` and `shoal eval`; cut, row length and batch are the same, so
are the items: those asked in the trained form (in), the same in forms that no text has (twin), abilities that no text
trains (out) and, with --data-dir (a folder as eval.data_dir takes it), public benchmarks. Arms are ranked by the mean
over twin, out and public. Equal wall time: an arm's tokens per second are measured in a short run first, and its
budget set so that its schedule ends when the time does; an arm whose teacher writes, or that heals layer by layer
first, has that much less time to train; arms that score or choose before they train are run by --tokens alone.
What is there is not done again, so a broken run goes on.

General text is what every machine has (documentation, docstrings, readmes), or that of --general. From the first cut
up, at a learning rate of 1e-3, if nothing else is said:

one_form       cross-entropy; 40 % Python's documentation, 60 % abilities in the form that `in` asks: the first default
forms          the same with the abilities in all trained forms
general_kl     the teacher's distributions on general text alone
mixed_kl       the teacher's distributions; 49 % general text, 21 % instructions, 30 % abilities in all trained forms
mixed_ce       cross-entropy on the same text
mixed          half of each on the same text: the quickstart's recipe until by_source beat it
by_source      on the same text, the teacher's distributions of general text and cross-entropy on the rest: the
               quickstart's recipe
half           as by_source, half of the text abilities: 35 % general text, 15 % instructions
mixed_slow     mixed at 5e-4
mixed_all      mixed with everything trained, at 3e-4
mixed_lora     mixed, everything through LoRA adapters (Gromov et al. 2024, arXiv:2403.17887)
local          shoal's local heal (LLM-Streamline, arXiv:2403.19135) first, then by_source
local_alone    the local heal by itself on all rows of a budget of --tokens
near_gaps      by_source, training the layers beside the gaps alone: about the memory that the local heal needs
multi_scale    by_source, and all text with the teacher's states, pooled over tokens in late layers (arXiv:2303.05251)
self_written   mixed, half of its general text written by the teacher (arXiv:2602.01997)
by_damage      by_source, its shares by what the cut took from each source
horizon        mixed_kl, in three tenths of the later steps on what the student writes, of growing length
rounds         iterative (below) in two rounds, each with half the tokens and half the layers, chosen anew

Four arms heal as by_source does and choose as many layers themselves, as `rounds` does too: one_shot by the loss of
single drops, iterative by greedy removal, and both _scaled, which close every gap with a factor (Prune&Comp's
ablation); of each there is a row for its cut before it is healed.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from side_by_side import run_shoal, write_recipe

from shoal.artifacts.evaluation import Evaluation, ItemScore, TaskScore
from shoal.artifacts.training import Training
from shoal.eval.compare.means import HEADLINE, Scores, even_weights, summed_change
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
FORMS = ({"path": "python_docs", "weight": 0.4}, {"path": "ability_texts", "weight": 0.6})
CROSS_ENTROPY = [{"kind": "cross_entropy"}]
TEACHER = [{"kind": "forward_kl"}]
BY_SOURCE = {"losses": [*TEACHER, *CROSS_ENTROPY], "by_source": True}
ARMS: dict[str, dict[str, Any]] = {
    "one_form": {"data": ONE_FORM, "losses": CROSS_ENTROPY},
    "forms": {"data": FORMS, "losses": CROSS_ENTROPY},
    "general_kl": {"general": 1.0, "losses": TEACHER},
    "mixed_kl": {"losses": TEACHER},
    "mixed_ce": {"losses": CROSS_ENTROPY},
    "mixed": {},
    "by_source": BY_SOURCE,
    "half": {"general": 0.35, "abilities": 0.5, **BY_SOURCE},
    "mixed_slow": {"trainer": {"learning_rate": 5e-4}},
    "mixed_all": {"trainable": "all", "trainer": {"learning_rate": 3e-4}},
    "mixed_lora": {"trainable": "all", "lora": {"rank": 64}},
    # many small steps: by the error behind the gaps, four of 8 rows at 2e-4 do nothing
    "local": {"local": {"num_tokens": 16_384, "batch_size": 2, "rows_at_once": 2, "learning_rate": 1e-3}, **BY_SOURCE},
    "local_alone": {
        "local": {"num_tokens": 10**9, "batch_size": 2, "rows_at_once": 2, "learning_rate": 1e-3},
        **BY_SOURCE,
        "trainer": {"max_steps": 1, "learning_rate": 1e-9},  # one step, which moves nothing
    },
    "near_gaps": {"trainable": "near_gaps", **BY_SOURCE},
    "multi_scale": {
        "losses": [*TEACHER, *CROSS_ENTROPY, {"kind": "hidden_states", "multi_scale": True}],
        "by_source": True,
    },
    "self_written": {"general": 0.25, "written": 0.24},
    "by_damage": {"data_policy": "by_damage", **BY_SOURCE},
    "horizon": {"losses": TEACHER, "on_policy": {"share": 0.3, "horizon": {"max": 256}}},
    "rounds": {"choose": "sleb", "rounds": 2, **BY_SOURCE},
    "one_shot": {"choose": "single_drop_perplexity", **BY_SOURCE},
    "one_shot_scaled": {"choose": "single_drop_perplexity", "scaled": True, **BY_SOURCE},
    "iterative": {"choose": "sleb", **BY_SOURCE},
    "iterative_scaled": {"choose": "sleb", "scaled": True, **BY_SOURCE},
}
"""What an arm says of section `distill`, and of its own: `general`, `written` and `abilities` are shares of general
text, of the teacher's and of prompts with answers, `by_source` gives each source one loss, `choose` names the metric of
an arm with a cut of its own, `scaled` closes its gaps, and `rounds` share layers and tokens."""
OWN_KEYS = {"general", "written", "abilities", "by_source", "choose", "scaled", "rounds"}
UNTIMED = {"by_damage", *(arm for arm, own in ARMS.items() if "choose" in own)}
"""Arms that score the cut, or choose their layers, before they train."""
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
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="all that go with the other arguments, if left out")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--drop", type=int, nargs="+", default=DROP)
    parser.add_argument("--data-dir", help="public benchmarks, as eval.data_dir takes them")
    parser.add_argument("--general", nargs="+", help="sources of general text, in equal shares")
    parser.add_argument("--search-tokens", type=int, default=8192, help="tokens on which arms choose their own layers")
    parser.add_argument("--compensate", choices=("scale", "linear", "both"), help="prune.compensate of every arm")
    parser.add_argument("--control", action="store_true", help="train the uncut teacher on the same rows too")
    arguments = parser.parse_args()
    refused = {arm: why for arm in ARMS if (why := why_not(arm, arguments)) is not None}
    arguments.arms = arguments.arms or [arm for arm in ARMS if arm not in refused]
    for arm in arguments.arms or refused:
        if arm in refused:
            parser.error(refused[arm])
    for arm in arguments.arms:
        for seed in arguments.seeds:
            heal(arm, seed, arguments)
    print(table(arguments))


def why_not(arm: str, arguments: argparse.Namespace) -> str | None:
    """Why the arm does not go with the other arguments; None = it does."""
    if arguments.compensate and "choose" in ARMS[arm]:
        return f"--compensate: closes the gaps of the common cut, and {arm} makes its own; leave one of them out"
    if arguments.seconds and (arguments.compensate or arm in UNTIMED):
        return (
            f"--seconds: {f'--compensate {arguments.compensate}' if arguments.compensate else arm} takes time before "
            "the first step, which is not counted here; give --tokens, or leave it out"
        )
    if arguments.seconds and arm == "local_alone":
        return f"--seconds: {arm} takes all rows whatever time that is; give --tokens, or leave it out"
    return None


def heal(arm: str, seed: int, arguments: argparse.Namespace) -> None:
    """Train and evaluate one arm under one seed."""
    tokens = arguments.tokens or budget(arm, arguments)
    run_dir = folder_of(arguments) / f"{arm}-{seed}"
    file = recipe(arm, seed, arguments, run_dir=run_dir, tokens=tokens)
    run_shoal("distill", file)
    same = ("teacher",) if "choose" in ARMS[arm] else ("teacher", "pruned")
    for role in same:  # under every arm of one seed; `shoal eval` checks that
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
    """Tokens that the arm trains on in the time given, by a short run's steps but the first.

    What the teacher writes is timed as the difference to a second run, which finds it written; the local heal says how
    long it took.
    """
    row_tokens = 2 * 512
    probes = [
        arguments.out / "probe" / cut_of(arguments) / name
        for name in ((arm, f"{arm}-again") if writes(arm) else (arm,))
    ]
    walls = [probe / "wall_s" for probe in probes]
    for probe, wall in zip(probes, walls, strict=True):
        file = recipe(arm, 0, arguments, run_dir=probe, tokens=(PROBE_STEPS + 1) * row_tokens)
        if not wall.exists():
            run_shoal("prune", file)
            began = time.monotonic()
            run_shoal("distill", file)
            wall.write_text(str(time.monotonic() - began))
    seconds = [row["seconds"] for row in Training.read(probes[-1] / Training.FILE).history]
    token_s, left = (seconds[-1] - seconds[0]) / ((len(seconds) - 1) * row_tokens), arguments.seconds
    if writes(arm):
        first, again = (float(wall.read_text()) for wall in walls)
        token_s += WRITTEN_SHARE * (first - again) / LEAST_WRITTEN
    if local := ARMS[arm].get("local"):
        healed = json.loads((probes[-1] / "local/local.json").read_text())
        left -= healed["seconds"] * local["num_tokens"] / healed["num_tokens"]
    return max(row_tokens, math.floor(left / token_s / row_tokens) * row_tokens)


def writes(arm: str) -> bool:
    """Whether the teacher writes for this arm."""
    return "written" in ARMS[arm]


def general_text(arguments: argparse.Namespace) -> Mapping[str, float]:
    return {path: 1 / len(arguments.general) for path in arguments.general} if arguments.general else GENERAL


def mixture(arm: str, general: Mapping[str, float]) -> list[dict[str, Any]]:
    """Sources of an arm that names none of its own."""
    shares = {"general": 0.49, "written": 0.0, **ARMS[arm]}
    rest = 1.0 - shares["general"] - shares["written"]
    abilities = shares.get("abilities", rest * 10 / 17)
    weights = {path: shares["general"] * share for path, share in general.items()}
    weights |= {"teacher_text": shares["written"], "instructions": rest - abilities, "ability_texts": abilities}
    # losses inside the layers are for all text; of the head's two, each source has its own
    inside = [loss["kind"] for loss in ARMS[arm].get("losses", ()) if loss not in (*TEACHER, *CROSS_ENTROPY)]
    loss_of = {path: ["forward_kl" if path in general else "cross_entropy", *inside] for path in weights}
    return [
        {"path": path, "weight": round(weight, 4), **({"losses": loss_of[path]} if "by_source" in ARMS[arm] else {})}
        for path, weight in weights.items()
        if weight > 1e-6
    ]


def recipe(arm: str, seed: int, arguments: argparse.Namespace, *, run_dir: Path, tokens: int) -> Path:
    trainer = {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "lr_scheduler_type": "linear"}
    trainer |= {"warmup_steps": 5, "save_strategy": "no", **ARMS[arm].get("trainer", {})}
    distill: dict[str, Any] = {
        "data": mixture(arm, general_text(arguments)),
        "losses": [{"kind": "forward_kl", "weight": 0.5}, {"kind": "cross_entropy", "weight": 0.5}],
        "num_tokens": tokens // ARMS[arm].get("rounds", 1),
        "sequence_length": 512,
        "trainable": "from_first_cut",
        "watch": None,
        "deepspeed": "deepspeed/zero0.json",  # one rank shares nothing out
        **{key: list(value) if key == "data" else value for key, value in ARMS[arm].items() if key not in OWN_KEYS},
        "trainer": trainer,
    }
    if writes(arm):
        num_written = max(LEAST_WRITTEN, round(WRITTEN_SHARE * tokens))
        distill["writing"] = {"num_tokens": num_written, "folder": str(arguments.out.resolve() / "written")}
    settings = {
        "model": "demo:smollm2-135m",
        "run_dir": str(run_dir),
        "seed": seed,
        **cut(arm, arguments),
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


def cut(arm: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Sections `measure` and `prune` of an arm: the cut that all share, or as many layers of its own choice."""
    if not (metric := ARMS[arm].get("choose")):
        return {"prune": {"drop": list(arguments.drop), "compensate": arguments.compensate}}
    text = {"data": "python_docs", "num_tokens": arguments.search_tokens, "sequence_length": 512, "batch_size": 4}
    scaled, num_drop, rounds = ARMS[arm].get("scaled", False), len(arguments.drop), ARMS[arm].get("rounds", 1)
    in_a_round = -(-num_drop // rounds)
    scores = {"metrics": [metric], "num_drop": in_a_round, "scale_removals": scaled and metric == "sleb"}
    chosen = {"metric": metric, "num_drop": num_drop, "rounds": rounds}
    return {"measure": {**text, **scores}, "prune": {**chosen, "compensate": "scale" if scaled else None}}


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
        healed = [[*sorted(run.glob(f"rounds/*/{Training.FILE}")), run / Training.FILE] for run in own.values()]
        training = [[Training.read(file) for file in files] for files in healed]
        local = [json.loads(file.read_text()) for run in own.values() if (file := run / "local/local.json").is_file()]
        healing = [heal["seconds"] for heal in local] or [0.0] * len(training)
        seconds = ", ".join(
            f"{sum(one.seconds for one in of_rounds) + own_s:.0f}"
            for of_rounds, own_s in zip(training, healing, strict=True)
        )
        first = f"{local[0]['num_tokens']:,} by the local heal, then " if local else ""
        if "choose" in ARMS[arm]:
            rows[f"cut of {arm}"] = (pooled(own.values(), "pruned"), None if own is reference else pruned)
        title = f"{arm} ({first}{sum(one.num_tokens for one in training[0]):,} tokens; {seconds} s)"
        common = [seed for seed in own if seed in reference and own is not reference]
        rows[title] = (
            pooled(own.values(), "distilled"),
            pooled([reference[seed] for seed in common], "distilled") if common else None,
        )
        if all((run / "eval/control.json").exists() for run in own.values()):
            rows[f"control of {arm}"] = (pooled(own.values(), "control"), None)
    return "\n\n".join((kept_by_column(teacher, rows), form_gaps(teacher, rows), by_task(teacher, rows)))


Rows = Mapping[str, tuple[Scores, Scores | None]]
"""Title -> scores, and those of the first arm over the same seeds; beside another cut those of the first arm's cut."""


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
