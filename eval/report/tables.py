"""The report's tables of scores, differences, wordings, levels, signal, protocols and items."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from shoal.artifacts.evaluation import ROLES, ItemScore
from shoal.figures.scores import Ladder
from shoal.figures.style import heading
from shoal.formatting import interval_text, listed, signed
from shoal.stats.paired import z_above_chance
from shoal.task_words import PROTOCOLS

from ..harness.rates import CALIBRATION_ERROR, OVERCONFIDENCE
from . import wording
from .findings import PAIRS, SIGNAL_SIGMAS, Comparison, Row, flipped, is_share, protocol_gaps, shares_items, writing
from .page import DASH, Table
from .run import Run

RATES = {
    "malformed": "Without a readable answer",
    "repetition": "Ending in a loop",
    "cut_off": "Cut off at the limit",
    "refused": "Refused",
    "mean_tokens": "Tokens, mean",
    OVERCONFIDENCE: "Confidence minus share correct",
}
"""Rate -> its label."""
VERDICT_WORDS = {"better": "▲ better", "worse": "▼ worse"}
CHANGED_SIDES = (
    ("pruned", "distilled", "recovered by distillation", "lost by distillation"),
    ("teacher", "pruned", "right only after pruning", "lost by pruning"),
)
"""Role before, role after, name of the items won, name of the items lost."""
MOST_FLIPS = 8
"""Items shown per task and direction."""
MOST_CHARACTERS = 400
"""Characters shown of one text."""


class Flips(NamedTuple):
    """Items of one task that one role has right and another wrong."""

    caption: str
    before: str
    """Role whose text is on the left."""
    after: str
    won: bool
    """Whether the role on the right is the one that has them right."""
    total: int
    """Number of all such items, shown or not."""
    rows: list[tuple[str, ...]]
    """Item, question (empty where it was not kept), expected, and the texts before and after."""


def score_table(run: Run, rows: Sequence[Row]) -> Table:
    """Every task's scores by ability, with what is kept of them; in this order a phone sets what is kept below."""
    roles = [role for role in ROLES if role in run.evaluations]
    kept = [role for role in roles if role != "control" and any(role in row.retained for row in rows)]
    told_apart = any(row.column for row in rows)
    groups: dict[str, list[Row]] = {}
    for ability in dict.fromkeys(row.ability for row in rows):
        for column, own in wording.by_column(row for row in rows if row.ability == ability).items():
            groups[f"{heading(ability)}, {wording.column_words(column)}" if told_apart else heading(ability)] = own
    shown = [row for group in groups.values() for row in group]
    body = []
    for row in shown:
        first = row.any_score
        cells = [wording.score_text(row.scores[role]) if role in row.scores else DASH for role in roles]
        cells.append(", ".join(filter(None, (f"{first.n:,}", wording.limits_text(first)))))
        cells += [wording.kept_text(row.retained.get(role)) for role in kept]
        body.append((wording.task_name(row) + wording.unit_text(first), *cells))
    titles = [*(role.capitalize() for role in roles), "Items", *(f"Kept, {role}" for role in kept)]
    return Table(
        "Scores with 95 % intervals, and the share kept of the teacher's score above chance",
        ("Task", *titles),
        tuple(body),
        groups=tuple((text, len(group)) for text, group in groups.items()),
        row_titles=tuple(wording.identifier_text(row.any_score) for row in shown),
    )


def difference_tables(rows: Sequence[Row], pairs: Iterable[tuple[str, str]] = PAIRS) -> list[Table]:
    """Paired differences between two roles each."""
    return [_difference_table(rows, *pair) for pair in pairs if any(pair in row.differences for row in rows)]


def _difference_table(rows: Sequence[Row], before: str, after: str) -> Table:
    shown = [row for row in rows if (before, after) in row.differences]
    body = []
    for row in shown:
        change = row.differences[before, after]
        told = VERDICT_WORDS.get(row.verdict(before, after) or "", f"○ {wording.unclear_text(change)}")
        cells = [wording.task_name(row), wording.difference_text(change, row.any_score), told]
        cells += [wording.p_text(change.p_value), wording.p_text(row.adjusted_p.get((before, after)))]
        body.append((*cells, f"{change.won} / {change.lost}"))
    columns = ("Task", "Difference", "Verdict", "p", "p (Holm)", "Items won / lost")
    titles = tuple(wording.identifier_text(row.any_score) for row in shown)
    return Table(PAIRS[before, after], columns, tuple(body), frozenset({0, 2}), row_titles=titles)


