"""The report's first sentences: what was cut, lost and regained. Claims rest on corrected p-values only."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from shoal.artifacts.evaluation import ROLES
from shoal.figures.style import heading
from shoal.formatting import count_text, layers_text, listed, signed

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
    difference_text,
    glance_text,
    glance_unit,
    identifier_text,
    named_or_counted,
    task_name,
    task_names,
)

CHANGES = {
    ("teacher", "pruned"): "Lost by the cut",
    ("pruned", "distilled"): "Brought back",
    ("teacher", "distilled"): "Against the teacher",
    ("control", "distilled"): "Still lost",
}
"""(before, after) -> name of the change between them. Where there is a control, what is missing is what it has."""
PROTOCOLS_DIFFER = 0.1
"""Difference in retention from which two ways of asking are both shown at the top."""


def headline(run: Run, comparison: Comparison) -> tuple[str, ...]:
    """A few plain sentences; better and worse are said only where the difference is significant."""
    sentences = [_cut(run)]
    roles = run.evaluations
    columns = by_column(row for row in comparison.rows if row.has_signal)
    for column, rows in columns.items():
        told = [_still_missing(rows), _against_control(rows)]
        if column == "in":
            told.insert(1, _learnt_by_control(rows))
        if column != "in" or not told[0] or len(columns) == 1:  # else it stands beside what counts: tables tell more
            told = [_lost(rows), _came_back(rows), *told]
        said = " ".join(filter(None, told))
        sentences.append(f"{heading(column_words(column))}: {said}" if said and any(columns) else said)
    if "distilled" in roles:
        sentences += [_form_gaps(comparison.rows), _nothing_outside(comparison.rows)]
    if not roles:
        sentences.append("No ability has been evaluated yet, so nothing is said here about what was lost.")
    silent = [row for row in comparison.rows if not row.has_signal]
    left_out = "One task is" if len(silent) == 1 else f"{len(silent)} tasks are"
    if silent and len(roles) > 1:
        sentences.append(
            f"{left_out} left out of these sentences because the intact model is not shown to be "
            "above chance there (see “No signal here”)."
        )
    return tuple(sentence for sentence in sentences if sentence)


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
    changed = f"Changed{'' if drop else f' in {run.model}'}: {listed(changes)}." if changes else ""
    return " ".join([*([f"{sentence}."] if drop or not changes else []), *([changed] if changed else [])])


def _lost(rows: Sequence[Row]) -> str:
    worse, better, unclear = _sorted_by_verdict(rows, ("teacher", "pruned"))
    total = len(worse) + len(better) + len(unclear)
    if not total:
        return ""
    if len(worse) == total:
        return f"Cutting made {f'all {total} scores' if total > 1 else task_names(worse)} worse."
    told = f": {task_names(worse)}" if 0 < len(worse) <= MAX_NAMES else ""
    return _sentence(
        f"Cutting made {len(worse)} of {total} scores worse{told}",
        ("better: ", better),
        ("no clear change: ", unclear),
    )


def _came_back(rows: Sequence[Row]) -> str:
    worse, better, unclear = _sorted_by_verdict(rows, ("pruned", "distilled"))
    total = len(worse) + len(better) + len(unclear)
    if not total:
        return ""
    first = "Distilling made no score clearly better than that of the cut model"
    if better:
        which = f"all {total}" if len(better) == total else f"{len(better)} of {total}"
        scores = f"{which} scores better than those" if total > 1 else f"{task_names(better)} better than that"
        first = f"Distilling made {scores} of the cut model"
    return _sentence(first, ("worse: ", worse), ("no clear change: ", unclear))


def _still_missing(rows: Sequence[Row]) -> str:
    worse, better, unclear = _sorted_by_verdict(rows, ("teacher", "distilled"))
    parts = (("still worse on ", worse), ("not clearly different on ", unclear), ("better on ", better))
    first, *others = [f"{how}{named_or_counted(some)}" for how, some in parts if some] or [""]
    learnt = ", which is more than the teacher has: the form of the questions was learnt"
    ending = learnt if better and all(row.column == "in" for row in better) else ""
    against = "the teacher and the control" if _is_alike(rows) else "the teacher"
    return f"Against {against}, the distilled model is {'; '.join((first, *others))}{ending}." if first else ""


def _is_alike(rows: Sequence[Row]) -> bool:
    """Whether the distilled model stands to the control as it stands to the teacher."""
    verdicts = [[row.verdict(role, "distilled") for row in rows] for role in ("teacher", "control")]
    return verdicts[0] == verdicts[1]


def _against_control(rows: Sequence[Row]) -> str:
    """What training does not bring back although the intact model, trained alike, has it."""
    worse, better, unclear = _sorted_by_verdict(rows, ("control", "distilled"))
    if _is_alike(rows) or not (worse or better or unclear):
        return ""
    first = f"still lost: {named_or_counted(worse)}" if worse else "nothing is clearly still lost"
    return _sentence(f"Against the control, {first}", ("better than it: ", better))


def _learnt_by_control(rows: Sequence[Row]) -> str:
    """How much of what is more than the teacher has the intact model learnt, trained alike."""
    better = [row for row in rows if row.verdict("teacher", "distilled") == "better"]
    told = [
        f"{task_names([row])} {change_text(row, 'teacher', 'control')}" for row in better if "control" in row.scores
    ]
    return f"Of that the control, the uncut teacher trained alike, learnt: {_first_of(told)}." if told else ""


def _form_gaps(rows: Sequence[Row]) -> str:
    """Where the distilled model does better in the trained form than in its twin, and the teacher does not."""
    twins = [row for row in rows if row.has_signal and row.form and "distilled" in row.form.growth]
    told = []
    for row in twins:
        if row.form and row.form.is_learnt("distilled"):
            roles = (row.form.gaps[role] for role in ("distilled", "teacher"))
            own, teachers = (difference_text(gap, row.any_score, glance=True) for gap in roles)
            told.append(f"{task_names([row])} {own}, of the teacher {teachers}")
    if not told:
        return "No form gap is clearly larger than the teacher's." if twins else ""
    return f"Form gap, which is the score in the trained form minus that of its twin: {_first_of(told)}."


def _nothing_outside(rows: Sequence[Row]) -> str:
    """What a run that asks in the trained form alone does not know, and which tasks would tell."""
    columns = by_column(row for row in rows if row.has_signal and len(row.scores) > 1)
    if "in" not in columns or columns.keys() & {"twin", "out", "public"}:
        return ""
    evaluated = {row.any_score.task for row in rows}
    described, _ = described_tasks(task_folders(None))
    twins = [name for name, (data, protocol) in described.items() if data.twin_under(protocol) in evaluated]
    would = listed([*(twins[:MAX_NAMES] or ["twins of these tasks"]), "public benchmarks"])
    return (
        "Nothing here was measured outside the form that training text may have, so what came back may be the form "
        f"alone; {would} would tell."
    )


def _first_of(told: Sequence[str]) -> str:
    more = [f"and {len(told) - MAX_NAMES} more"] if len(told) > MAX_NAMES else []
    return "; ".join([*told[:MAX_NAMES], *more])


def _sentence(first: str, *others: tuple[str, Sequence[Row]]) -> str:
    return "; ".join([first, *(f"{how}{named_or_counted(rows)}" for how, rows in others if rows)]) + "."


def _sorted_by_verdict(rows: Sequence[Row], pair: tuple[str, str]) -> list[list[Row]]:
    """Rows that are worse, better, and not clearly either."""
    return [[row for row in rows if row.verdict(*pair) == verdict] for verdict in ("worse", "better", "unclear")]


def _smallest(roles: Collection[str]) -> str | None:
    return next((role for role in ("distilled", "pruned") if role in roles), None)
