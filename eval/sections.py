"""The report's sections on what the model can do: scores, differences, signal, protocols, flipped items."""

from __future__ import annotations

from collections.abc import Sequence

from .document import Block, Bullets, Flip, Flips, Paragraph, Picture, Section, Table
from .findings import ROLES, SIGNAL_SIGMAS, Comparison, Row, Run, flipped, is_share, protocol_gaps
from .statistics import minimal_detectable_difference
from .wording import (
    DASH,
    chance_text,
    difference_text,
    listed,
    p_text,
    retention_text,
    score_text,
    signed,
    task_name,
)

MAX_FLIPS = 8
"""Items shown per task and direction."""
MAX_CHARACTERS = 400
"""Of an item's text."""
FEW_ITEMS = 50
VERDICT_WORDS = {"better": "better", "worse": "worse", "unclear": "no clear change", None: DASH}


def scores_section(run: Run, comparison: Comparison, picture: Picture | None) -> Section:
    """The before/after tables with intervals, differences and retention."""
    if not run.evaluations:
        return Section(
            "Before and after", (Paragraph("Nothing has been evaluated yet: `shoal eval` fills this section."),)
        )
    blocks: list[Block] = [
        Paragraph(
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
        *_warnings(run, comparison),
    ]
    return Section("Before and after", tuple(blocks))


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
            Paragraph(
                f"On these tasks the intact teacher is not more than {SIGNAL_SIGMAS:.0f} standard errors above what "
                "guessing reaches. What a model cannot do, a cut cannot damage: these rows stay in the tables, but no "
                "conclusion about the cut rests on them."
            ),
            Table("Tasks on which the intact teacher is at chance", columns, rows),
        ),
    )


def protocol_section(run: Run, comparison: Comparison) -> Section | None:
    """Why one ability has several scores, and by how much they disagree."""
    if not comparison.rows:
        return None
    blocks: list[Block] = [
        Paragraph(
            "A protocol is the way in which an ability is asked for. “loglikelihood” shows lettered options and looks "
            "which letter the model finds most likely; “continuation” does so with the full text of every option; "
            "“generation” lets the model write and checks what it wrote. The first two only ask for a ranking, so a "
            "damaged model can still rank well while it no longer writes a usable answer. “rolling” is plain "
            "prediction of running text. Layers that look spare under one protocol can be needed under another."
        )
    ]
    rows = []
    for role in ("pruned", "distilled"):
        for likely, written, gap in protocol_gaps(comparison.rows, role):
            kept = [retention_text(row.retained[role]) for row in (likely, written)]
            rows.append(
                (role, likely.ability, *kept, f"{signed(100 * gap, 0)} points", _shared_items(likely, written, role))
            )
    if rows:
        columns = ("Model", "Ability", "Kept, by likelihood", "Kept, in generation", "Protocol gap", "Items")
        caption = (
            "Protocol gap: retention by likelihood minus retention in generation. Above zero, likelihood hides damage"
        )
        blocks.append(Table(caption, columns, tuple(rows), frozenset({0, 1, 5})))
    else:
        blocks.append(
            Paragraph(
                "No protocol gap is shown: it needs an ability on which the teacher is above chance both by likelihood "
                "and in generation, and on which a cut model was evaluated."
            )
        )
    return Section("Why the protocols can disagree", tuple(blocks))


def flips_section(run: Run, comparison: Comparison) -> Section | None:
    """Items that two models answered differently, with both texts."""
    blocks: list[Block] = []
    for before, after, won_word, lost_word in (
        ("teacher", "pruned", "right only after the cut", "lost by the cut"),
        ("pruned", "distilled", "won back by distilling", "lost by distilling"),
    ):
        for row in comparison.rows:
            if before in row.scores and after in row.scores:
                won, lost = flipped(row.scores[before], row.scores[after])
                for pairs, word in ((won, won_word), (lost, lost_word)):
                    if pairs:
                        caption = f"{task_name(row)}: {len(pairs)} {'item' if len(pairs) == 1 else 'items'} {word}"
                        if len(pairs) > MAX_FLIPS:
                            caption += f", {MAX_FLIPS} shown"
                        shown = tuple(
                            Flip(a.id, _clipped(a.target), _clipped(a.prediction), _clipped(b.prediction))
                            for a, b in pairs[:MAX_FLIPS]
                        )
                        blocks.append(Flips(caption, before, after, shown))
    if not blocks:
        return None
    intro = Paragraph("Single answers behind the scores. Open a line to see what both models said.")
    return Section("Items that changed sides", (intro, *blocks))