def form_table(comparison: Comparison) -> Table | None:
    """The wording gap of every role, with both of its scores; None if no task was asked reworded too."""
    reworded = [row for row in comparison.rows if row.form]
    roles = [role for role in ROLES if any(row.form and role in row.form.gaps for row in reworded)]
    if not roles:
        return None
    own = {row.any_score.task: row for row in comparison.rows}
    body = []
    for row in reworded:
        asked = own[row.any_score.reworded_of]
        cells = [_form_text(asked, row, role) for role in roles]
        if row.form and "distilled" in roles:
            cells.append(wording.difference_text(row.form.growth.get("distilled"), row.any_score, glance=True))
        body.append((wording.task_name(asked) + wording.unit_text(asked.any_score), *cells))
    columns = ("Task", *(role.capitalize() for role in roles), *(["Distilled − teacher"] * ("distilled" in roles)))
    caption = "Wording gap, with the score in the trained wording and the score when reworded"
    return Table(
        caption, columns, tuple(body), row_titles=tuple(wording.identifier_text(row.any_score) for row in reworded)
    )


def _form_text(own: Row, reworded: Row, role: str) -> str:
    """`+54 points [+43, +63], 98 % − 44 %`."""
    gap = reworded.form.gaps.get(role) if reworded.form else None
    if gap is None:
        return DASH
    scores = [row.scores[role] for row in (own, reworded)]
    told = " − ".join(f"{100 * s.score:.0f} %" if is_share(s) else f"{s.score:.2f}" for s in scores)
    return f"{wording.difference_text(gap, reworded.any_score, glance=True)}, {told}"


def silent_table(comparison: Comparison) -> Table | None:
    """Tasks that cannot show what was lost; None if there are none."""
    rows = tuple(
        (
            wording.task_name(row),
            str(row.any_score.n),
            wording.chance_text(row.any_score),
            wording.score_text(row.scores["teacher"]),
            signed(row.teacher_sigmas or 0.0, 1),
        )
        for row in comparison.rows
        if not row.has_signal
    )
    columns = ("Task", "Items", "Chance", "Teacher", "Standard errors above chance")
    return Table("Tasks on which the teacher is not clearly above chance", columns, rows) if rows else None


def gap_table(rows: Sequence[Row]) -> Table:
    """By how much likelihood and written answers disagree on what is kept."""
    body = []
    for role in ("pruned", "distilled"):
        for likely, written, gap in protocol_gaps(rows, role):
            kept = [wording.kept_text(row.retained[role], capped=False) for row in (likely, written)]
            name = written.ability if written.any_score.family is None else wording.task_name(written)
            items = "the same" if shares_items(likely, written) else "different"
            body.append((role, name, *kept, wording.points_text(gap, 0), items))
    columns = ("Model", "Ability or task", "Kept, by likelihood", "Kept, in generation", "Protocol gap", "Items")
    caption = "Protocol gap: share kept by likelihood minus share kept in generation. Above 0, likelihood hides a loss"
    return Table(caption, columns, tuple(body), frozenset({0, 1, 5}))


def rates_table(rows: Sequence[Row], caption: str, *, of_options: bool) -> Table:
    """How generated texts went, by task and role, with what changed, or, ``of_options``, by how much surer than right
    the models are of their options; without rows where nothing recorded it."""
    writings = [own for own in writing(rows) if (own.name == OVERCONFIDENCE) == of_options]
    roles = [role for role in ROLES if any(role in w.rates for w in writings)]
    pairs = [pair for pair in (("teacher", "pruned"), ("pruned", "distilled")) if set(pair) <= set(roles)]
    body = []
    for entry in writings:
        scale, unit = (1, "") if entry.name == "mean_tokens" else (100, " %")
        cells = [RATES[entry.name]]
        for own in (entry.rates.get(role) for role in roles):
            limits = own and (own.value, own.ci_low, own.ci_high)
            cells.append(interval_text(limits, ".1f", unit, scale=scale) if limits else DASH)
        for change, p_value in ((entry.differences.get(pair), entry.adjusted_p.get(pair)) for pair in pairs):
            limits = change and (change.difference, change.ci_low, change.ci_high)
            cells += [interval_text(limits, "+.1f", scale=scale) if limits else DASH, wording.p_text(p_value)]
        body.append(tuple(cells))
        if entry.name == OVERCONFIDENCE:
            body.append(_calibration_row(entry.row, roles, pairs))
    columns = ("Rate", *(role.capitalize() for role in roles))
    for before, after in pairs:
        columns += (f"{after.capitalize()} − {before}", "p (Holm)")
    of_task = len(body) // max(len(writings), 1)
    by_task = itertools.groupby(writings, lambda own: wording.task_name(own.row))
    groups = tuple((task, of_task * len(list(own))) for task, own in by_task)
    return Table(caption, columns, tuple(body), groups=groups)


