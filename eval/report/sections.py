"""The report's sections on what the model can do: scores, differences, levels, signal, protocols."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from shoal.artifacts.evaluation import ROLES, Interval, TaskScore
from shoal.figures.scores import Ladder, ladders
from shoal.figures.style import heading
from shoal.formatting import interval_text, listed, signed
from shoal.stats.paired import SIGNIFICANT, PairedDifference, z_above_chance

from .document import Block, Picture, Section, Table
from .findings import SIGNAL_SIGMAS, Comparison, Row, Run, gap_limits, is_share, protocol_gaps, writing
from .wording import (
    DASH,
    by_column,
    chance_text,
    column_words,
    difference_text,
    gap_text,
    identifier_text,
    limits_text,
    p_text,
    protocol_text,
    retention_text,
    score_text,
    task_name,
    unit_text,
)

RATES = {
    "malformed": "Without a readable answer",
    "repetition": "Ending in a loop",
    "cut_off": "Cut off at the limit",
    "mean_tokens": "Tokens, mean",
}
"""Rate of generated text -> its label."""
VERDICT_WORDS = {"better": "▲ better", "worse": "▼ worse", "unclear": "○ no clear change", None: DASH}


def scores_section(run: Run, comparison: Comparison, picture: Picture | None) -> Section:
    """The before/after tables with intervals, differences and retention."""
    if not run.evaluations:
        return Section("Before and after", (("Nothing has been evaluated yet: `shoal eval` fills this section."),))
    blocks: list[Block] = [
        (
            "Each score is followed by its 95 % interval in brackets: the range in which it would lie for most other "
            "draws of as many items. All models answered exactly the same items, so they are compared item by "
            "item."
        )
    ]
    if picture:
        blocks.append(picture)
    blocks += [
        score_table(run, comparison.rows),
        *_difference_blocks(comparison.rows),
    ]
    return Section("Before and after", tuple(blocks))


def form_section(comparison: Comparison) -> Section | None:
    """The form gap of every role, with both of its scores; None where no task was asked in two forms."""
    twins = [row for row in comparison.rows if row.form]
    roles = [role for role in ROLES if any(row.form and role in row.form.gaps for row in twins)]
    if not roles:
        return None
    own = {row.any_score.task: row for row in comparison.rows}
    body = []
    for row in twins:
        asked = own[row.any_score.twin_of]
        cells = [_form_text(asked, row, role) for role in roles]
        if row.form and "distilled" in roles:
            cells.append(gap_text(row.form.growth.get("distilled"), row.any_score))
        body.append((task_name(asked) + unit_text(asked.any_score), *cells))
    columns = ("Task", *(role.capitalize() for role in roles), *(["Distilled − teacher"] * ("distilled" in roles)))
    caption = "Form gap, with the score in the trained form and that of its twin"
    text = (
        "A twin asks the items of a task in a wording and carrier that no training text has. The form gap is the score "
        "in the trained form minus that of the twin, over the same items: a form that is easier in itself gives the "
        "teacher a gap too, so what was learnt of it is by how much the gap of the distilled model is larger."
    )
    titles = tuple(identifier_text(row.any_score) for row in twins)
    return Section("Form and ability", (text, Table(caption, columns, tuple(body), row_titles=titles)))


def _form_text(own: Row, twin: Row, role: str) -> str:
    """`+54 points [+43, +63], 98 % − 44 %`."""
    gap = twin.form.gaps.get(role) if twin.form else None
    if gap is None:
        return DASH
    scores = [row.scores[role] for row in (own, twin)]
    told = " − ".join(f"{100 * s.score:.0f} %" if is_share(s) else f"{s.score:.2f}" for s in scores)
    return f"{gap_text(gap, twin.any_score)}, {told}"


def no_signal_section(comparison: Comparison) -> Section | None:
    """Tasks that say nothing about damage; None where every task says something."""
    silent = [row for row in comparison.rows if not row.has_signal]
    if not silent:
        return None
    rows = tuple(
        (
            task_name(row),
            str(row.any_score.n),
            chance_text(row.any_score),
            score_text(row.scores["teacher"]),
            signed(row.teacher_sigmas or 0.0, 1),
        )
        for row in silent
    )
    columns = ("Task", "Items", "Chance", "Teacher", "Standard errors above chance")
    return Section(
        "No signal here",
        (
            (
                f"On these tasks the intact teacher is not more than {SIGNAL_SIGMAS:.0f} standard errors above what "
                "guessing reaches: it cannot do them, or there are too few items to show that it can. What a "
                "model cannot do, a cut cannot damage: these rows stay in the tables, but no conclusion about the cut "
                "rests on them."
            ),
            Table("Tasks on which the intact teacher is not shown to be above chance", columns, rows),
        ),
    )


def protocol_section(run: Run, comparison: Comparison) -> Section | None:
    """Why one ability has several scores, and by how much they disagree."""
    if not comparison.rows:
        return None
    blocks: list[Block] = [
        (
            "A protocol is the way in which an ability is asked for. Lettered options (`loglikelihood` in the recipe): "
            "which letter does the model find most likely? Option text (`continuation`): the same with the full text "
            "of every option. Generated (`generation`): the model writes, and what it wrote is checked. The first two "
            "only ask for a ranking, so a damaged model can still rank well while it no longer writes a usable "
            "answer. Worked answers (`worked`): the likelihood of the right answer with its working, in nats per "
            "token. Running text (`rolling`): plain prediction. Layers that look spare under one protocol can be "
            "needed under another."
        )
    ]
    rows = []
    for role in ("pruned", "distilled"):
        for likely, written, gap in fair_gaps(comparison.rows, role):
            kept = [retention_text(row.retained[role]) for row in (likely, written)]
            items = "the same" if _shares_items(likely, written) else "different"
            name = written.ability if written.any_score.family is None else task_name(written)
            rows.append((role, name, *kept, _gap_text(gap, gap_limits(likely, written, role)), items))
    if rows:
        columns = ("Model", "Ability or task", "Kept, by likelihood", "Kept, in generation", "Protocol gap", "Items")
        caption = (
            "Protocol gap: retention by likelihood minus retention in generation. Above zero, likelihood hides damage"
        )
        blocks.append(Table(caption, columns, tuple(rows), frozenset({0, 1, 5})))
    else:
        blocks.append(
            "No protocol gap is shown: it needs an ability on which the teacher is above chance both by likelihood "
            "and in generation, and on which a cut model was evaluated."
        )
    if written := _written_table(comparison.rows):
        blocks.append(written)
    return Section("Why the protocols can disagree", tuple(blocks))


def score_table(run: Run, rows: Sequence[Row]) -> Table:
    """Every task's scores by ability, with what is kept of them; in this order a phone sets what is kept below."""
    roles = [role for role in ROLES if role in run.evaluations]
    kept = [role for role in roles if role != "control" and any(role in row.retained for row in rows)]
    told_apart = any(row.column for row in rows)
    groups: dict[str, list[Row]] = {}
    for ability in dict.fromkeys(row.ability for row in rows):
        for column, own in by_column(row for row in rows if row.ability == ability).items():
            groups[f"{heading(ability)}, {column_words(column)}" if told_apart else heading(ability)] = own
    shown = [row for group in groups.values() for row in group]
    body = []
    for row in shown:
        first = row.any_score
        cells = [score_text(row.scores[role]) if role in row.scores else DASH for role in roles]
        cells.append(", ".join(filter(None, (f"{first.n:,}", limits_text(first)))))
        cells += [retention_text(row.retained.get(role)) for role in kept]
        body.append((task_name(row) + unit_text(first), *cells))
    titles = [*(role.capitalize() for role in roles), "Items", *(f"Kept, {role}" for role in kept)]
    return Table(
        "Scores with 95 % intervals, and the share kept of what the teacher scores above chance",
        ("Task", *titles),
        tuple(body),
        groups=tuple((text, len(group)) for text, group in groups.items()),
        row_titles=tuple(identifier_text(row.any_score) for row in shown),
    )


