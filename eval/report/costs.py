"""Tables of size, speed and costs, of the training text and of the layers' importance."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

from shoal.artifacts.artifact import Json
from shoal.artifacts.evaluation import ROLES, BatchSpeed, Speed, SpeedScore
from shoal.artifacts.importance import Importance
from shoal.artifacts.training import Training
from shoal.formatting import bytes_text, count_text, duration_text

from .page import DASH, Table
from .run import Run

SIZES = ("Model", "Layers", "Parameters", "Of the teacher", "Weights on disk", "Cache per token", "Evaluation time")
AGAINST = "Against the teacher"
SPEEDS = ("Model", "Batch", "Prefill", AGAINST, "First token", "Decoding", AGAINST, "Peak memory")
Kind = Literal["prefill", "decode"]


@dataclass(frozen=True)
class SpeedRatio:
    """Speed over the teacher's; above 1 = faster."""

    value: float
    """Ratio of the two medians."""
    limits: tuple[float, float] | None
    """Smallest and largest ratio of one round, in which both took a turn; None where no rounds were kept."""

    def in_words(self) -> str:
        """`1.24 × [1.20, 1.31]`."""
        return f"{self.value:.2f} ×" + (f" [{self.limits[0]:.2f}, {self.limits[1]:.2f}]" if self.limits else "")


def speed_ratio(own: BatchSpeed | SpeedScore, teacher: BatchSpeed | SpeedScore, kind: Kind) -> SpeedRatio:
    """Round by round: what disturbs the machine for a while slows both, and little of it is left in their ratio."""
    field = f"{kind}_tokens_per_s"
    rounds = own.samples.get(kind, ()), teacher.samples.get(kind, ())
    ratios = [after / before for after, before in zip(*rounds, strict=True)] if len({*map(len, rounds)}) == 1 else []
    limits = (min(ratios), max(ratios)) if ratios else None
    return SpeedRatio(getattr(own, field) / getattr(teacher, field), limits)


def size_table(run: Run) -> Table:
    """Parameters, bytes and cache of every role."""
    scores = run.speed.roles if run.speed else {}
    rows = [_size_row(run, role, scores.get(role)) for role in ROLES if role in run.evaluations or role in scores]
    return Table("Size", SIZES, tuple(rows))


def _size_row(run: Run, role: str, score: SpeedScore | None) -> tuple[str, ...]:
    evaluation = run.evaluations.get(role)
    teacher = run.evaluations.get("teacher") or (run.speed.roles.get("teacher") if run.speed else None)

    def known(field: str) -> float | None:
        values = (getattr(holder, field, None) for holder in (evaluation, score))
        return next((value for value in values if value is not None), None)

    parameters = known("num_parameters")
    whole = teacher.num_parameters if teacher else None
    return (
        role,
        str(known("num_layers") or DASH),
        _told(parameters, count_text),
        DASH if parameters is None or not whole else f"{100 * parameters / whole:.1f} %",
        _told(known("num_bytes"), bytes_text),
        _told(score.kv_bytes_per_token if score else None, bytes_text),
        duration_text(evaluation.seconds) if evaluation else DASH,
    )


def speed_table(speed: Speed) -> Table:
    """Speeds and memory of every role at every batch size."""
    rows = []
    kinds: tuple[Kind, ...] = ("prefill", "decode")
    teachers = {batch.batch_size: batch for batch in speed.roles["teacher"].batches} if "teacher" in speed.roles else {}
    for role, score in speed.roles.items():
        for batch in score.batches:
            teacher, cells = teachers.get(batch.batch_size), [role, f"{batch.batch_size:,}"]
            for kind in kinds:
                speeds = batch.samples.get(kind, ())
                ends = f" [{min(speeds):,.1f}, {max(speeds):,.1f}]" if speeds else ""
                cells.append(f"{getattr(batch, f'{kind}_tokens_per_s'):,.1f}{ends}")
                cells.append(speed_ratio(batch, teacher, kind).in_words() if teacher and role != "teacher" else DASH)
            first = batch.first_token_s
            cells.insert(4, f"{1000 * first:.3g} ms" if first < 1 else f"{first:.3g} s")
            cells.append(_told(batch.peak_memory_bytes, bytes_text))
            rows.append(tuple(cells))
    caption = (
        f"Speed in tokens per second over the batch ({speed.prompt_tokens:,} prompt tokens, {speed.new_tokens:,} new "
        f"tokens, {speed.dtype}), with the slowest and fastest repeat; ratios to the teacher, with the smallest and "
        "largest ratio of one round"
    )
    return Table(caption, SPEEDS, tuple(rows))


def _told(value: float | None, words: Callable[[float], str]) -> str:
    return DASH if value is None else words(value)


def costs_table(run: Run) -> Table:
    """Time, tokens and memory of every stage that recorded them."""
    rows = []
    if training := run.training:
        cells = (duration_text(training.seconds), f"{training.num_tokens:,}", bytes_text(training.peak_memory_bytes))
        rows.append(("Distillation", *cells))
    for role, scored in run.evaluations.items():
        kept = f"; {scored.num_kept:,} of {scored.num_requests:,} answers reused" if scored.num_kept else ""
        rows.append((f"Evaluation, {role}", duration_text(scored.seconds) + kept, DASH, DASH))
    caption = f"Time, tokens and memory by stage; {DASH} = not recorded"
    return Table(caption, ("Stage", "Time", "Tokens", "Peak memory"), tuple(rows))


def sources_table(training: Training) -> Table:
    """Counts of the training text by source."""
    sources: Any = training.data.get("sources") or {}
    fields = list(dict.fromkeys(field for counts in sources.values() for field in counts))
    rows = tuple((name, *(_count(counts.get(field)) for field in fields)) for name, counts in sources.items())
    return Table("Training text by source", ("Source", *(field.replace("_", " ") for field in fields)), rows)


def importance_table(importance: Importance, drop: Collection[int]) -> Table:
    """The importance of every layer by every metric, and whether it was dropped."""
    metrics = importance.layers
    rows = tuple(
        (str(layer), *(f"{scores[layer]:.4f}" for scores in metrics.values()), "dropped" if layer in drop else "kept")
        for layer in range(importance.num_layers)
    )
    caption = f"Importance of every layer over {importance.num_tokens:,} tokens"
    columns = ("Layer", *(metric.replace("_", " ") for metric in metrics), "Plan")
    return Table(caption, columns, rows, frozenset({0, len(metrics) + 1}), folded=True)


def _count(value: Json) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return DASH if value is None else str(value)
