"""The report's section on drawn texts: pass@k beside greedy, and whether lost answers are demoted or gone."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.artifacts.evaluation import ROLES, TaskScore
from shoal.formatting import interval_text, listed
from shoal.recipe.evaluate import Samples
from shoal.stats.paired import is_binary
from shoal.stats.pass_at import LostAnswers, lost_answers, pass_at_chance

from .document import Block, Paragraph, Section, Table
from .findings import Comparison, Row
from .wording import DASH, score_text, task_name

Scores = Sequence[tuple[Row, dict[str, TaskScore]]]
"""Rows with those of their scores by role whose texts were drawn alike."""


def sampled_section(comparison: Comparison) -> Section | None:
    """pass@k by task and model, and what became of the teacher's right answers; None where no text was drawn.

    Models whose texts were drawn with other settings than the first one's are left out, and named.
    """
    drawn = [(role, row.scores[role]) for role in ROLES for row in comparison.rows if role in row.scores]
    samples = next((score.samples for _, score in drawn if score.samples), None)
    if samples is None:
        return None
    blocks: list[Block] = [Paragraph(_explained(samples))]
    if others := dict.fromkeys(role for role, score in drawn if score.samples not in (None, samples)):
        left_out = f"Left out are {listed(others)}, whose texts were drawn with other settings."
        blocks.append(Paragraph(left_out, warning=True))
    alike = [
        (row, {role: row.scores[role] for role in ROLES if role in row.scores and row.scores[role].samples == samples})
        for row in comparison.rows
    ]
    rows = [(row, scores) for row, scores in alike if scores]
    blocks.append(_pass_table(rows))
    if lost := _lost_table(rows, samples):
        blocks.append(lost)
    return Section("Demoted or gone", tuple(blocks))


def _explained(samples: Samples) -> str:
    return (
        f"Greedy text takes the likeliest token every time. Beside it {samples.n} texts were drawn for every item, at "
        f"temperature {samples.temperature:g} from the likeliest tokens that hold {100 * samples.top_p:g} % of the "
        "probability. pass@k is the chance that at least one of k drawn texts is right. An answer that the teacher's "
        "greedy text has right and another model's has wrong is demoted if at least one of that model's "
        f"{samples.n} texts has it, and gone if none has. Where answers can be guessed, drawn texts hit them by luck: "
        "by guessing alone, as many of the lost answers as the last column says would seem demoted."
    )


def _pass_table(rows: Scores) -> Table:
    """Greedy score and pass@k of every model, with what guessing reaches."""
    body, groups = [], []
    for row, scores in rows:
        first = next(iter(scores.values()))
        lines = [[role.capitalize(), score_text(score), *_passed(score)] for role, score in scores.items()]
        if first.chance:
            chances = (first.chance, *(passed.chance for passed in first.pass_at))
            lines.append(["By guessing", *(f"{100 * chance:.1f} %" for chance in chances)])
        body += map(tuple, lines)
        groups.append((f"{task_name(row)}, {first.n:,} items", len(lines)))
    names = (f"pass@{passed.k}" for passed in next(iter(rows[0][1].values())).pass_at)
    caption = "Greedy text and drawn texts, with 95 % intervals"
    return Table(caption, ("Model", "Greedy", *names), tuple(body), groups=tuple(groups))


def _lost_table(rows: Scores, samples: Samples) -> Table | None:
    """What became of the teacher's right answers; None without a teacher or another model."""
    body, groups = [], []
    for row, scores in rows:
        teacher = row.scores.get("teacher")
        others = {role: score for role, score in scores.items() if role != "teacher"}
        if teacher and is_binary(teacher) and others:
            guessed = pass_at_chance(teacher.chance, samples.n)
            body += [_lost(role, lost_answers(teacher, score), guessed) for role, score in others.items()]
            right = sum(item.score == 1 for item in teacher.items)
            groups.append((f"{task_name(row)}, {right:,} right by the teacher", len(others)))
    caption = "What became of the answers that the teacher has right and the model has not, with 95 % intervals"
    columns = ("Model", "Lost", "Demoted", "Gone", "By guessing")
    return Table(caption, columns, tuple(body), groups=tuple(groups)) if body else None


def _passed(score: TaskScore) -> tuple[str, ...]:
    ends = ((passed.score, passed.ci_low, passed.ci_high) for passed in score.pass_at)
    return tuple(interval_text(values, ".1f", " %", scale=100) for values in ends)


def _lost(role: str, fate: LostAnswers, guessed: float) -> tuple[str, ...]:
    """`("Pruned", "30", "12, 40 % [25, 58]", "18, 60 % [42, 75]", "90 %")`."""
    if not fate.count:
        return (role.capitalize(), "0", DASH, DASH, DASH)
    shares = (fate.share(count) for count in (fate.demoted, fate.gone))
    told = [interval_text((share.value, share.ci_low, share.ci_high), ".0f", " %", scale=100) for share in shares]
    cells = (f"{count:,}, {text}" for count, text in zip((fate.demoted, fate.gone), told, strict=True))
    return (role.capitalize(), f"{fate.count:,}", *cells, f"{100 * guessed:.0f} %")