DIFFERENCES = {
    ("teacher", "pruned"): "What the cut cost: pruned minus teacher",
    ("pruned", "distilled"): "What distilling brought back: distilled minus pruned",
    ("teacher", "distilled"): "What is still missing: distilled minus teacher",
    ("teacher", "control"): "What the control learnt, the uncut teacher trained alike: control minus teacher",
    ("control", "distilled"): "What is still lost: distilled minus control",
}
"""(before, after) -> caption of the table of their differences."""


def difference_table(rows: Sequence[Row], before: str, after: str, caption: str) -> Table:
    """Paired differences between two roles."""
    pair = (before, after)
    shown = [row for row in rows if pair in row.differences]
    body = []
    for row in shown:
        change = row.differences[pair]
        cells = [task_name(row), difference_text(change, row.any_score), VERDICT_WORDS[row.verdict(*pair)]]
        body.append((*cells, p_text(change.p_value), p_text(row.adjusted_p.get(pair)), f"{change.won} / {change.lost}"))
    columns = ("Task", "Difference", "Verdict", "p", "p (Holm)", "Items won / lost")
    titles = tuple(identifier_text(row.any_score) for row in shown)
    return Table(caption, columns, tuple(body), frozenset({0, 2}), row_titles=titles)


def level_section(run: Run, picture: Picture | None) -> Section | None:
    """How far up a family of tasks every model gets; None where no family was scored at several levels."""
    families = ladders(list(run.evaluations.values()))
    if not families:
        return None
    blocks: list[Block] = [
        (
            "Tasks of one family differ in nothing but their level: steps of reasoning, pairs of a look-up, or what "
            "else the family counts. A cut that takes away depth shows in how far up the levels a model still gets."
        ),
        *([picture] if picture else []),
        (tuple(_reach(ladder) for ladder in families if next(iter(ladder.scores.values()))[0].higher_is_better)),
    ]
    for ladder in families:
        scores = zip(*ladder.scores.values(), strict=True)
        rows = tuple((f"{level:g}", *map(score_text, own)) for level, own in zip(ladder.levels, scores, strict=True))
        columns = ("Level", *(role.capitalize() for role in ladder.scores))
        blocks.append(
            Table(f"{heading(ladder.family)} by level, {protocol_text(ladder.protocol)}", columns, rows, folded=True)
        )
    return Section("How many steps survive", tuple(blocks))


