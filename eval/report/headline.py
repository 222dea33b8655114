"""The report's first sentences: what was cut, lost and regained. Claims rest on corrected p-values only."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.artifacts.artifact import SpeedScore
from shoal.formatting import count_text, layers_text, listed, signed
from shoal.recipe.edits import in_words

from .document import Board, BoardLine, Place
from .findings import ROLES, Comparison, Row, Run, is_share
from .speed import speed_ratio
from .wording import (
    MAX_NAMES,
    change_text,
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
}
"""(before, after) -> name of the change between them."""
PROTOCOLS_DIFFER = 0.1
"""Difference in retention from which two ways of asking are both shown at the top."""


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
    left_out = "One task is" if len(silent) == 1 else f"{len(silent)} tasks are"
    if silent and len(roles) > 1:
        sentences.append(
            f"{left_out} left out of these sentences because the intact model is not shown to be "
            "above chance there (see “No signal here”)."
        )
    return tuple(sentence for sentence in sentences if sentence)


def board(run: Run, comparison: Comparison) -> Board | None:
    """What was lost and came back by ability, as it is asked worst and best; None where nothing can be compared."""
    roles = tuple(role for role in ROLES if role in run.evaluations)
    pairs = [pair for pair in CHANGES if set(pair) <= set(roles)]
    rows = [row for row in comparison.rows if row.has_signal and len(row.scores) > 1]
    if not pairs or not rows:
        return None
    shown = [row for ability in dict.fromkeys(row.ability for row in rows) for row in _worst_and_best(ability, rows)]
    lines = tuple(_board_line(row, roles, pairs) for row in shown)
    caption = "What was lost and what came back" if "distilled" in roles else "What was lost"
    return Board(caption, roles, tuple(CHANGES[pair] for pair in pairs), lines)


def _worst_and_best(ability: str, rows: Sequence[Row]) -> list[Row]:
    """Rows of an ability: the one that the cut model keeps least of, the one that it keeps most of if that is
    another, and of those without a chance level the one that rose most."""
    own = [row for row in rows if row.ability == ability]
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


def _board_line(row: Row, roles: Sequence[str], pairs: Sequence[tuple[str, str]]) -> BoardLine:
    first = row.any_score
    places, chance = (), None
    if is_share(first):
        places = tuple(Place(role, s.score, s.ci_low, s.ci_high) for role, s in row.scores.items())
        chance = first.chance
    return BoardLine(
        task_name(row),
        glance_unit(first),
        identifier_text(first),
        tuple(glance_text(row.scores.get(role)) for role in roles),
        tuple((change_text(row, *pair), row.verdict(*pair) or "") for pair in pairs),
        places,
        chance,
    )


def facts(run: Run) -> tuple[tuple[str, str], ...]:
    """Key figures: value and label of each."""
    figures: list[tuple[str, str]] = []
    if run.plan and (run.plan.drop or not run.plan.edits):
        figures.append((f"{len(run.plan.drop)} of {run.plan.num_layers}", "decoder layers cut"))
    if run.plan and run.plan.edits:
        figures.append((str(len(run.plan.edits)), "edits of layers" if len(run.plan.edits) > 1 else "edit of layers"))
    small, teacher = _smallest(run), run.evaluations.get("teacher")
    if teacher and small:
        change = 100 * (run.evaluations[small].num_parameters / teacher.num_parameters - 1)
        figures.append((f"{signed(change, 0)} %", "parameters"))
    if run.speed and "teacher" in run.speed.roles:
        role = next((role for role in ("distilled", "pruned") if role in run.speed.roles), None)
        if role:
            figures.append(_faster(run.speed.roles["teacher"], run.speed.roles[role]))
    if run.training:
        figures.append((count_text(run.training.num_tokens), "tokens of distillation"))
    return tuple(figures)


def _faster(teacher: SpeedScore, small: SpeedScore) -> tuple[str, str]:
    """The ratio of the median speeds of writing, and how far it went apart from round to round of taking turns."""
    ratio = speed_ratio(small, teacher, "decode")
    told = f" (single rounds: {ratio.limits[0]:.2f} to {ratio.limits[1]:.2f} ×)" if ratio.limits else ""
    return f"{ratio.value:.2f} ×", f"decoding speed{told}"


def _cut(run: Run) -> str:
    if run.plan is None:
        return f"No layer of {run.model} has been cut yet."
    drop, edits = run.plan.drop, run.plan.edits
    layers = f"{len(drop)} of the {run.plan.num_layers} decoder layers of {run.model}"
    which = f"({'layer' if len(drop) == 1 else 'layers'} {layers_text(drop)}, counted from 0)"
    sentence = f"{layers} {'was' if len(drop) == 1 else 'were'} cut out {which}"
    small, teacher = _smallest(run), run.evaluations.get("teacher")
    if teacher and small:
        before, after = teacher.num_parameters, run.evaluations[small].num_parameters
        sentence += f", which takes the model from {count_text(before)} to {count_text(after)} parameters"
    changed = f"Edited{'' if drop else f' in {run.model}'}: {listed(map(in_words, edits))}." if edits else ""
    return " ".join([*([f"{sentence}."] if drop or not edits else []), *([changed] if changed else [])])


def _lost(rows: Sequence[Row]) -> str:
    worse, better, unclear = _sorted_by_verdict(rows, ("teacher", "pruned"))
    total = len(worse) + len(better) + len(unclear)
    if not total:
        return ""
    if len(worse) == total > 1:
        return f"Cutting made all {total} scores worse."
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
        which = f"all {total}" if len(better) == total > 1 else f"{len(better)} of {total}"
        first = f"Distilling made {which} scores better than those of the cut model"
    return _sentence(first, ("worse: ", worse), ("no clear change: ", unclear))


def _still_missing(rows: Sequence[Row]) -> str:
    worse, better, unclear = _sorted_by_verdict(rows, ("teacher", "distilled"))
    parts = (("still worse on ", worse), ("no clear difference on ", unclear), ("better on ", better))
    first, *others = [f"{how}{named_or_counted(some)}" for how, some in parts if some] or [""]
    ending = ", where it may have learnt the form of the questions" if better else ""
    return f"Against the teacher, the distilled model is {'; '.join((first, *others))}{ending}." if first else ""


def _sentence(first: str, *others: tuple[str, Sequence[Row]]) -> str:
    return "; ".join([first, *(f"{how}{named_or_counted(rows)}" for how, rows in others if rows)]) + "."


def _sorted_by_verdict(rows: Sequence[Row], pair: tuple[str, str]) -> list[list[Row]]:
    """Rows that are worse, better, and not clearly either."""
    return [[row for row in rows if row.verdict(*pair) == verdict] for verdict in ("worse", "better", "unclear")]


def _smallest(run: Run) -> str | None:
    return next((role for role in ("distilled", "pruned") if role in run.evaluations), None)
