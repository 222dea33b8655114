"""A run directory's artifacts with small, made-up results, for everything that reads them."""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.evaluation import BatchSpeed, ItemScore, Scores, Speed, SpeedScore, TaskScore
from shoal.artifacts.importance import Importance
from shoal.artifacts.plan import Plan, PlannedChange
from shoal.artifacts.training import Training
from shoal.eval.harness.rates import hold_answers, text_rates, with_rates
from shoal.recipe.recipe import parse_recipe
from shoal.recipe.section import as_dict
from shoal.stats.paired import interval

NUM_LAYERS = 8
DROP = (3, 4, 5)
SKILL = {"teacher": 1.0, "pruned": 0.2, "distilled": 0.7}
"""How far each role lies between chance and the teacher."""


def provenance() -> Provenance:
    environment = {"shoal": "0.1.0", "torch": "2.13.0", "device": "cpu", "cpu_threads": 1}
    return Provenance({"model": "abc"}, environment, "2025-01-01T00:00:00+00:00")


def importance() -> Importance:
    layers = {"block_influence": tuple(0.1 + 0.01 * abs(layer - 4) for layer in range(NUM_LAYERS))}
    runs = {"angular": tuple(tuple(0.05 * n for _ in range(NUM_LAYERS - n + 1)) for n in range(1, NUM_LAYERS))}
    return Importance(provenance(), NUM_LAYERS, 20_000, layers, runs)


def plan(drop: tuple[int, ...] = DROP, changes: tuple[PlannedChange, ...] = ()) -> Plan:
    return Plan(provenance(), NUM_LAYERS, drop, "the run of 3 layers with the lowest angular distance", (), changes)


def training() -> Training:
    history = tuple(
        {"step": float(s), "loss": 3 / s, "forward_kl": 2 / s, "cross_entropy": 5 / s, "learning_rate": 1e-4 / s}
        for s in range(1, 21)
    )
    settings = {"trainer": {"learning_rate": 1e-4, "hub_token": "hf_" + "a" * 34}, "deepspeed": {"stage": 2}}
    data = {"sources": {"python_docs": {"documents": 80, "tokens": 1234, "split": 7}}}
    return Training(provenance(), 20, 4000, 8.0, history, settings, data, 10**9)


def choice(role: str, name: str, ability: str, protocol: str, **changes: Any) -> TaskScore:
    """A right-or-wrong task of 100 items; ``share`` = the teacher's share of right answers."""
    chance, share, n = changes.pop("chance", 0.25), changes.pop("share", 0.9), changes.pop("n", 100)
    reached = chance + (share - chance) * SKILL[role]
    luck = random.Random(name)
    right = [luck.random() < reached for _ in range(n)]
    items = tuple(
        ItemScore(f"{name}-{i}", float(ok), "the gold answer" if ok else f"{role} answered so", "the gold answer")
        for i, ok in enumerate(right)
    )
    score = sum(right) / n
    fields = {"version": "1", "num_fewshot": 0} | changes
    draft = TaskScore(name, ability, protocol, "acc", score, 0, 0, n, chance, True, items=items, **fields)
    return _with_interval(draft)


def nats(role: str, n: int = 60) -> TaskScore:
    noise = random.Random(1)
    items = tuple(ItemScore(f"w{i}", 4.0 - 2 * SKILL[role] + noise.random() * 0.1) for i in range(n))
    score = sum(item.score for item in items) / n
    draft = TaskScore("perplexity", "language", "rolling", "nats_per_token", score, 0, 0, n, 0.0, False, "1", 0, items)
    return _with_interval(draft)


def evaluation(role: str, tasks: tuple[TaskScore, ...] | None = None) -> Scores:
    own = (
        nats(role),
        choice(role, "retrieval_continuation", "retrieval", "continuation"),
        choice(role, "retrieval_generation", "retrieval", "generation", chance=0.0, share=0.8),
        choice(role, "reasoning_generation", "reasoning", "generation", chance=0.0, share=0.0),
    )
    layers = NUM_LAYERS if role == "teacher" else NUM_LAYERS - len(DROP)
    return Scores(provenance(), role, own if tasks is None else tasks, layers * 10**6, layers, layers * 4 * 10**6, 9.0)


def capitals(
    texts: Sequence[str], name: str = "capitals", *, lengths: Sequence[int] = (), cut: Sequence[bool] = ()
) -> TaskScore:
    """Written answers to questions that are all answered by Rome, with the rates by which texts fail."""
    n = len(texts)
    rates = text_rates(texts, hold_answers(texts, texts, ["Rome"]), lengths or [3] * n, cut or [False] * n)
    items = tuple(
        ItemScore(str(i), float(text == "Rome"), text, "Rome", rates=found)
        for i, (text, found) in enumerate(zip(texts, rates, strict=True))
    )
    score = sum(item.score for item in items) / n
    return with_rates(TaskScore(name, "knowledge", "generation", "match", score, 0, 1, n, 0.0, True, "1", 0, items))


