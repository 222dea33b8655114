"""The report's first sentences: what was cut, lost and regained. Claims rest on corrected p-values only."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.artifact import SpeedScore
from shoal.edits import in_words

from .findings import Comparison, Row, Run
from .speed_ratio import speed_ratio
from .wording import count_text, layers_text, listed, signed, task_name

MAX_NAMES = 5
"""Tasks told by name in one sentence; all of them are in the tables."""


def headline(run: Run, comparison: Comparison) -> tuple[str, ...]:
    """A few plain sentences; better and worse are said only where the difference is significant."""
    sentences = [_cut(run)]
    roles = run.evaluations
    rows = [row for row in comparison.rows if row.has_signal]
    if {"teacher", "pruned"} <= roles.keys():
        sentences.append(_lost(rows))
    if {"pruned", "distilled"} <= roles.keys():
        sentences.append(_came_back(rows))
    if {"teacher", "distilled"} <= roles.keys():
        sentences.append(_still_missing(rows))
    if not roles:
        sentences.append("No ability has been evaluated yet, so nothing is said here about what was lost.")
    silent = [row for row in comparison.rows if not row.has_signal]
    if silent and len(roles) > 1:
        sentences.append(
            f"{_number(len(silent), 'task')} left out of these sentences because the intact model is not shown to be "
            "above chance there (see “No signal here”)."
        )
    return tuple(sentence for sentence in sentences if sentence)


def facts(run: Run) -> tuple[tuple[str, str], ...]:
    """Figures to take in at a glance: value and what it is."""
    found: list[tuple[str, str]] = []
    if run.plan and (run.plan.drop or not run.plan.edits):
        found.append((f"{len(run.plan.drop)} of {run.plan.num_layers}", "decoder layers cut"))
    if run.plan and run.plan.edits:
        found.append((str(len(run.plan.edits)), "edits of layers" if len(run.plan.edits) > 1 else "edit of layers"))
    small, teacher = _smallest(run), run.evaluations.get("teacher")
    if teacher and small:
        change = 100 * (run.evaluations[small].num_parameters / teacher.num_parameters - 1)
        found.append((f"{signed(change, 0)} %", "parameters"))
    if run.speed and "teacher" in run.speed.roles:
        role = next((role for role in ("distilled", "pruned") if role in run.speed.roles), None)
        if role:
            found.append(_faster(run.speed.roles["teacher"], run.speed.roles[role]))
    if run.training:
        found.append((count_text(run.training.num_tokens), "tokens of distillation"))
    return tuple(found)


def _faster(teacher: SpeedScore, small: SpeedScore) -> tuple[str, str]:
    """The ratio of the median speeds of writing, and how far it went apart from round to round of taking turns."""
    found = speed_ratio(small, teacher, "decode")
    told = f" (single rounds: {found.limits[0]:.2f} to {found.limits[1]:.2f} ×)" if found.limits else ""
    return f"{found.value:.2f} ×", f"decoding speed{told}"


def _cut(run: Run) -> str:
    if run.plan is None:
        return f"No layer of {run.model} has been cut yet."
    drop, edits = run.plan.drop, run.plan.edits
    what = f"{len(drop)} of the {run.plan.num_layers} decoder layers of {run.model}"
    which = f"({'layer' if len(drop) == 1 else 'layers'} {layers_text(drop)}, counted from 0)"
    sentence = f"{what} {'was' if len(drop) == 1 else 'were'} cut out {which}"
    small, teacher = _smallest(run), run.evaluations.get("teacher")
    if teacher and small:
        before, after = teacher.num_parameters, run.evaluations[small].num_parameters
        sentence += f", which takes the model from {count_text(before)} to {count_text(after)} parameters"
    changed = f"Edited{'' if drop else f' in {run.model}'}: {listed(map(in_words, edits))}." if edits else ""
    return " ".join([*([f"{sentence}."] if drop or not edits else []), *([changed] if changed else [])])


def _lost(rows: Sequence[Row]) -> str:
    pair = ("teacher", "pruned")
    worse, better, unclear = _sorted_by_verdict(rows, pair)
    total = len(worse) + len(better) + len(unclear)
    if not total:
        return ""
    all_of_them = len(worse) == total > MAX_NAMES
    how_many = f"all {total} scores" if len(worse) == total > 1 else f"{len(worse)} of {total} scores"
    parts = [f"Cutting made {how_many} worse" + (f": {_names(worse)}" if worse and not all_of_them else "")]
    if better:
        parts.append(f"better: {_names(better)}")
    if unclear:
        parts.append(f"no clear change: {_names(unclear)}")
    return "; ".join(parts) + "."


def _came_back(rows: Sequence[Row]) -> str:
    pair = ("pruned", "distilled")
    worse, better, unclear = _sorted_by_verdict(rows, pair)
    if not (worse or better or unclear):
        return ""
    total = len(worse) + len(better) + len(unclear)
    if not better:
        first = "Distilling made no score clearly better than that of the cut model"
    else:
        of_all = f"{len(better)} of {total} scores: " if len(better) > MAX_NAMES and len(better) < total else ""
        first = f"Distilling made the cut model better on {of_all}{_all_or_names(better, rows)}"
    parts = [first]
    if worse:
        parts.append(f"worse on {_names(worse)}")
    if unclear:
        parts.append(f"no clear change on {_names(unclear)}")
    return "; ".join(parts) + "."


def _still_missing(rows: Sequence[Row]) -> str:
    worse, better, unclear = _sorted_by_verdict(rows, ("teacher", "distilled"))
    if not (worse or better or unclear):
        return ""
    parts = []
    if worse:
        parts.append(f"the distilled model is still worse than the teacher on {_all_or_names(worse, rows)}")
    if unclear:
        parts.append(f"it cannot be told from the teacher on {_all_or_names(unclear, rows)}")
    if better:
        parts.append(f"it is better than the teacher on {_names(better)}")
    text = "; ".join(parts) + "."
    return (text[0].upper() + text[1:]).replace("It ", "The distilled model ", 1)


def _sorted_by_verdict(rows: Sequence[Row], pair: tuple[str, str]) -> tuple[list[Row], list[Row], list[Row]]:
    def those(verdict: str) -> list[Row]:
        return [row for row in rows if row.verdict(*pair) == verdict]

    return those("worse"), those("better"), those("unclear")


def _names(rows: Sequence[Row]) -> str:
    names = [task_name(row) for row in rows]
    if len(names) > MAX_NAMES:
        return f"{', '.join(names[:MAX_NAMES])} and {len(names) - MAX_NAMES} more"
    return listed(names)


def _all_or_names(some: Sequence[Row], rows: Sequence[Row]) -> str:
    return f"all {len(rows)} of them" if len(some) == len(rows) > 2 else _names(some)


def _smallest(run: Run) -> str | None:
    return next((role for role in ("distilled", "pruned") if role in run.evaluations), None)


def _number(count: int, noun: str) -> str:
    return f"One {noun} is" if count == 1 else f"{count} {noun}s are"
