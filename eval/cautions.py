"""What speaks against believing a report's numbers: the first thing a careful reader asks, so it is told first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from shoal.data import BUNDLED, TEACHER_TEXT
from shoal.recipe import CONFIGS_DIR

from .document import Cautions, Paragraph, Section
from .findings import FEW_ITEMS, LIKELIHOOD_PROTOCOLS, SIGNAL_SIGMAS, Comparison, Row, Run, is_share
from .sections import fair_gaps
from .statistics import minimal_detectable_difference
from .wording import listed, task_name

HELD_OUT = "python_docs_heldout"
"""The bundled source that belongs to evaluation."""
WIDE_GAP = 0.2
"""Difference in retention from which two protocols are said to disagree."""
NEAR_CHANCE = 0.1
"""A teacher whose interval reaches further above chance is not said to be at chance: too few items tell."""
OFTEN = 0.2
"""Share of generated texts from which a defect of them is worth a word."""
MAX_NAMES = 8
RATES = {
    "malformed": "held no answer that could be read, which counts as wrong",
    "repetition": "ended in a loop",
    "cut_off": "were cut off by the limit of new tokens",
}
PAIRS = (("teacher", "pruned"), ("pruned", "distilled"), ("teacher", "distilled"))
Caution = tuple[str, str]
"""What it is about, what it means."""


def cautions_section(run: Run, comparison: Comparison) -> Section:
    """Everything that was found to speak against the numbers, or that nothing was."""
    found = (
        *_settings(run, comparison),
        *_overlap(run),
        *_few_items(comparison.rows),
        *_protocols(comparison.rows),
        *_written_text(comparison.rows),
    )
    title = "Read with care"
    if found:
        return Section(title, (Cautions(found),))
    text = (
        "Nothing was found of what is looked for: other settings or versions, training text that holds evaluation "
        "items, too few items, tasks at chance, protocols that disagree, generated text without a readable answer."
    )
    return Section(title, (Paragraph(text),))


def _settings(run: Run, comparison: Comparison) -> Iterator[Caution]:
    for reason in comparison.refused:
        yield "Protocol mismatch", f"Left out of the tables, because settings differ: {reason}"
    for role, evaluation in run.evaluations.items():
        if run.plan and role != "teacher" and evaluation.num_layers != len(run.plan.keep):
            yield (
                "Another plan",
                f"The evaluation of {role} is of a model with {evaluation.num_layers} layers, but the plan keeps "
                f"{len(run.plan.keep)}; it belongs to another plan. Run `shoal eval` again.",
            )
    versions = {role: evaluation.provenance.environment for role, evaluation in run.evaluations.items()}
    fields = dict.fromkeys(field for environment in versions.values() for field in environment)
    for field in fields:
        values = {role: str(environment.get(field, "not recorded")) for role, environment in versions.items()}
        if len(set(values.values())) > 1:
            told = ", ".join(f"{value} for {role}" for role, value in values.items())
            yield "Different machines or versions", f"The models were scored with {field.replace('_', ' ')} {told}."


def _overlap(run: Run) -> Iterator[Caution]:
    """Whether training text and evaluation items can share content: known for shoal's own, not for others'."""
    if run.training is None:
        return
    data, about = run.training.data, "Overlap of training and evaluation"
    if HELD_OUT in (data.get("sources") or {}):
        yield about, f"Training read {HELD_OUT}, which is evaluation text: perplexity on it shows nothing here."
    elif overlap := data.get("overlap"):
        if found := {task: one["found"] for task, one in overlap.items() if one["found"]}:
            told = ", ".join(f"{count} of {overlap[task]['compared']} of {task}" for task, count in found.items())
            yield about, f"Evaluation items were found in {_searched(run)}, by 13 words in succession: {told}."
    elif foreign := _foreign(run):
        yield about, f"It was not checked whether training text and evaluation items overlap for: {listed(foreign)}."


def disjointness(run: Run) -> str | None:
    """Why training and evaluation share no items, where that is known; None where it is not, which is a caution."""
    if run.training is None or any(_overlap(run)):
        return None
    if overlap := run.training.data.get("overlap"):
        return f"No evaluation item of {len(overlap)} tasks was found in {_searched(run)}, by 13 words in succession."
    return (
        "Training and evaluation items are disjoint: a hash of its content puts every fact, word and documentation "
        "topic into one of two splits; training draws from the one, evaluation from the other. What the teacher wrote "
        "itself starts from training documents."
    )


def _searched(run: Run) -> str:
    assert run.training is not None
    searched = run.training.data.get("tokens_searched_for_overlap")
    return "the training text" if searched is None else f"the first {searched:,} tokens of the training text"


def _foreign(run: Run) -> list[str]:
    """Sources and tasks that are not shoal's own, so that nothing keeps them apart."""
    assert run.training is not None
    tasks = {task.task: task for evaluation in run.evaluations.values() for task in evaluation.tasks}
    perplexity = [source.get("path") for source in (run.recipe or {}).get("eval", {}).get("perplexity_data", [])]
    held_out = bool(perplexity) and set(perplexity) == {HELD_OUT}
    foreign = [name for name in run.training.data.get("sources") or {} if name not in (*BUNDLED, TEACHER_TEXT)]
    return foreign + [
        name
        for name, task in tasks.items()
        if not (held_out if task.protocol == "rolling" else (CONFIGS_DIR / "tasks" / f"{name}.yaml").is_file())
    ]


