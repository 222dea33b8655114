"""How numbers are written in a report: percent, points, nats, each with its interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from shoal.artifacts.artifact import TaskScore
from shoal.formatting import bytes_text as bytes_text
from shoal.stats.paired import PairedDifference, Retention
from shoal.task_words import PROTOCOLS, task_words

from .findings import Row, is_share, measured_in_nats

DASH = "–"
LARGEST_NATS = 50
"""Above it a perplexity is too long a number to be read."""
MAX_NAMES = 8
"""Tasks told by name in one sentence; all of them are in the tables."""


def score_text(score: TaskScore) -> str:
    """`72.0 % [65.8, 78.2]`, or `2.60 [2.50, 2.70]` for scores that are no shares."""
    if is_share(score):
        return f"{100 * score.score:.1f} % [{100 * score.ci_low:.1f}, {100 * score.ci_high:.1f}]"
    text = f"{score.score:.3f} [{score.ci_low:.3f}, {score.ci_high:.3f}]"
    if measured_in_nats(score) and score.score < LARGEST_NATS:
        text += f", perplexity {math.exp(score.score):,.1f}"
    return text


def glance_text(score: TaskScore | None) -> str:
    """`64 % [54, 73]`, and text's nats as perplexity: few digits, for the first look."""
    if score is None:
        return DASH
    values = (score.score, score.ci_low, score.ci_high)
    if is_share(score):
        value, low, high = (f"{100 * one:.0f}" for one in values)
        return f"{value} % [{low}, {high}]"
    if _as_perplexity(score):
        value, low, high = (f"{math.exp(one):,.1f}" for one in values)
    else:
        value, low, high = (f"{one:.2f}" for one in values)
    return f"{value} [{low}, {high}]"


def glance_unit(score: TaskScore) -> str:
    """What kind of number glance_text gives; empty for percent."""
    if is_share(score):
        return ""
    unit = "perplexity" if _as_perplexity(score) else score.metric.replace("_", " ")
    parts = (unit if unit != score.task else "", "" if score.higher_is_better else "lower is better")
    return ", ".join(filter(None, parts))


def change_text(row: Row, before: str, after: str) -> str:
    """`▼ −42 points [−53, −30]`, or `no clear change [−3, +24]`: what the corrected test allows to say."""
    found = row.differences.get((before, after))
    if found is None:
        return DASH
    scale, digits, unit = (100, 0, " points") if is_share(row.any_score) else (1, 2, "")
    unit = " nats" if measured_in_nats(row.any_score) else unit
    value, low, high = (signed(scale * one, digits) for one in (found.difference, found.ci_low, found.ci_high))
    sign = {"better": "▲ ", "worse": "▼ "}.get(row.verdict(before, after) or "")
    return f"{sign}{value}{unit} [{low}, {high}]" if sign else f"no clear change [{low}, {high}]"


def unit_text(score: TaskScore) -> str:
    """What has to stand behind a task's words where its score is no share: `, nats per token (lower is better)`."""
    if is_share(score):
        return ""
    return f", {score.metric.replace('_', ' ')}{'' if score.higher_is_better else ' (lower is better)'}"


def protocol_text(protocol: str) -> str:
    """How a protocol asks, in words."""
    return PROTOCOLS.get(protocol, protocol)


def identifier_text(score: TaskScore) -> str:
    """The task as the recipe names it."""
    return f"{score.task}, {score.protocol}, {score.metric}"


def _as_perplexity(score: TaskScore) -> bool:
    return score.protocol == "rolling" and measured_in_nats(score) and score.ci_high < LARGEST_NATS


def difference_text(found: PairedDifference | None, score: TaskScore) -> str:
    """`+41.0 points [+33.9, +47.6]`; the plain unit of the metric where it is no share."""
    if found is None:
        return DASH
    if is_share(score):
        low, high = signed(100 * found.ci_low, 1), signed(100 * found.ci_high, 1)
        return f"{signed(100 * found.difference, 1)} points [{low}, {high}]"
    return f"{signed(found.difference, 3)} [{signed(found.ci_low, 3)}, {signed(found.ci_high, 3)}]"


def retention_text(found: Retention | None) -> str:
    """Retention with its interval, or why there is none."""
    if found is None or found.value is None or found.ci_low is None or found.ci_high is None:
        return DASH
    return f"{100 * found.value:.0f} % [{100 * found.ci_low:.0f}, {100 * found.ci_high:.0f}]".replace("-", "−")


def chance_text(score: TaskScore) -> str:
    """The chance level, or a dash where a metric has none."""
    if not score.higher_is_better:
        return DASH
    return f"{100 * score.chance:.1f} %" if is_share(score) else f"{score.chance:g}"


def p_text(value: float | None) -> str:
    """A p value to two digits, or a bound where it is tiny."""
    if value is None:
        return DASH
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def signed(value: float, digits: int) -> str:
    """With a real minus sign, and without a sign where the rounded value is zero."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


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


def task_names(rows: Iterable[Row]) -> str:
    """The tasks of a table's rows for a sentence."""
    return tasks_text(row.any_score for row in rows)


def named_or_counted(rows: Sequence[Row]) -> str:
    """The tasks by name, or how many scores they are where a sentence has no room for so many."""
    return task_names(rows) if len(rows) <= MAX_NAMES else f"{len(rows)} scores"


def listed(words: Iterable[str], last: str = "and") -> str:
    """`a`, `a and b`, `a, b and c`."""
    words = list(words)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}" if words else ""


def layers_text(layers: Sequence[int]) -> str:
    """Indices with runs of three or more joined: `3, 13 to 15`."""
    parts: list[str] = []
    start = 0
    for end in range(1, len(layers) + 1):
        if end < len(layers) and layers[end] == layers[end - 1] + 1:
            continue
        run = layers[start:end]
        parts += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else [str(layer) for layer in run]
        start = end
    return ", ".join(parts)


def count_text(count: float) -> str:
    """`134.5 million`; small counts in full."""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"{count / size:.1f} {word}"
    return f"{count:,.0f}"


def duration_text(seconds: float) -> str:
    """Seconds as minutes and hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
