"""The report's first sentences: what was dropped, lost and recovered, and what to do.

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
from shoal.stats.paired import SIGNIFICANT
from shoal.task_words import OUTSIDE

from ..tasks.names import described_tasks, task_folders
from . import wording
from .costs import speed_ratio
from .findings import Comparison, Row, is_share
from .page import headings
from .run import Run

CHANGES = {
    ("teacher", "pruned"): "Lost by pruning",
    ("pruned", "distilled"): "Recovered",
    ("teacher", "distilled"): "Against the teacher",
    ("control", "distilled"): "Still lost",
}
"""(before, after) -> name of the change between them. If there is a control, it shows what is still lost."""
NOTE = f"“Likely but not confirmed”: the interval excludes 0, but p ≥ {SIGNIFICANT} after correction (Holm, all tasks)."
KEPT = 0.9
"""Share of the teacher's score above chance that a model worth shipping keeps."""
PROTOCOLS_DIFFER = 0.1
"""Difference in the share kept from which two protocols are both shown at the top."""


def headline(run: Run, comparison: Comparison) -> tuple[str, ...]:
    """At most five sentences: what was dropped, what that lost, what distillation recovered outside the trained
    wording, what is still lost compared with the control, and what to do. Single tasks are in the tables."""
    rows = [row for row in comparison.rows if row.has_signal and len(row.scores) > 1]
    outside = [row for row in rows if row.column in OUTSIDE] or [row for row in rows if not row.column]
    if "distilled" not in run.evaluations:  # no text has trained a wording
        outside = rows
    if not run.evaluations:
        return _cut(run), "No ability has been evaluated yet. Run `shoal eval` to see what was lost."
    shares = Shares.of(outside)
    told = (_cut(run), _lost(shares), _came_back(shares), _still_lost(shares), decision(run, comparison.rows, shares))
    return tuple(sentence for sentence in told if sentence)


@dataclass(frozen=True)
class Shares:
    """Shares kept of the teacher's score above chance by role, and the changes between roles: means over the tasks
    outside the trained wording that have a chance level and on which the teacher is clearly above it."""

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
    told = f", least on {wording.task_name(least)} ({wording.kept_text(least.retained['pruned'])})"
    return (
        f"Before training, the pruned model keeps {wording.kept_text(kept)} of the teacher's score above chance "
        f"({_tasks(shares)}){told if len(shares.rows) > 1 else ''}."
    )


def _came_back(shares: Shares) -> str:
    if (kept := shares.kept.get("distilled")) is None:
        return ""
    change = shares.changes.get(("pruned", "distilled"))
    points = wording.points_text((change.value, change.ci_low, change.ci_high), 0) if change else ""
    if change is not None and change.ci_low <= 0:
        return f"Distillation does not clearly recover anything: {points}."
    told = "scores above the teacher" if kept.value > 1 else f"keeps {wording.kept_text(kept)}"
    return f"After training, the distilled model {told}{points and f'; the share kept rose by {points}'}."


def _still_lost(shares: Shares) -> str:
    if "distilled" not in shares.kept:
        return ""
    if (change := shares.changes.get(("distilled", "control"))) is None:
        return "No control was trained (eval.control), so a gain may come from the text alone."
    told = wording.points_text((change.value, change.ci_low, change.ci_high), 0)
    if change.ci_low > 0:
        return f"Still lost: the control (the teacher after the same training) is {told} ahead."
    return f"The control (the teacher after the same training) is not clearly ahead: {told}."


def decision(run: Run, rows: Sequence[Row], shares: Shares) -> str:
    """What to do, by rules. Tasks outside the trained wording decide, or all tasks if nothing was trained.

    Ship: no task is clearly worse than the teacher's, the control has not clearly 1 - KEPT more, and the lower end of
    the mean share kept is KEPT or more. Not decided: only the control is missing. Not enough items: only that interval
    holds KEPT. Else train longer if training has clearly recovered something, and drop fewer layers if it has not.
    """
    role = _smallest(run.evaluations)
    if role is None or "teacher" not in run.evaluations:
        return ""
    if not shares.rows or (kept := shares.kept.get(role)) is None:
        clear = any(row.has_signal and row.teacher_sigmas is not None for row in rows)
        alike = "no task has comparable scores of all models; run `shoal eval` again"
        missing = alike if clear else "the teacher is not clearly above chance on any task"
        return _nothing_outside(rows) or f"Not enough data: {missing}."
    told = {row.key for row in shares.rows}
    watched = [row for row in rows if row.key in told or (row.column in OUTSIDE and row.has_signal)]
    worse = [row for row in watched if row.verdict("teacher", role) == "worse"]
    lost, gain = (shares.changes.get(pair) for pair in (("distilled", "control"), ("pruned", "distilled")))
    reasons = {
        f"clearly worse than the teacher on {wording.named_or_counted(worse)}": bool(worse),
        "the control has clearly more": lost is not None and lost.ci_low > 1 - KEPT,
        f"less than {100 * KEPT:.0f} % is kept": kept.ci_high < KEPT,
    }
    why = next((reason for reason, holds in reasons.items() if holds), None)
    if why is None and kept.ci_low >= KEPT:
        held = f"at least {100 * KEPT:.0f} % is kept, and no task outside the trained wording is clearly worse"
        if role == "distilled" and lost is None:
            return f"Not decided: {held}, but no control was trained; set eval.control to true."
        return f"Ship: {held}."
    if why is None:
        both = f"the share kept may be above or below {100 * KEPT:.0f} %"
        return f"Not enough items: {both}; raise eval.limit before you ship."
    if role == "pruned":
        return f"Distil: {why}."
    if gain and gain.ci_low > 0:
        return f"Train longer, or drop fewer layers: {why}; training has recovered part of the loss."
    return f"Drop fewer layers: {why}; training has not clearly recovered anything."


