"""What `shoal search` found: for the terminal, as search.md with every score, and as a section of the report."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from shoal.artifacts.search import Column, Correlation, HealedPlan, Interval, PlanStanding, Ranking, SearchResult
from shoal.formatting import interval_text, layers_text, listed, signed
from shoal.recipe.edits import in_words, removed_layers
from shoal.recipe.section import as_dict

from .document import Block, Bullets, Code, Paragraph, Section, Table
from .wording import DASH

NOTE = (
    "The first plan was picked by these very items, which flatters its lead a little: score it on other items before "
    "you quote the difference."
)


def search_text(result: SearchResult, *, every_score: bool = False) -> str:
    """Markdown that also reads well as it stands; ``every_score`` adds each plan's score on each task."""
    ranking = result.ranking
    several = f"{len(ranking.plans)} plans, each healed for {result.num_tokens:,} tokens"
    parts = [
        f"# {several}",
        ranked_by(ranking),
        _table(standings(result)),
        "\n".join(f"- {sentence}" for sentence in verdicts(result)),
    ]
    if any(plan.after.likelihood or plan.after.generation for plan in ranking.plans):
        parts += ["## Kept of the teacher's scores above chance, by protocol", _kept(ranking)]
    parts += ["## Before and after the heal: do the rankings agree?", _agreement(ranking)]
    if every_score:
        parts += ["## Every score", _scores(ranking), NOTE]
    parts += [f"## The recipe of {result.winner.name}", f"```yaml\n{recipe_lines(result.winner)}```"]
    return "\n\n".join(parts) + "\n"


def verdicts(result: SearchResult) -> list[str]:
    """What may be concluded, sentence by sentence."""
    ranking = result.ranking
    first, before = ranking.winner_after, ranking.winner_before
    with_items = f"with {ranking.num_items} items"
    if ranking.held:
        lines = [f"The ranking before the heal held at its top: {first} is first before and after it."]
    else:
        noise = "more than noise" if ranking.difference.excludes_zero else "they cannot be told apart"
        lines = [
            f"The ranking before the heal did not hold: {before} was first, {first} is. After the heal {first} is "
            f"{_difference(ranking.difference, ranking)} from {before}: {noise} {with_items}."
        ]
    others = [plan for plan in ranking.plans if plan.name != first]
    close = [plan.name for plan in others if not plan.after.behind.excludes_zero]
    worse = [plan.name for plan in others if plan.after.behind.excludes_zero]
    if worse:
        lines.append(f"Worse than {first} after the heal, by more than noise {with_items}: {listed(worse)}.")
    if close:
        lines.append(f"Cannot be told apart from {first} after the heal {with_items}: {listed(close)}.")
    sizes = sorted({plan.num_layers for plan in result.plans})
    if len(sizes) > 1:
        lines.append(f"The plans leave different numbers of layers ({listed(map(str, sizes))}): size is compared too.")
    same = [plan for plan in result.plans if plan.same_as is not None]
    return lines + [f"{plan.name} comes to the layers of {plan.same_as}, which were healed once." for plan in same]


def recipe_lines(plan: HealedPlan) -> str:
    """The section prune that makes exactly this cut, without measuring anything."""
    inside = removed_layers(plan.edits)
    drop = [layer for layer in plan.drop if layer not in inside]
    edits = [{key: value for key, value in as_dict(edit).items() if value is not None} for edit in plan.edits]
    section = {
        **({"drop": drop} if drop else {}),
        **({"edits": edits} if edits else {}),
    }
    text = yaml.safe_dump({"prune": section}, sort_keys=False, default_flow_style=None, width=120)
    return f"# {plan.reason}\n{text}"


def ranked_by(ranking: Ranking) -> str:
    """What the plans are ranked by, and which tasks are not counted, a sentence a line."""
    measure = "the mean share kept of the teacher's score above chance"
    if ranking.unit == "nats":
        metric = next(column.metric for column in ranking.columns if column.weight)
        measure = f"the mean {metric} (lower is better)"
    columns = [f"{column.task} ({100 * column.weight:.0f} %)" for column in ranking.columns if column.weight]
    silent = [column for column in ranking.columns if column.higher_is_better and column.no_retention]
    lines = [f"Ranked by {measure} over {listed(columns)}, {ranking.num_items} items in all."]
    if all(column.column == "in" for column in ranking.columns if column.weight):
        lines.append("All of it is asked in the form of training text, which a heal lifts before anything else.")
    elif inside := [c.task for c in ranking.columns if c.column == "in" and not (c.weight or c.no_retention)]:
        lines.append(f"Not counted, being asked in the form of training text: {listed(inside)}.")
    lines += [f"Not counted: {column.task}, {column.no_retention}." for column in silent]
    return "\n".join(lines)


