"""How numbers are written in a report: percent, points, nats, each with its interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from shoal.artifacts.evaluation import Interval, TaskScore
from shoal.formatting import interval_text, listed
from shoal.stats.paired import PairedDifference, Retention
from shoal.task_words import COLUMNS, task_words

from ..harness.rates import CALIBRATION_ERROR, CALIBRATION_LUCK
from .findings import Row, is_share, measured_in_nats
from .page import DASH

LARGEST_NATS = 50
"""Nats above which a perplexity is too long a number to be read."""
LIKELY = "likely but not confirmed"
MAX_NAMES = 8
"""Tasks named in one sentence; all of them are in the tables."""


def score_text(score: TaskScore) -> str:
    """`72.0 % [65.8, 78.2]`, or `2.60 [2.50, 2.70]` for scores that are no shares."""
    values = (score.score, score.ci_low, score.ci_high)
    if is_share(score):
        return interval_text(values, ".1f", " %", scale=100)
    text = interval_text(values, ".3f")
    if measured_in_nats(score) and score.score < LARGEST_NATS:
        text += f", perplexity {math.exp(score.score):,.1f}"
    return text


def glance_text(score: TaskScore | None) -> str:
    """`64 % [54, 73]`, and text's nats as perplexity: few digits, for the first look."""
    if score is None:
        return DASH
    values = (score.score, score.ci_low, score.ci_high)
    if is_share(score):
        return interval_text(values, ".0f", " %", scale=100)
    return interval_text(map(math.exp, values), ",.1f") if _as_perplexity(score) else interval_text(values, ".2f")


def glance_unit(score: TaskScore) -> str:
    """What kind of number glance_text gives; empty for percent."""
    if is_share(score):
        return ""
    unit = "perplexity" if _as_perplexity(score) else score.metric.replace("_", " ")
    parts = (unit if unit != score.task else "", "" if score.higher_is_better else "lower is better")
    return ", ".join(filter(None, parts))


def change_text(row: Row, before: str, after: str) -> str:
    """`▼ −42 points [−53, −30]`, or what the corrected test does not confirm: `no clear change [−3, +24]`."""
    change = row.differences.get((before, after))
    if change is None:
        return DASH
    sign = {"better": "▲ ", "worse": "▼ "}.get(row.verdict(before, after) or "")
    told = difference_text(change, row.any_score, glance=True)
    p_value = f", corrected p {p_text(row.adjusted_p.get((before, after)))}" if change.leaves_out_zero else ""
    return f"{sign}{told}" if sign else f"{unclear_text(change)} {told[told.index('[') :]}{p_value}"


def unclear_text(change: PairedDifference) -> str:
    """`no clear change`, or that the corrected test does not confirm what the interval alone suggests."""
    return LIKELY if change.leaves_out_zero else "no clear change"


def difference_text(change: PairedDifference | Interval | None, score: TaskScore, *, glance: bool = False) -> str:
    """`+41.0 points [+33.9, +47.6]`, or the plain unit of the metric where it is no share; fewer digits at a glance."""
    if change is None:
        return DASH
    value = change.value if isinstance(change, Interval) else change.difference
    limits = (value, change.ci_low, change.ci_high)
    if is_share(score):
        few = isinstance(change, PairedDifference) and change.few_changed and not glance
        return points_text(limits, 0 if glance else 1) + ", few changed" * few
    return interval_text(limits, "+.2f" if glance else "+.3f", " nats" if glance and measured_in_nats(score) else "")


def points_text(limits: Iterable[float], digits: int = 1) -> str:
    """`+4.0 points [−1.0, +9.0]`: a difference of shares with the ends of its interval."""
    return interval_text(limits, f"+.{digits}f", " points", scale=100)


def unit_text(score: TaskScore) -> str:
    """What has to stand behind a task's words where its score is no share: `, nats per token (lower is better)`."""
    if is_share(score):
        return ""
    return f", {score.metric.replace('_', ' ')}{'' if score.higher_is_better else ' (lower is better)'}"


def identifier_text(score: TaskScore) -> str:
    """The task as the recipe names it."""
    return f"{score.task}, {score.protocol}, {score.metric}"


def _as_perplexity(score: TaskScore) -> bool:
    return score.protocol == "rolling" and measured_in_nats(score) and score.ci_high < LARGEST_NATS


def kept_text(kept: Retention | Interval | None, *, capped: bool = True) -> str:
    """A share kept with its interval; a dash if there is none. Above 100 % it is said in words; without ``capped`` it
    is a number, as a difference that stands beside it asks."""
    if kept is None or kept.value is None or kept.ci_low is None or kept.ci_high is None:
        return DASH
    if capped and kept.value > 1:
        return (
            "more than the teacher" if kept.ci_low > 1 else f"100 % [{100 * kept.ci_low:.0f}, more]".replace("-", "−")
        )
    return interval_text((kept.value, kept.ci_low, kept.ci_high), ".0f", " %", scale=100)


def calibration_text(score: TaskScore) -> str:
    """`12.3 % (luck alone: 8.1 %)`; a dash where nothing was chosen."""
    error, luck = (score.rates.get(name) for name in (CALIBRATION_ERROR, CALIBRATION_LUCK))
    return DASH if error is None or luck is None else f"{100 * error:.1f} % (luck alone: {100 * luck:.1f} %)"


def chance_text(score: TaskScore) -> str:
    """The chance level, or a dash where a metric has none."""
    if not score.higher_is_better:
        return DASH
    return f"{100 * score.chance:.1f} %" if is_share(score) else f"{score.chance:g}"


def limits_text(score: TaskScore) -> str:
    """`chance 25.0 %`, above which there is anything to be told."""
    return f"chance {chance_text(score)}" if score.higher_is_better else ""


def p_text(value: float | None) -> str:
    """A p value to two digits, or a bound where it is tiny."""
    if value is None:
        return DASH
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def score_words(score: TaskScore) -> tuple[str, ...]:
    """What a score is of, in words; see task_words."""
    return task_words(score.task, ability=score.ability, protocol=score.protocol, metric=score.metric)


def task_name(row: Row) -> str:
    """`retrieval, option text`."""
    return ", ".join(score_words(row.any_score))


def tasks_text(scores: Iterable[TaskScore]) -> str:
    """`retrieval (option text; generated) and perplexity (running text)`: for a sentence, every ability once."""
    asked: dict[str, list[str]] = {}
    for score in scores:
        first, *others = score_words(score)
        asked.setdefault(first, []).append(", ".join(others))
    told = {first: "; ".join(filter(None, ways)) for first, ways in asked.items()}
    return listed(f"{first} ({ways})" if ways else first for first, ways in told.items())


def column_words(column: str) -> str:
    """How tasks relate to training text: `reworded questions`."""
    return COLUMNS.get(column, "other tasks")


def by_column(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by column: first those outside the trained wording, last those without a known column."""
    rows = list(rows)
    columns = {column: [row for row in rows if row.column == column] for column in (*COLUMNS, "")}
    return {column: own for column, own in columns.items() if own}


def task_names(rows: Iterable[Row]) -> str:
    """The tasks of a table's rows for a sentence."""
    return tasks_text(row.any_score for row in rows)


def named_or_counted(rows: Sequence[Row]) -> str:
    """The tasks by name, or their number where they are too many for a sentence."""
    return task_names(rows) if len(rows) <= MAX_NAMES else f"{len(rows)} scores"