def _tasks(shares: Shares) -> str:
    count = len(shares.rows)
    where = " outside the trained wording" if all(row.column in OUTSIDE for row in shares.rows) else ""
    return f"{f'mean of {count} tasks' if count > 1 else '1 task'}{where}"


def board(run: Run, comparison: Comparison) -> dict[str, Any] | None:
    """What was lost and recovered by ability, under its worst and best protocol; None if nothing can be compared."""
    roles = tuple(role for role in ROLES if role in run.evaluations)
    left_out = ("teacher", "distilled") if "control" in roles else None
    pairs = [pair for pair in CHANGES if set(pair) <= set(roles) and pair != left_out]
    rows = [row for row in comparison.rows if row.has_signal and len(row.scores) > 1]
    if not pairs or not rows:
        return None
    shown = {column: _shown(column, own) for column, own in wording.by_column(rows).items()}
    groups = [(heading(wording.column_words(column)), len(own)) for column, own in shown.items()]
    lines = [_board_line(row, roles, pairs) for own in shown.values() for row in own]
    return {
        "caption": "What was lost and what was recovered" if "distilled" in roles else "What was lost",
        "note": NOTE if any(wording.LIKELY in change for line in lines for change in line["changes"]) else "",
        "roles": roles,
        "changes": [CHANGES[pair] for pair in pairs],
        "lines": lines,
        "headings": headings(groups) if any(shown) else {},
    }


def _board_line(row: Row, roles: Sequence[str], pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """One ability under one protocol; places are drawn of scores that are shares."""
    first = row.any_score
    return {
        "task": wording.task_name(row),
        "unit": wording.glance_unit(first),
        "identifier": wording.identifier_text(first),
        "scores": [wording.glance_text(row.scores.get(role)) for role in roles],
        "changes": [wording.change_text(row, *pair) for pair in pairs],
        "places": {role: score for role, score in row.scores.items() if role in roles and is_share(first)},
        "chance": first.chance,
    }


def _shown(column: str, rows: Sequence[Row]) -> list[Row]:
    """Rows of a column that stand on the board, by ability; of the trained wording the first of each alone."""
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
        figures.append((f"{len(run.plan.drop)} of {run.plan.num_layers}", "decoder layers dropped"))
    if run.plan and run.plan.width:
        figures += [(f"{count:,}", f"{part} in every layer") for count, part in run.plan.width.parts]
    small, teacher = _smallest(run.evaluations), run.evaluations.get("teacher")
    if teacher and small:
        change = 100 * (run.evaluations[small].num_parameters / teacher.num_parameters - 1)
        figures.append((f"{signed(change, 0)} %", "parameters"))
    timed = run.speed.roles if run.speed else {}
    if "teacher" in timed and (role := _smallest(timed)):
        ratio = speed_ratio(timed[role], timed["teacher"], "decode")
        told = f" (timing rounds: {ratio.limits[0]:.2f} to {ratio.limits[1]:.2f} ×)" if ratio.limits else ""
        figures.append((f"{ratio.value:.2f} ×", f"decoding speed{told}"))
    if run.training:
        figures.append((count_text(run.training.num_tokens), "training tokens"))
    return tuple(figures)


def _cut(run: Run) -> str:
    if run.plan is None:
        return f"No layer of {run.model} has been dropped yet."
    drop, changes = run.plan.drop, [change.words for change in run.plan.changes]
    layers = f"{len(drop)} of the {run.plan.num_layers} decoder layers of {run.model}"
    which = f"({'layer' if len(drop) == 1 else 'layers'} {layers_text(drop)}, counted from 0)"
    sentence = f"{layers} {'was' if len(drop) == 1 else 'were'} dropped {which}"
    small, teacher = _smallest(run.evaluations), run.evaluations.get("teacher")
    if teacher and small:
        before, after = teacher.num_parameters, run.evaluations[small].num_parameters
        sentence += f": {count_text(before)} parameters became {count_text(after)}"
    size = run.numerics.get("size", 1)
    short = f"Short run: only {100 * size:.0f} % of its recipe's tokens and items. " if size < 1 else ""
    changed = f"Changed{'' if drop else f' in {run.model}'}: {listed(changes)}." if changes else ""
    return short + " ".join(filter(None, [f"{sentence}." if drop or not changes else "", changed]))


def _nothing_outside(rows: Sequence[Row]) -> str:
    """What is missing from a run that asks in the trained wording alone, and which tasks would show it."""
    columns = wording.by_column(row for row in rows if row.has_signal and len(row.scores) > 1)
    if "in" not in columns or columns.keys() & {"reworded", "out", "public"}:
        return ""
    evaluated = {row.any_score.task for row in rows}
    described, _ = described_tasks(task_folders(None))
    reworded = [name for name, (data, protocol) in described.items() if data.reworded_under(protocol) in evaluated]
    would = listed([*(reworded[: wording.MAX_NAMES] or ["these tasks reworded"]), "public benchmarks"])
    return (
        "Not enough data: all tasks use the trained wording, so the model may have learnt that wording alone; add "
        f"{would}."
    )


def _smallest(roles: Collection[str]) -> str | None:
    return next((role for role in ("distilled", "pruned") if role in roles), None)