def standings(result: SearchResult) -> list[list[str]]:
    """Rows of every plan's standing, the best after the heal first; the first row holds the columns' names."""
    ranking = result.ranking
    plans = {plan.name: plan for plan in result.plans}
    header = ["rank", "rank before", "plan", "drops", "mean before", "mean after", "behind the first"]
    return [header, *(_standing(plan, plans[plan.name], ranking) for plan in ranking.plans)]


def _kept(ranking: Ranking) -> str:
    rows = [["plan", "likelihood before", "after", "generated text before", "after"]]
    for plan in ranking.plans:
        kept = (plan.before.likelihood, plan.after.likelihood, plan.before.generation, plan.after.generation)
        rows.append([plan.name, *map(_percent, kept)])
    return _table(rows)


def _standing(plan: PlanStanding, healed: HealedPlan, ranking: Ranking) -> list[str]:
    before, after = plan.before, plan.after
    changed = ", ".join([*([layers_text(healed.drop)] if healed.drop else []), *map(in_words, healed.edits)])
    first = plan.name == ranking.winner_after
    return [
        *(str(after.rank), str(before.rank), plan.name, changed),
        *(_value(before.value, ranking), _value(after.value, ranking)),
        DASH if first else _difference(after.behind, ranking),
    ]


def _agreement(ranking: Ranking) -> str:
    rows = [(name, ranks) for name, ranks in ranking.agreement.items() if ranks.kendall is not None]
    rows += [(column.task, column.agreement) for column in ranking.columns]
    return _table([["ranked by", "Kendall's tau", "Spearman's rho"], *([name, *_both(ranks)] for name, ranks in rows)])


def _both(correlation: Correlation) -> list[str]:
    return [DASH if value is None else signed(value, 2) for value in (correlation.kendall, correlation.spearman)]


def _scores(ranking: Ranking) -> str:
    columns = {column.task: column for column in ranking.columns}
    rows = [["task", "n", "teacher", "plan", "before", "after", "kept before", "kept after"]]
    for task, column in columns.items():
        for plan in ranking.plans:
            score = next(score for score in plan.scores if score.task == task)
            rows.append(
                [
                    *(task, str(column.n), _score(column.teacher, column), plan.name),
                    *(_score(score.before, column), _score(score.after, column)),
                    *(_percent(score.kept_before), _percent(score.kept_after)),
                ]
            )
    return _table(rows)


def _score(score: Interval, column: Column) -> str:
    return _percent(score) if column.higher_is_better and score.ci_high <= 1 else _plain(score)


def _value(value: Interval, ranking: Ranking) -> str:
    return _percent(value) if ranking.unit == "retention" else _plain(value)


def _difference(interval: Interval, ranking: Ranking) -> str:
    values = (interval.value, interval.ci_low, interval.ci_high)
    return (
        interval_text(values, "+.3f") if ranking.unit == "nats" else interval_text(values, "+.1f", " points", scale=100)
    )


def _percent(interval: Interval | None) -> str:
    if interval is None:
        return DASH
    return interval_text((interval.value, interval.ci_low, interval.ci_high), ".1f", " %", scale=100)


def _plain(interval: Interval) -> str:
    return interval_text((interval.value, interval.ci_low, interval.ci_high), ".3f")


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def search_section(result: SearchResult | None) -> Section | None:
    """The plans as they rank before and after the heal, what may be concluded, and the recipe of the first."""
    if result is None:
        return None
    header, *rows = standings(result)
    caption = f"{len(result.ranking.plans)} plans, each healed for {result.num_tokens:,} tokens, best first"
    table = Table(
        caption,
        ("Plan", *(column.capitalize() for column in (*header[:2], *header[3:]))),
        tuple((row[2], *row[:2], *row[3:]) for row in rows),
        frozenset({0, 3}),
    )
    blocks: list[Block] = [
        Paragraph(ranked_by(result.ranking).replace("\n", " ")),
        table,
        Bullets(tuple(verdicts(result))),
        Paragraph(NOTE),
        Code(recipe_lines(result.winner), "yaml", f"The recipe of {result.winner.name}"),
    ]
    return Section("What the search over plans found", tuple(blocks))