def _reach(ladder: Ladder) -> str:
    """Up to which level every role is clear of chance, as the intact teacher has to be, without a gap below."""
    told, at_none = [], []
    for role, scores in ladder.scores.items():
        if clear := [score.level for score in itertools.takewhile(_is_clear, scores)]:
            told.append(f"{role} up to {clear[-1]:g}")
        else:
            at_none.append(role)
    levels = f"levels {ladder.levels[0]:g} to {ladder.levels[-1]:g}"
    reach = f"clear of chance are {listed(told)}" if told else "no model is clear of chance at any level"
    others = f"; {listed(at_none)} at no level" if told and at_none else ""
    return f"{heading(ladder.family)}, {protocol_text(ladder.protocol)}, {levels}: {reach}{others}."


def _is_clear(score: TaskScore) -> bool:
    # one lucky answer lifts the interval off a chance of 0
    return (z_above_chance(score) or 0.0) > SIGNAL_SIGMAS


def _written_table(rows: Sequence[Row]) -> Table | None:
    """How generated texts went, by task and role, with what changed; None where nothing recorded it."""
    writings = writing(rows)
    if not writings:
        return None
    roles = [role for role in ROLES if any(role in w.rates for w in writings)]
    pairs = [pair for pair in (("teacher", "pruned"), ("pruned", "distilled")) if set(pair) <= set(roles)]
    body, groups = [], dict.fromkeys(task_name(w.row) for w in writings)
    for entry in writings:
        scale, unit = (1, "") if entry.name == "mean_tokens" else (100, " %")
        cells = [RATES[entry.name]]
        cells += [_rate_text(entry.rates[role], scale, unit) if role in entry.rates else DASH for role in roles]
        for pair in pairs:
            cells += [_change_text(entry.differences.get(pair), scale), p_text(entry.adjusted_p.get(pair))]
        body.append(tuple(cells))
    columns = ("What", *(role.capitalize() for role in roles))
    for before, after in pairs:
        columns += (f"{after.capitalize()} − {before}", "p (Holm)")
    counts = tuple((task, sum(task_name(w.row) == task for w in writings)) for task in groups)
    return Table("How the texts went that were written, with 95 % intervals", columns, tuple(body), groups=counts)


def _rate_text(rate: Interval, scale: int, unit: str) -> str:
    return interval_text((rate.value, rate.ci_low, rate.ci_high), ".1f", unit, scale=scale)


def _change_text(change: PairedDifference | None, scale: int) -> str:
    if change is None:
        return DASH
    return interval_text((change.difference, change.ci_low, change.ci_high), "+.1f", scale=scale)


def _gap_text(gap: float, limits: tuple[float, float] | None) -> str:
    if limits is None:
        return f"{signed(100 * gap, 0)} points"
    return interval_text((gap, *limits), "+.0f", " points", scale=100)


def _difference_blocks(rows: Sequence[Row]) -> list[Block]:
    pairs = [pair for pair in DIFFERENCES if any(pair in row.differences for row in rows)]
    if not pairs:
        return [("There is one model only so far, so there is nothing to compare it with.")]
    tests = {row.differences[pair].test for row in rows for pair in row.differences}
    used = {
        "mcnemar-exact": "the exact McNemar test for right-or-wrong items",
        "paired-bootstrap": "a paired bootstrap",
    }
    above = any(row.verdict("teacher", "distilled") == "better" for row in rows)
    legend = (
        f"“Better” and “worse” are said only where p (Holm) is below {SIGNIFICANT:g}: among many tasks, some change "
        "clearly by luck, so p is corrected for having looked at all of them, while each interval stands for its own "
        f"task alone. p is from {listed(used[test] for test in sorted(tests))}. "
        "What is kept is (score − chance) / (teacher − chance): 100 % is the teacher, 0 % is guessing"
        f"{'; what is more than the teacher has is no share of it, see “Read with care”' if above else ''}."
    )
    return [*(difference_table(rows, *pair, DIFFERENCES[pair]) for pair in pairs), legend]


def fair_gaps(rows: Sequence[Row], role: str) -> list[tuple[Row, Row, float]]:
    """The protocol gaps of ``role`` between tasks that ask the same: on the same items where an ability has such a
    pair, else at the same level of the same family."""
    gaps = protocol_gaps(rows, role)
    shared = {likely.ability for likely, written, _ in gaps if _shares_items(likely, written)}
    return [
        (likely, written, gap)
        for likely, written, gap in gaps
        if (_shares_items(likely, written) if likely.ability in shared else _dial(likely) == _dial(written))
    ]


def _dial(row: Row) -> tuple[str | None, float | None]:
    return row.any_score.family, row.any_score.level


def _shares_items(first: Row, other: Row) -> bool:
    return {item.id for item in first.any_score.items} == {item.id for item in other.any_score.items}