def speed() -> Speed:
    """Measured at two batch sizes."""

    def score(role: str, factor: float) -> SpeedScore:
        layers = NUM_LAYERS if role == "teacher" else NUM_LAYERS - len(DROP)

        def batch(size: int) -> BatchSpeed:
            read, wrote = 1000 * factor * size, 20 * factor * size**0.5
            samples = {"prefill": (0.99 * read, read), "decode": (0.95 * wrote, 1.05 * wrote), "first_token": (0.1,)}
            return BatchSpeed(size, read, wrote, 0.128 / factor, layers * 4_200_000, samples)

        first = batch(1)
        return SpeedScore(
            first.prefill_tokens_per_s,
            first.decode_tokens_per_s,
            {kind: first.samples[kind] for kind in ("prefill", "decode")},
            (first, batch(4)),
            layers,
            layers * 10**6,
            layers * 4 * 10**6,
            layers * 1024,
        )

    roles = {role: score(role, factor) for role, factor in (("teacher", 1.0), ("pruned", 1.5), ("distilled", 1.5))}
    left_out = ("batch size 16 is skipped: teacher would need 9.0 GB on top of its weights, and 4.0 GB are free",)
    return Speed(provenance(), roles, 1, 128, 32, "float32", left_out)


def write_run(folder: Path, *, recipe: dict[str, Any] | None = None) -> Path:
    """A complete run directory at ``folder``."""
    importance().save(folder / "importance.json")
    plan().save(folder / "plan.json")
    training().save(folder / "distill.json")
    for role in SKILL:
        evaluation(role).save(folder / "eval" / f"{role}.json")
    speed().save(folder / "eval" / "speed.json")
    raw = {"model": "demo:smollm2-135m", "run_dir": "runs/test", "distill": {"num_tokens": 200_000}} | (recipe or {})
    story = {"recipe": as_dict(parse_recipe(raw)), "stages": {}}
    (folder / "run.json").write_text(json.dumps(story))
    return folder


def _with_interval(task: TaskScore) -> TaskScore:
    low, high = interval(task)
    return TaskScore(**{**task.__dict__, "ci_low": low, "ci_high": high})


QUICKSTART = (
    ("retrieval_loglikelihood", "retrieval", "loglikelihood", 0.25, 40, (11, 10, 12)),
    ("retrieval_continuation", "retrieval", "continuation", 0.25, 100, (98, 66, 98)),
    ("retrieval_generation", "retrieval", "generation", 0.1, 100, (64, 22, 98)),
    ("knowledge_loglikelihood", "knowledge", "loglikelihood", 0.25, 40, (9, 11, 10)),
    ("knowledge_continuation", "knowledge", "continuation", 0.25, 100, (93, 64, 85)),
    ("knowledge_generation", "knowledge", "generation", 0.0, 100, (38, 1, 47)),
    ("reasoning_1step_continuation", "reasoning", "continuation", 0.25, 100, (48, 35, 46)),
    ("reasoning_generation", "reasoning", "generation", 0.0, 16, (1, 0, 0)),
)
"""Task, ability, protocol, chance, items, and how many of them teacher, pruned and distilled have right."""
NATS = (
    ("reasoning_worked", "reasoning", "worked", 100, (1.205, 1.964, 0.246)),
    ("perplexity", "language", "rolling", 19, (2.557, 3.450, 2.851)),
)


def quickstart(role: str) -> Scores:
    """An evaluation with the numbers of README's table."""
    place = tuple(SKILL).index(role)
    tasks = [counted(role, *how, right[place]) for *how, right in QUICKSTART]  # pyright: ignore[reportCallIssue]
    tasks += [_spread(role, *how, mean[place]) for *how, mean in NATS]  # pyright: ignore[reportCallIssue]
    layers = 30 if role == "teacher" else 24
    parameters = 134_515_008 - (30 - layers) * 3_540_096
    return Scores(provenance(), role, tuple(tasks), parameters, layers, 2 * parameters, 100.0)


LOOK_UP, FACT = ("retrieval", "generation"), ("knowledge", "continuation")
FORMED = (
    ("retrieval_generation", "retrieval", "generation", 0.1, "in", "", (64, 22, 100, 98)),
    ("retrieval_reworded_generation", *LOOK_UP, 0.1, "reworded", "retrieval_generation", (60, 20, 66, 44)),
    ("knowledge_continuation", "knowledge", "continuation", 0.25, "in", "", (93, 64, 95, 85)),
    ("knowledge_reworded_continuation", *FACT, 0.25, "reworded", "knowledge_continuation", (91, 63, 90, 80)),
    ("needle_20sentences_generation", "retrieval", "generation", 0.25, "out", "", (90, 70, 90, 73)),
    ("arc_easy_continuation", "knowledge", "continuation", 0.25, "public", "", (58, 40, 57, 41)),
)
"""Task, ability, protocol, chance, column, reworded_of, and how many of 100 items each of FORMED_ROLES has right."""
FORMED_NATS = (
    ("reasoning_worked", "reasoning", "worked", "in", "", (1.21, 1.96, 0.22, 0.25)),
    ("reasoning_reworded_worked", "reasoning", "worked", "reworded", "reasoning_worked", (1.3, 2.0, 1.0, 1.5)),
    ("perplexity", "language", "rolling", "", "", (2.56, 3.45, 2.50, 2.85)),
)
FORMED_ROLES = ("teacher", "pruned", "control", "distilled")


