"""How numbers are written in a report: percent, points, nats, each with its interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from shoal.artifact import TaskScore
from shoal.plain_text import bytes_text as bytes_text

from .findings import Row, is_share, measured_in_nats
from .statistics import PairedDifference, Retention

DASH = "–"


def score_text(score: TaskScore) -> str:
    """`72.0 % [65.8, 78.2]`, or `2.60 [2.50, 2.70]` for scores that are no shares."""
    if is_share(score):
        return f"{100 * score.score:.1f} % [{100 * score.ci_low:.1f}, {100 * score.ci_high:.1f}]"
    text = f"{score.score:.3f} [{score.ci_low:.3f}, {score.ci_high:.3f}]"
    if measured_in_nats(score) and score.score < 50:
        text += f", perplexity {math.exp(score.score):,.1f}"
    return text


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


def task_name(row: Row) -> str:
    """Task and protocol, each said once."""
    task, protocol, _ = row.key
    return task if protocol in task else f"{task} ({protocol})"


def listed(words: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    words = list(words)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""


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
