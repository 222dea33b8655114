"""Run directories with scores, to be set side by side."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.evaluation import Interval, ItemScore, Scores, Speed, SpeedScore, TaskScore
from shoal.artifacts.plan import Plan
from shoal.artifacts.training import Training
from shoal.eval.compare.compare import Cell
from shoal.eval.compare.figure import ParetoPoint
from shoal.stats.paired import interval

SHARES = {"teacher": 0.9, "pruned": 0.4, "control": 0.95, "distilled": 0.7}


INPUTS: dict[str, Any] = {
    "data": "text-1",
    "seed": 0,
    "dtype": "bfloat16",
    "attention": "sdpa",
    "tasks": "files-1",
    "eval.limit": 100,
    "eval.batch_size": 16,
    "eval.perplexity_data": [{"path": "python_docs_heldout", "name": None}],
    "eval.perplexity_tokens": 4000,
}


ENVIRONMENT: dict[str, Any] = {"shoal": "0.1.0", "lm_eval": "0.4.13", "torch": "2.13.0", "device": "cpu"}


Change = Callable[[TaskScore], TaskScore]


def scored(task: TaskScore) -> TaskScore:
    """The same task with the mean and the interval of its items."""
    weights = [item.weight for item in task.items]
    mean = sum(item.score * item.weight for item in task.items) / sum(weights)
    draft = replace(task, score=mean, n=len(task.items))
    low, high = interval(draft)
    return replace(draft, ci_low=low, ci_high=high)


def choice(
    name: str, share: float, *, ability: str = "retrieval", protocol: str = "continuation", n: int = 100
) -> TaskScore:
    """About ``share`` of the items right; what is right at a lower share is right at a higher one too."""
    luck = random.Random(name)
    chance = 0.0 if protocol == "generation" else 0.25
    items = tuple(ItemScore(f"{name}-{i}", float(luck.random() < share), "", "gold") for i in range(n))
    return scored(TaskScore(name, ability, protocol, "acc", 0, 0, 0, n, chance, True, "1.0", 0, items))


def nats(level: float, n: int = 12, *, ids: str = "window") -> TaskScore:
    luck = random.Random(5)
    items = tuple(ItemScore(f"{ids}-{i}", level + luck.random(), weight=100.0 + i) for i in range(n))
    version = "1.0, windows of 512 tokens"
    return scored(
        TaskScore("perplexity", "language", "rolling", "nats_per_token", 0, 0, 0, n, 0, False, version, 0, items)
    )


def tasks(share: float) -> tuple[TaskScore, ...]:
    return (
        choice("retrieval_continuation", share),
        choice("retrieval_generation", share - 0.1, protocol="generation"),
        choice("knowledge_continuation", share, ability="knowledge"),
        nats(4 - 2 * share),
    )


def write_run(
    folder: Path,
    *,
    distilled: float = SHARES["distilled"],
    layers: int = 5,
    inputs: dict[str, Any] | None = None,
    environment: dict[str, Any] | None = None,
    teacher: str = "teacher-1",
    pruned: str | None = None,
    change: Change = lambda task: task,
    roles: tuple[str, ...] = ("teacher", "pruned", "distilled"),
    scores: Callable[[float], tuple[TaskScore, ...]] = tasks,
) -> Path:
    """A run directory whose teacher has 8 layers; ``change`` is made to every task's score."""
    contents = {"teacher": teacher, "pruned": pruned or f"pruned-{layers}"}
    contents |= {role: f"{role}-{folder.name}" for role in ("control", "distilled")}
    versions, drop = ENVIRONMENT | (environment or {}), tuple(range(1, 9 - layers))
    for role in roles:
        share = distilled if role == "distilled" else SHARES[role]
        made = Provenance(INPUTS | {"model": contents[role]} | (inputs or {}), versions)
        count = 8 if role in ("teacher", "control") else layers
        found = tuple(map(change, scores(share)))
        Scores(made, role, found, count * 10**6, count, count * 2 * 10**6, 9.0).save(folder / f"eval/{role}.json")
    of_teacher = {"model": teacher}
    Plan(Provenance(of_teacher, versions), 8, drop, "as the recipe says").save(folder / "plan.json")
    if "distilled" in roles:
        trained = Provenance(of_teacher | {"student": contents["pruned"]}, versions)
        Training(trained, 10, 82_000, 1800.0, (), {}, {}, 10**9).save(folder / "distill.json")
    return folder


def write_speed(folder: Path, factor: float, *, batch_size: int = 1) -> None:
    lucks = {"teacher": (1.0, 0.8, 1.0), "pruned": (1.0, 1.0, 0.9), "distilled": (1.0, 1.0, 0.9)}
    roles = {
        role: SpeedScore(1000.0, 20.0 * share, {"decode": tuple(20.0 * share * luck for luck in noise)})
        for role, share in {"teacher": 1.0, "pruned": factor, "distilled": factor}.items()
        for noise in [lucks[role]]
    }
    Speed(Provenance({"attention": "sdpa"}, ENVIRONMENT), roles, batch_size, 128, 32, "bfloat16").save(
        folder / "eval/speed.json"
    )


def cell_of(comparison: Any, letter: str, role: str, task: str) -> Cell:
    (model,) = [one for one in comparison.models if (one.contender.letter, one.role) == (letter, role)]
    return next(cell for cell in model.cells if cell.score.task == task)


def point(label: str, cost: float, kept: float, role: str = "distilled") -> ParetoPoint:
    return ParetoPoint(label, role, cost, Interval(kept, kept - 0.1, kept + 0.1))