def formed(role: str, columns: Collection[str] = ("in", "reworded", "out", "public", "")) -> Scores:
    """An evaluation in which the distilled model has learnt the form of look-ups, and a control as well."""
    place, tasks = FORMED_ROLES.index(role), []
    for name, ability, protocol, chance, column, reworded_of, right in FORMED:
        made = counted(role, name, ability, protocol, chance, 100, right[place])
        tasks.append(replace(made, column=column, reworded_of=reworded_of))
    for name, ability, protocol, column, reworded_of, mean in FORMED_NATS:
        made = _spread(role, name, ability, protocol, 100, mean[place])
        tasks.append(replace(made, column=column, reworded_of=reworded_of))
    content = {task.task: task.reworded_of or task.task for task in tasks}
    tasks = [replace(task, items=_of_content(content[task.task], task)) for task in tasks if task.column in columns]
    return replace(quickstart("teacher" if role in ("teacher", "control") else role), role=role, tasks=tuple(tasks))


def _of_content(name: str, task: TaskScore) -> tuple[ItemScore, ...]:
    return tuple(replace(item, id=f"{name}-{index}") for index, item in enumerate(task.items))


def write_formed(
    folder: Path,
    *,
    roles: Collection[str] = FORMED_ROLES,
    columns: Collection[str] = ("in", "reworded", "out", "public", ""),
) -> Path:
    """A run directory whose results stand in several columns."""
    write_quickstart(folder)
    for role in FORMED_ROLES:
        (folder / "eval" / f"{role}.json").unlink(missing_ok=True)
    for role in roles:
        formed(role, columns).save(folder / "eval" / f"{role}.json")
    return folder


def write_quickstart(folder: Path) -> Path:
    """A run directory that reads as the one `make quickstart` leaves."""
    write_run(folder, recipe={"model": "demo:smollm2-135m"})
    depth = {"block_influence": tuple(0.1 + 0.01 * abs(layer - 15) for layer in range(30))}
    Importance(provenance(), 30, 20_000, depth, {}).save(folder / "importance.json")
    Plan(provenance(), 30, (12, 13, 14, 21, 25, 26), "named in the recipe").save(folder / "plan.json")
    for role in SKILL:
        quickstart(role).save(folder / "eval" / f"{role}.json")
    sources = {name: {"documents": 80, "tokens": 1234, "split": 7} for name in ("python_docs", "ability_texts")}
    replace(training(), num_tokens=81_920, data={"sources": sources}).save(folder / "distill.json")
    return folder


def counted(role: str, name: str, ability: str, protocol: str, chance: float, n: int, right: int) -> TaskScore:
    """The first ``right`` items of an order of its own are right; of generated text some loop or are cut off."""
    order = random.Random(name).sample(range(n), n)
    looping = {"pruned": 0.6, "distilled": 0.25}.get(role, 0.1) if protocol == "generation" else None
    items = tuple(
        ItemScore(
            f"{name}-{i}",
            float(order[i] < right),
            "the gold answer" if order[i] < right else f"{role} answered so",
            "the gold answer",
            rates={} if looping is None else _rates(i < looping * n),
            question=f"What is number {i} of {n}?",
        )
        for i in range(n)
    )
    metric = "match" if protocol == "generation" else "acc"
    draft = TaskScore(name, ability, protocol, metric, right / n, 0, 0, n, chance, True, "1.0", 0, items)
    return with_rates(_with_interval(draft))


def _rates(looping: bool) -> dict[str, float]:
    return {"malformed": 0.0, "repetition": float(looping), "cut_off": float(looping), "tokens": 12.0}


def _spread(role: str, name: str, ability: str, protocol: str, n: int, mean: float) -> TaskScore:
    noise = [random.Random(f"{name} {i}").gauss(0, 0.25) + random.Random(f"{role} {i}").gauss(0, 0.1) for i in range(n)]
    middle = sum(noise) / n
    items = tuple(ItemScore(f"{name}-{i}", mean + one - middle) for i, one in enumerate(noise))
    return _with_interval(
        TaskScore(name, ability, protocol, "nats_per_token", mean, 0, 0, n, 0.0, False, "1.0", 0, items)
    )
