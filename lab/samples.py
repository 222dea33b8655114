"""Texts that are drawn for every item of a generated task beside the greedy one: pass@k, and whether an answer that a
cut model lost is demoted (one of the drawn texts has it) or gone.

N items, n texts drawn for each, of which c are right.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from pydantic import Field

from shoal.artifacts.artifact import Artifact, Provenance
from shoal.errors import UserError
from shoal.eval.evaluate import scores_of
from shoal.eval.harness.engine import CausalLM
from shoal.eval.harness.samples import metric_of
from shoal.eval.tasks.load import tasks_of
from shoal.formatting import aligned, interval_text
from shoal.launch.verbs.evaluate import eval_inputs, roles
from shoal.launch.verbs.run import Run
from shoal.progress import doing
from shoal.recipe.section import Above0, Positive, Section
from shoal.runtime import seed_everything
from shoal.stats.intervals import wilson
from shoal.stats.paired import bootstrap_mean, is_binary

from .part import by_role, identity, made, told


@dataclass(frozen=True)
class Settings(Section):
    """How texts are drawn. The tasks and their items are those of the recipe's section eval."""

    n: Positive = 8
    """Texts per item."""
    temperature: Above0 = 0.8
    """Temperature of sampling, above 0; at 0 all texts of an item would be the greedy one."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Share of probability that the likeliest tokens hold of which one is drawn."""
    k: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 4, 8)
    """Numbers of texts of which pass@k asks for a right one; none above ``n``."""


@dataclass(frozen=True)
class DrawnItem:
    """One item of a generated task."""

    id: str
    greedy: bool
    """Whether the greedy text is right."""
    num_right: int
    """Right ones among the drawn texts."""


@dataclass(frozen=True)
class DrawnTask:
    """One task under one model."""

    role: str
    task: str
    chance: float
    items: tuple[DrawnItem, ...]


@dataclass(frozen=True)
class Samples(Artifact):
    """lab/samples.json: of every item, how many drawn texts are right."""

    FILE: ClassVar[str] = "samples.json"

    n: int
    k: tuple[int, ...]
    tasks: tuple[DrawnTask, ...]

    def in_words(self) -> str:
        """pass@k of every model and task, and what became of the answers that the teacher's greedy text has right."""
        names = ("greedy", *(f"pass@{k}" for k in self.k))
        passed = [["task", "model", "n", *names, "by guessing"]]
        lost = [["task", "model", "lost", "demoted", "gone", "by guessing"]]
        right = {
            own.task: {item.id for item in own.items if item.greedy} for own in self.tasks if own.role == "teacher"
        }
        for own in self.tasks:
            greedy = [float(item.greedy) for item in own.items]
            shares = [greedy, *([pass_at(self.n, item.num_right, k) for item in own.items] for k in self.k)]
            chance = 1 - (1 - own.chance) ** self.n
            passed.append([own.task, own.role, str(len(greedy)), *map(_share, shares), f"{100 * chance:.0f} %"])
            if own.role != "teacher" and own.task in right:
                fates = [item.num_right > 0 for item in own.items if item.id in right[own.task] and not item.greedy]
                told = [_count(fates.count(fate), len(fates)) for fate in (True, False)]
                lost.append([own.task, own.role, str(len(fates)), *told, f"{100 * chance:.0f} %"])
        explained = f"{self.n} texts were drawn for every item; by guessing, one of {self.n} would be right so often."
        return "\n".join([*aligned(passed), "", *(aligned(lost) if len(lost) > 1 else []), "", explained])


def pass_at(num_drawn: int, num_right: int, k: int) -> float:
    """The chance that at least one of ``k`` texts is right, taken from n that were drawn: 1 - C(n - c, k) / C(n, k).

    The unbiased estimate from n >= k texts (Chen et al. 2021, arXiv 2107.03374, equation 1). 1 - (1 - c / n)**k is too
    low, because it takes a text more than once.
    """
    return 1 - math.comb(num_drawn - num_right, k) / math.comb(num_drawn, k)


