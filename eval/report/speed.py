"""The report's section on speed and size: what was measured, and beside it what is to be expected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from shoal.artifacts.evaluation import ROLES, BatchSpeed, Speed, SpeedScore
from shoal.formatting import bytes_text, count_text, duration_text

from .document import Block, Section, Table
from .findings import Run
from .wording import DASH

SIZES = ("Model", "Layers", "Parameters", "Of the teacher", "Weights on disk", "Cache per token", "Evaluated in")
AGAINST = "Against the teacher"
SPEEDS = ("Model", "At once", "Reading", AGAINST, "First token", "Writing", AGAINST, "Peak memory")
Kind = Literal["prefill", "decode"]
Words = Callable[[float], str]


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


def speed_section(run: Run) -> Section:
    """Parameters, bytes, cache, memory and speeds of every role."""
    blocks: list[Block] = []
    scores = run.speed.roles if run.speed else {}
    if rows := [_size_row(run, role, scores.get(role)) for role in ROLES if role in run.evaluations or role in scores]:
        blocks.append(Table("Size", SIZES, tuple(rows)))
    if run.speed is None:
        blocks.append("Speed was not measured in this run (`eval.speed` in the recipe).")
        return Section("Speed and size", tuple(blocks))
    blocks += [_speed_table(run.speed), *_explanations(run.speed)]
    if run.speed.left_out:
        blocks.append(tuple(f"{reason[0].upper()}{reason[1:]}." for reason in run.speed.left_out))
    return Section("Speed and size", tuple(blocks))


def _size_row(run: Run, role: str, score: SpeedScore | None) -> tuple[str, ...]:
    evaluation, teacher = run.evaluations.get(role), run.evaluations.get("teacher")

    def known(field: str, source: Any) -> float | None:
        return next((value for holder in (source, score) if (value := getattr(holder, field, None)) is not None), None)

    parameters, stored = known("num_parameters", evaluation), known("num_bytes", evaluation)
    timed = run.speed.roles.get("teacher") if run.speed else None
    whole = teacher.num_parameters if teacher else timed.num_parameters if timed else None
    cached = score.kv_bytes_per_token if score else None
    return (
        role,
        str(known("num_layers", evaluation) or DASH),
        _told(parameters, count_text),
        DASH if parameters is None or not whole else f"{100 * parameters / whole:.1f} %",
        _told(stored, bytes_text),
        _told(cached, bytes_text),
        duration_text(evaluation.seconds) if evaluation else DASH,
    )


def _speed_table(speed: Speed) -> Table:
    rows = []
    kinds: tuple[Kind, ...] = ("prefill", "decode")
    for role, score in speed.roles.items():
        for batch in score.batches:
            teacher = _teacher_at(speed, batch.batch_size)
            cells = [role, f"{batch.batch_size:,}"]
            for kind in kinds:
                cells.append(_with_range(getattr(batch, f"{kind}_tokens_per_s"), batch.samples.get(kind, ())))
                cells.append(
                    DASH if teacher is None or role == "teacher" else speed_ratio(batch, teacher, kind).in_words()
                )
            cells.insert(4, _seconds_text(batch.first_token_s))
            cells.append(_told(batch.peak_memory_bytes, bytes_text))
            rows.append(tuple(cells))
    caption = (
        f"Speed with prompts of {speed.prompt_tokens:,} tokens and {speed.new_tokens:,} new ones, {speed.dtype}; "
        "tokens per second over all sequences, slowest and fastest repeat in brackets; against the teacher the "
        "smallest and largest ratio of one round, in which every model takes a turn"
    )
    return Table(caption, SPEEDS, tuple(rows))


def _explanations(speed: Speed) -> list[Block]:
    machine = speed.provenance.environment
    where = ", ".join(f"{key.replace('_', ' ')} {machine[key]}" for key in ("device", "cpu_threads") if key in machine)
    blocks: list[Block] = [
        (
            "The models were timed in turns in one process, so that a busy moment of the machine hits all of them. "
            f"Machine: {where or 'not recorded'}."
        )
    ]
    if any(batch.peak_memory_bytes is not None for score in speed.roles.values() for batch in score.batches):
        blocks.append(
            "Peak memory is what one model's weights, cache and intermediate tensors take at the fullest moment, "
            "as torch's allocator counts it: without Python, libraries and what they set aside for themselves."
        )
    return blocks


def _teacher_at(speed: Speed, batch_size: int) -> BatchSpeed | None:
    teacher = speed.roles.get("teacher")
    batches = teacher.batches if teacher else ()
    return next((batch for batch in batches if batch.batch_size == batch_size), None)


def _told(value: float | None, words: Words) -> str:
    return DASH if value is None else words(value)


def _with_range(value: float, samples: Sequence[float]) -> str:
    return f"{value:,.1f}" + (f" [{min(samples):,.1f}, {max(samples):,.1f}]" if samples else "")


def _seconds_text(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
