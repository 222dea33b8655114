"""The report's first sentences: what was cut, lost and regained, and what follows.

Claims rest on intervals of means and on corrected p-values only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.artifacts.evaluation import CONTROL, ROLES, Interval
from shoal.figures.style import heading
from shoal.formatting import count_text, layers_text, listed, signed
from shoal.stats.means import mean_change, mean_share

from ..tasks.names import described_tasks, task_folders
from .costs import speed_ratio
from .findings import Comparison, Row, is_share
from .page import headings
from .run import Run
from .wording import (
    MAX_NAMES,
    by_column,
    change_text,
    column_words,
    glance_text,
    glance_unit,
    identifier_text,
    named_or_counted,
    points_text,
    retention_text,
    task_name,
)

CHANGES = {
    ("teacher", "pruned"): "Lost by the cut",
    ("pruned", "distilled"): "Brought back",
    ("teacher", "distilled"): "Against the teacher",
    ("control", "distilled"): "Still lost",
}
"""(before, after) -> name of the change between them. Where there is a control, what is missing is what it has."""
OUTSIDE = ("reworded", "out", "public")
"""Columns outside the form of the training text."""
KEPT = 0.9
"""Share of what the full model has above chance that a model worth shipping keeps."""
PROTOCOLS_DIFFER = 0.1
"""Difference in retention from which two ways of asking are both shown at the top."""


def headline(run: Run, comparison: Comparison) -> tuple[str, ...]:
    """At most five sentences: what was cut, what that lost, what training brought back outside the trained form, what
    is still lost beside the control, and what follows. Tables tell of single tasks."""
    rows = [row for row in comparison.rows if row.has_signal and len(row.scores) > 1]
    outside = [row for row in rows if row.column in OUTSIDE] or [row for row in rows if not row.column]
    if "distilled" not in run.evaluations:  # no text has trained a form
        outside = rows
    if not run.evaluations:
        return _cut(run), "No ability has been evaluated yet, so nothing is said here about what was lost."
    shares = Shares.of(outside)
    told = (_cut(run), _lost(shares), _came_back(shares), _still_lost(shares), decision(run, comparison.rows, shares))
    return tuple(sentence for sentence in told if sentence)


@dataclass(frozen=True)
class Shares:
    """What models keep of the teacher's score above chance, over the tasks outside the trained form that have a chance
    level and on which the teacher is clear of it; by role, and the changes between roles."""

    rows: tuple[Row, ...]
    kept: dict[str, Interval]
    changes: dict[tuple[str, str], Interval]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Shares:
        """Those of ``rows``, each task once; tasks that some role lacks are left out, but for the control alone."""
        known = {role for row in rows for role in row.scores} - {CONTROL}
        has_all = (row for row in rows if row.retained and all(own.value is not None for own in row.retained.values()))
        tasks = tuple({row.any_score.task: row for row in has_all if known <= row.scores.keys()}.values())

        def common(*roles: str) -> list[Any]:
            own = {row.any_score.task: row.scores for row in tasks if {*roles} <= row.scores.keys()}
            by_role = [{task: scores[role] for task, scores in own.items()} for role in ("teacher", *roles)]
            return [*by_role, {task: 1 / len(own) for task in own}]

        own = {role: mean_share(*common(role)) for role in ROLES if role != "teacher"}
        pairs = ("pruned", "distilled"), ("distilled", CONTROL)
        changes = {pair: mean_change(*common(*pair)) for pair in pairs}
        return cls(
            tasks,
            {role: share for role, share in own.items() if share is not None},
            {pair: change for pair, change in changes.items() if change is not None},
        )


def _lost(shares: Shares) -> str:
    if (kept := shares.kept.get("pruned")) is None:
        return ""
    least = min(shares.rows, key=lambda row: row.retained["pruned"].value or 0.0)
    told = f", and least on {task_name(least)} ({retention_text(least.retained['pruned'])})"
    return (
        f"Without training the cut model keeps {retention_text(kept)} of what the teacher has above chance on "
        f"{_tasks(shares)}{told if len(shares.rows) > 1 else ''}."
    )


def _came_back(shares: Shares) -> str:
    if (kept := shares.kept.get("distilled")) is None:
        return ""
    change = shares.changes.get(("pruned", "distilled"))
    gain = f": {points_text((change.value, change.ci_low, change.ci_high), 0)}" if change else ""
    if change is not None and change.ci_low <= 0:
        return f"Training brings nothing back that is clear of chance{gain}."
    told = "After training it has more than the teacher" if kept.value > 1 else None
    return f"{told or f'Training brings that to {retention_text(kept)}'}{gain}."


def _still_lost(shares: Shares) -> str:
    if "distilled" not in shares.kept:
        return ""
    if (change := shares.changes.get(("distilled", "control"))) is None:
        return (
            "No control was trained (eval.control), so how much of that the training text would teach any model is not "
            "known."
        )
    told = points_text((change.value, change.ci_low, change.ci_high), 0)
    if change.ci_low > 0:
        return f"The control, the uncut model after the same training, has {told} more: that much is still lost."
    return f"Beside the control, the uncut model after the same training ({told}), nothing is clearly still lost."


def decision(run: Run, rows: Sequence[Row], shares: Shares) -> str:
    """What follows, by rules. Tasks outside the trained form decide, or all where nothing was trained.

    Ship: no task is clearly worse than the teacher's, the control has not clearly 1 - KEPT more, and the lower end of
    the mean share kept is KEPT or more. Not enough items: only that interval holds KEPT. Else train longer where
    training has clearly brought something back, and cut fewer layers where it has not.
    """
    role = _smallest(run.evaluations)
    if role is None or "teacher" not in run.evaluations:
        return ""
    if not shares.rows or (kept := shares.kept.get(role)) is None:
        return (
            _nothing_outside(rows)
            or "Not enough to say: on no task that has a chance level is the teacher clear of it."
        )
    told = {row.key for row in shares.rows}
    watched = [row for row in rows if row.key in told or (row.column in OUTSIDE and row.has_signal)]
    worse = [row for row in watched if row.verdict("teacher", role) == "worse"]
    lost = shares.changes.get(("distilled", "control"))
    if worse:
        why = f"clearly worse than the teacher on {named_or_counted(worse)}"
    elif lost and lost.ci_low > 1 - KEPT:
        why = "the control has clearly more"
    elif kept.ci_high < KEPT:
        why = f"less than {100 * KEPT:.0f} % is kept"
    elif kept.ci_low < KEPT:
        both = f"what is kept may be more or less than {100 * KEPT:.0f} %"
        return f"Not enough items to say: {both}; score more of them (eval.limit) before you ship."
    else:
        return f"Ship: at least {100 * KEPT:.0f} % is kept, and no task outside the trained form is clearly worse."
    if role == "pruned":
        return f"Train it: {why}."
    gain = shares.changes.get(("pruned", "distilled"))
    if gain and gain.ci_low > 0:
        return f"Train longer, or cut fewer layers: {why}; training has brought something back so far."
    return f"Cut fewer layers: {why}; training has brought nothing back that is clear of chance."


def _tasks(shares: Shares) -> str:
    count = len(shares.rows)
    where = " outside the trained form" if all(row.column in OUTSIDE for row in shares.rows) else ""
    return f"{count} {'task' if count == 1 else 'tasks'}{where}"


def board(run: Run, comparison: Comparison) -> dict[str, Any] | None:
    """What was lost and came back by ability, as it is asked worst and best; None where nothing can be compared."""
    roles = tuple(role for role in ROLES if role in run.evaluations)
    left_out = ("teacher", "distilled") if "control" in roles else None
    pairs = [pair for pair in CHANGES if set(pair) <= set(roles) and pair != left_out]
    rows = [row for row in comparison.rows if row.has_signal and len(row.scores) > 1]
    if not pairs or not rows:
        return None
    shown = {column: _shown(column, own) for column, own in by_column(rows).items()}
    groups = [(heading(column_words(column)), len(own)) for column, own in shown.items()]
    return {
        "caption": "What was lost and what came back" if "distilled" in roles else "What was lost",
        "roles": roles,
        "changes": [CHANGES[pair] for pair in pairs],
        "lines": [_board_line(row, roles, pairs) for own in shown.values() for row in own],
        "headings": headings(groups) if any(shown) else {},
    }


def _board_line(row: Row, roles: Sequence[str], pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """One way of asking for one ability; places are drawn of scores that are shares."""
    first = row.any_score
    return {
        "task": task_name(row),
        "unit": glance_unit(first),
        "identifier": identifier_text(first),
        "scores": [glance_text(row.scores.get(role)) for role in roles],
        "changes": [change_text(row, *pair) for pair in pairs],
        "places": {role: score for role, score in row.scores.items() if role in roles and is_share(first)},
        "chance": first.chance,
    }


def _shown(column: str, rows: Sequence[Row]) -> list[Row]:
    """Rows of a column that stand on the board, by ability; of the trained form the first of each alone."""
    abilities = {ability: [row for row in rows if row.ability == ability] for ability in {r.ability: 0 for r in rows}}
    return [row for own in abilities.values() for row in _worst_and_best(own)[: 1 if column == "in" else None]]


def _worst_and_best(own: Sequence[Row]) -> list[Row]:
    """Rows of an ability: the one that the cut model keeps least of, the one that it keeps most of if that is
    another, and of those without a chance level the one that rose most."""
    kept = sorted(((_kept(row), row) for row in own if row.higher_is_better), key=lambda pair: pair[0])
    shown = [row for _, row in kept[:1]]
    if kept and kept[-1][0] - kept[0][0] >= PROTOCOLS_DIFFER:
        shown.append(kept[-1][1])
    falling = [row for row in own if not row.higher_is_better]
    return shown + sorted(falling, key=lambda row: next(iter(row.differences.values())).difference)[-1:]


def _kept(row: Row) -> float:
    """Share kept by the pruned model, or by the only one there is."""
    retention = next(iter(row.retained.values()), None)
    return 1.0 if retention is None or retention.value is None else retention.value


def facts(run: Run) -> tuple[tuple[str, str], ...]:
    """Key figures: value and label of each."""
    figures: list[tuple[str, str]] = []
    if run.plan and (run.plan.drop or not run.plan.changes_layers):
        figures.append((f"{len(run.plan.drop)} of {run.plan.num_layers}", "decoder layers cut"))
    if run.plan and run.plan.width:
        figures += [(f"{count:,}", f"{part} in every layer") for count, part in run.plan.width.parts]
    small, teacher = _smallest(run.evaluations), run.evaluations.get("teacher")
    if teacher and small:
        change = 100 * (run.evaluations[small].num_parameters / teacher.num_parameters - 1)
        figures.append((f"{signed(change, 0)} %", "parameters"))
    timed = run.speed.roles if run.speed else {}
    if "teacher" in timed and (role := _smallest(timed)):
        ratio = speed_ratio(timed[role], timed["teacher"], "decode")
        told = f" (single rounds: {ratio.limits[0]:.2f} to {ratio.limits[1]:.2f} ×)" if ratio.limits else ""
        figures.append((f"{ratio.value:.2f} ×", f"decoding speed{told}"))
    if run.training:
        figures.append((count_text(run.training.num_tokens), "tokens of distillation"))
    return tuple(figures)


def _cut(run: Run) -> str:
    if run.plan is None:
        return f"No layer of {run.model} has been cut yet."
    drop, changes = run.plan.drop, [change.words for change in run.plan.changes]
    layers = f"{len(drop)} of the {run.plan.num_layers} decoder layers of {run.model}"
    which = f"({'layer' if len(drop) == 1 else 'layers'} {layers_text(drop)}, counted from 0)"
    sentence = f"{layers} {'was' if len(drop) == 1 else 'were'} cut out {which}"
    small, teacher = _smallest(run.evaluations), run.evaluations.get("teacher")
    if teacher and small:
        before, after = teacher.num_parameters, run.evaluations[small].num_parameters
        sentence += f", which takes the model from {count_text(before)} to {count_text(after)} parameters"
    size = run.numerics.get("size", 1)
    small_run = f"This run took {100 * size:.0f} % of its recipe's tokens and items." if size < 1 else ""
    changed = f"Changed{'' if drop else f' in {run.model}'}: {listed(changes)}." if changes else ""
    return " ".join(filter(None, [f"{sentence}." if drop or not changes else "", changed, small_run]))


def _nothing_outside(rows: Sequence[Row]) -> str:
    """What a run that asks in the trained form alone does not know, and which tasks would tell."""
    columns = by_column(row for row in rows if row.has_signal and len(row.scores) > 1)
    if "in" not in columns or columns.keys() & {"reworded", "out", "public"}:
        return ""
    evaluated = {row.any_score.task for row in rows}
    described, _ = described_tasks(task_folders(None))
    reworded = [name for name, (data, protocol) in described.items() if data.reworded_under(protocol) in evaluated]
    would = listed([*(reworded[:MAX_NAMES] or ["these tasks reworded"]), "public benchmarks"])
    return (
        "Not enough to say: nothing was measured outside the form that training text may have, so what came back may "
        f"be the form alone; {would} would tell."
    )


def _smallest(roles: Collection[str]) -> str | None:
    return next((role for role in ("distilled", "pruned") if role in roles), None)