def score_table(run: Run, rows: Sequence[Row]) -> Table:
    """Every task's scores with what they mean; the scores come first, because a phone shows the first columns."""
    roles = [role for role in ROLES if role in run.evaluations]
    body = []
    for row in rows:
        task, protocol, metric = row.key
        first = row.any_score
        scores = [score_text(row.scores[role]) if role in row.scores else DASH for role in roles]
        direction = "" if row.higher_is_better else " (lower is better)"
        words = [row.ability, protocol, metric + direction, f"{first.version}, {first.num_fewshot} shots"]
        body.append((task, *scores, chance_text(first), f"{first.n:,}", *words))
    titles = [role.capitalize() for role in roles]
    columns = ("Task", *titles, "Chance", "Items", "Ability", "Protocol", "Metric", "Version")
    return Table(
        "Scores with 95 % intervals", columns, tuple(body), frozenset({0, *range(len(columns) - 4, len(columns))})
    )


def difference_table(rows: Sequence[Row], before: str, after: str, caption: str) -> Table:
    """Paired differences between two roles, with the retention of ``after`` where no other table shows it."""
    pair = (before, after)
    with_retention = pair != ("teacher", "distilled") and any(after in row.retained for row in rows)
    body = []
    for row in rows:
        if pair in row.differences:
            found = row.differences[pair]
            cells = [task_name(row), difference_text(found, row.any_score), VERDICT_WORDS[row.verdict(*pair)]]
            cells += [p_text(found.p_value), p_text(row.adjusted_p.get(pair)), f"{found.won} / {found.lost}"]
            body.append((*cells, *([retention_text(row.retained.get(after))] if with_retention else [])))
    columns = ("Task", "Difference", "Verdict", "p", "p (Holm)", "Items won / lost")
    columns += (f"Retention, {after}",) if with_retention else ()
    return Table(caption, columns, tuple(body), frozenset({0, 2}))


def _difference_blocks(rows: Sequence[Row]) -> list[Block]:
    wanted = {
        ("teacher", "pruned"): "What the cut cost: pruned minus teacher",
        ("pruned", "distilled"): "What distilling brought back: distilled minus pruned",
        ("teacher", "distilled"): "What is still missing: distilled minus teacher",
    }
    pairs = [pair for pair in wanted if any(pair in row.differences for row in rows)]
    if not pairs:
        return [Paragraph("There is one model only so far, so there is nothing to compare it with.")]
    tests = {row.differences[pair].test for row in rows for pair in row.differences}
    used = {
        "mcnemar-exact": "the exact McNemar test for right-or-wrong items",
        "paired-bootstrap": "a paired bootstrap",
    }
    legend = Paragraph(
        "“Better” and “worse” are said only where the 95 % interval of the paired difference excludes zero. p is from "
        f"{listed(used[test] for test in sorted(tests))}; p (Holm) allows for having looked at several tasks at once. "
        "Retention is (score − chance) / (teacher − chance): 100 % is the teacher, 0 % is guessing."
    )
    return [*(difference_table(rows, *pair, wanted[pair]) for pair in pairs), legend]


def _warnings(run: Run, comparison: Comparison) -> list[Block]:
    lines = [f"Left out of the tables, because settings differ: {reason}" for reason in comparison.refused]
    for role, evaluation in run.evaluations.items():
        if run.plan and role != "teacher" and evaluation.num_layers != len(run.plan.keep):
            lines.append(
                f"The evaluation of {role} is of a model with {evaluation.num_layers} layers, but the plan keeps "
                f"{len(run.plan.keep)}; it belongs to another plan. Run `shoal eval` again."
            )
    few = [row for row in comparison.rows if row.any_score.n < FEW_ITEMS]
    if few:
        lines.append(
            f"Fewer than {FEW_ITEMS} items, so the intervals are wide: {listed(task_name(row) for row in few)}."
        )
    lines += [text for row in comparison.rows if (text := _detectable(row))]
    return [Bullets(tuple(lines))] if lines else []


def _detectable(row: Row) -> str | None:
    """What an unclear distilled-against-pruned comparison could have shown at all."""
    if row.verdict("pruned", "distilled") != "unclear" or not row.has_signal:
        return None
    least = minimal_detectable_difference(row.scores["pruned"], row.scores["distilled"])
    amount = f"{100 * least:.1f} points" if is_share(row.any_score) else f"{least:.3f}"
    return (
        f"{task_name(row)}: no clear change between pruned and distilled. With {row.any_score.n} items a true change "
        f"of {amount} or more would have shown four times out of five; a smaller one can hide."
    )


def _shared_items(one: Row, other: Row, role: str) -> str:
    same = {item.id for item in one.scores[role].items} == {item.id for item in other.scores[role].items}
    return "the same" if same else "different"


def _clipped(text: str) -> str:
    text = text.strip()
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + " …"