def work(run: Run, settings: Settings) -> str:
    """lab/samples.json of every model of the run that is there; its tables as text.

    Raises:
        UserError: k above n, or no task that is generated and right or wrong.
    """
    if (most := max(settings.k)) > settings.n:
        raise UserError(f"k: {most} texts cannot be taken out of n, {settings.n}; raise n, or lower k")
    models = {role: Provenance(eval_inputs(run, folder)).fingerprint for role, folder in roles(run).items()}

    def drawn(provenance: Provenance) -> Samples:
        tasks = tasks_of(run.recipe.eval, seed=run.recipe.seed)
        tasks = {name: task for name, task in tasks.items() if task.OUTPUT_TYPE == "generate_until"}
        found = by_role(run, "samples", lambda role, lm: list(_drawn(role, lm, tasks, run, settings)))
        if not any(found.values()):
            raise UserError("eval.tasks: none is generated and right or wrong, so nothing can be drawn; name one")
        return Samples(provenance, settings.n, tuple(sorted(set(settings.k))), tuple(itertools.chain(*found.values())))

    return told(run, made(run, Samples, identity(run, settings, **models), drawn))


def _drawn(role: str, lm: CausalLM, tasks: dict[str, Any], run: Run, settings: Settings) -> Iterator[DrawnTask]:
    seed, limits = run.recipe.seed, run.recipe.eval.limits
    limits = {name: limit for name, limit in limits.items() if name in tasks}
    scores = scores_of(lm, tasks, replace(run.recipe.eval, limits=limits), seed=seed)
    for score in filter(is_binary, scores):
        requests = tasks[score.task].instances
        with doing(f"samples: {score.task}"):
            seed_everything(seed)
            asked = [_sampled(request, settings) for request in requests]
            texts = [lm.generate_until(asked) for _ in range(settings.n)]
        counts = _num_right(tasks[score.task], texts)
        # items are in the order of the documents
        pairs = zip(score.items, (counts[document] for document in sorted(counts)), strict=True)
        items = tuple(DrawnItem(item.id, item.score == 1, right) for item, right in pairs)
        yield DrawnTask(role, score.task, score.chance, items)


@dataclass(frozen=True)
class _Request:
    """What the engine reads of an lm-eval instance."""

    args: tuple[str, dict[str, Any]]


def _sampled(request: Any, settings: Settings) -> _Request:
    prompt, wanted = request.args
    drawn = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    return _Request((prompt, {**{key: value for key, value in wanted.items() if key != "num_beams"}, **drawn}))


def _num_right(task: Any, texts: Sequence[Sequence[str]]) -> dict[int, int]:
    """By document, how many of its texts the task counts as right; each of ``texts`` in the order of its requests."""
    counts = {request.doc_id: 0 for request in task.instances}
    filter_name = next(iter(task.instances[0].filtered_resps))
    for drawn in texts:
        for request, text in zip(task.instances, drawn, strict=True):
            request.resps = [text]
        task.apply_filters()
        for request in task.instances:
            values = task.process_results(request.doc, [request.filtered_resps[filter_name]])
            counts[request.doc_id] += int(values[metric_of(task, list(values))] == 1)
    return counts


def _share(values: Sequence[float]) -> str:
    """A mean with its 95 % interval over the items: Wilson's where every item is 0 or 1, else bootstrap."""
    mean = math.fsum(values) / len(values)
    whole = all(value in (0.0, 1.0) for value in values)
    low, high = wilson(sum(values), len(values)) if whole else bootstrap_mean(values)
    return interval_text((mean, max(low, 0.0), min(high, 1.0)), ".1f", " %", scale=100)


def _count(count: int, total: int) -> str:
    share = interval_text((count / total, *wilson(count, total)), ".0f", " %", scale=100) if total else ""
    return f"{count}, {share}" if share else "0"