def _few_items(rows: Sequence[Row]) -> Iterator[Caution]:
    about = "Too few items"
    if few := [row for row in rows if row.any_score.n < FEW_ITEMS]:
        yield about, f"Fewer than {FEW_ITEMS} items, so the intervals are wide: {_names(few)}."
    for before, after in PAIRS:
        hidden = [(row, least) for row in rows if (least := _detectable(row, before, after)) is not None]
        if hidden:
            told = "; ".join(
                f"{task_name(row)} ({row.any_score.n:,} items) {least}" for row, least in hidden[:MAX_NAMES]
            )
            more = f"; and so on for {len(hidden) - MAX_NAMES} more" if len(hidden) > MAX_NAMES else ""
            yield (
                about,
                f"No clear change from {before} to {after} does not mean that there is none. What a true change must "
                f"be to show, taken alone, four times out of five: {told}{more}. A smaller one can hide.",
            )
    silent = [row for row in rows if not row.has_signal]
    unknown = [row for row in silent if row.scores["teacher"].ci_high > row.scores["teacher"].chance + NEAR_CHANCE]
    told = f"The intact teacher is not {SIGNAL_SIGMAS:.0f} standard errors above chance on "
    ends = "No conclusion rests on that; see “No signal here”."
    if at_chance := [row for row in silent if row not in unknown]:
        yield "At chance from the start", f"{told}{_names(at_chance)}. {ends}"
    if unknown:
        yield (
            "Not shown to be above chance",
            f"{told}{_names(unknown)}, but with so few items it may be well above it. {ends}",
        )


def _detectable(row: Row, before: str, after: str) -> str | None:
    """What an unclear comparison could have shown at all; None where it is clear or not there."""
    if row.verdict(before, after) != "unclear" or not row.has_signal:
        return None
    least = minimal_detectable_difference(row.scores[before], row.scores[after])
    if math.isinf(least) or (is_share(row.any_score) and least >= 1):
        return "cannot show any"
    return f"{100 * least:.1f} points" if is_share(row.any_score) else f"{least:.3f} {row.key[2].replace('_', ' ')}"


def _protocols(rows: Sequence[Row]) -> Iterator[Caution]:
    for role in ("pruned", "distilled"):
        widest: dict[str, tuple[Row, Row, float]] = {}
        for found in fair_gaps(rows, role):
            ability, gap = found[0].ability, found[2]
            if abs(gap) >= WIDE_GAP and abs(gap) > abs(widest.get(ability, found)[2] if ability in widest else 0):
                widest[ability] = found
        for likely, written, gap in widest.values():
            more, less = (likely, written) if gap > 0 else (written, likely)
            kept = [f"{100 * (row.retained[role].value or 0.0):.0f} %".replace("-", "−") for row in (more, less)]
            yield (
                "Protocols disagree",
                f"Of {likely.ability} the {role} model keeps {kept[0]} by {task_name(more)} and {kept[1]} by "
                f"{task_name(less)}: neither number alone tells what it can do.",
            )
    asked: dict[str, set[str]] = {}
    for row in rows:
        if row.key[1] != "rolling" and row.higher_is_better:
            asked.setdefault(row.ability, set()).add(row.key[1])
    if one_way := [ability for ability, protocols in asked.items() if protocols <= set(LIKELIHOOD_PROTOCOLS)]:
        yield (
            "Never asked to write",
            f"{listed(one_way)}: scored by likelihood only. A damaged model can still rank options well while it no "
            "longer writes a usable answer.",
        )


def _written_text(rows: Sequence[Row]) -> Iterator[Caution]:
    for rate, what in RATES.items():
        often: dict[str, list[tuple[float, Row]]] = {}
        for row in rows:
            for role, score in row.scores.items():
                if score.rates.get(rate, 0.0) >= OFTEN and row.has_signal:
                    often.setdefault(role, []).append((score.rates[rate], row))
        for role, found in often.items():
            most, row = max(found, key=lambda one: one[0])
            most_text = f"{100 * most:.0f} % of the texts of {role}"
            others = f", and many on {len(found) - 1} other tasks" if len(found) > 1 else ""
            yield "Generated text", f"On {task_name(row)} {most_text} {what}{others}."


def _names(rows: Sequence[Row]) -> str:
    names = [task_name(row) for row in rows]
    more = [f"{len(names) - MAX_NAMES} more"] if len(names) > MAX_NAMES else []
    return listed([*names[:MAX_NAMES], *more])