def _calibration_row(row: Row, roles: Sequence[str], pairs: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """The calibration errors of a task, with what luck alone would give, and their changes."""
    cells = [wording.calibration_text(row.scores[role]) if role in row.scores else DASH for role in roles]
    for pair in pairs:
        before, after = (row.scores[role].rates[CALIBRATION_ERROR] if role in row.scores else None for role in pair)
        cells += [DASH if before is None or after is None else signed(100 * (after - before), 1), DASH]
    return ("Calibration error", *cells)


def level_tables(families: Sequence[Ladder]) -> list[Table]:
    """The scores of every family by level."""
    tables = []
    for ladder in families:
        scores = zip(*ladder.scores.values(), strict=True)
        rows = tuple(
            (f"{level:g}", *map(wording.score_text, own)) for level, own in zip(ladder.levels, scores, strict=True)
        )
        columns = ("Level", *(role.capitalize() for role in ladder.scores))
        caption = f"{heading(ladder.family)} by level, {PROTOCOLS.get(ladder.protocol, ladder.protocol)}"
        tables.append(Table(caption, columns, rows, folded=True))
    return tables


def reach(ladder: Ladder) -> str:
    """Up to which level every role is clearly above chance, without a gap below."""
    told, at_none = [], []
    for role, scores in ladder.scores.items():
        # by its interval one lucky answer would be clear of a chance of 0
        clear = itertools.takewhile(lambda score: (z_above_chance(score) or 0.0) > SIGNAL_SIGMAS, scores)
        if levels := [score.level for score in clear]:
            told.append(f"{role} up to {levels[-1]:g}")
        else:
            at_none.append(role)
    far = f"clearly above chance are {listed(told)}" if told else "no model is clearly above chance at any level"
    others = f"; {listed(at_none)} at no level" if told and at_none else ""
    asked = f"{PROTOCOLS.get(ladder.protocol, ladder.protocol)}, levels {ladder.levels[0]:g} to {ladder.levels[-1]:g}"
    return f"{heading(ladder.family)}, {asked}: {far}{others}."


def flips(comparison: Comparison) -> list[Flips]:
    """Items that two models answered differently, the first of every task and direction, with both texts."""
    groups = []
    for before, after, *words in CHANGED_SIDES:
        for row in (row for row in comparison.rows if {before, after} <= row.scores.keys()):
            sides = flipped(row.scores[before], row.scores[after])
            for pairs, word in zip(sides, words, strict=True):
                if count := len(pairs):
                    shown = [_texts(*pair) for pair in pairs[:MOST_FLIPS]]
                    caption = f"{wording.task_name(row)}: {count:,} {'item' if count == 1 else 'items'} {word}"
                    caption += f", {len(shown)} shown" if len(shown) < count else ""
                    groups.append(Flips(caption, before, after, pairs is sides[0], count, shown))
    return groups


def _texts(before: ItemScore, after: ItemScore) -> tuple[str, ...]:
    texts = (before.id, before.question, before.target, before.prediction, after.prediction)
    half, whole = MOST_CHARACTERS // 2, (text.strip() for text in texts)
    # of a long text its beginning and end: a question stands at the end, a loop shows in both
    return tuple(text if len(text) <= MOST_CHARACTERS else f"{text[:half]} … {text[-half:]}" for text in whole)


def identifier_table(run: Run) -> Table:
    """What every task is called in the recipe, and what makes its prompts."""
    tasks = {task.key: task for evaluation in run.evaluations.values() for task in evaluation.tasks}
    rows = tuple(
        (", ".join(wording.score_words(task)), *task.key, task.version, str(task.num_fewshot))
        for task in tasks.values()
    )
    columns = ("Task", "Name in the recipe", "Protocol", "Metric", "Version", "Examples")
    return Table("Tasks by their names", columns, rows, frozenset(range(5)), folded=True)
