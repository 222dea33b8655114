"""What speaks against believing a report's numbers: the first thing a careful reader asks, so it is told first."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from shoal.artifacts.evaluation import FEW_ITEMS, LIKELIHOOD_PROTOCOLS, ROLES
from shoal.data.bundled import BUNDLED, BUNDLED_ROWS, NOT_APART
from shoal.formatting import listed
from shoal.stats.paired import minimal_detectable_difference
from shoal.task_words import ABILITIES, task_words

from ..tasks.names import described_tasks, task_folders
from .findings import FEW_ITEMS_MEAN, PAIRS, SIGNAL_SIGMAS, Comparison, Row, is_share, protocol_gaps
from .run import Run
from .wording import MAX_NAMES, named_or_counted, score_words, task_names

HELD_OUT = "python_docs_heldout"
"""The bundled source that belongs to evaluation."""
WIDE_GAP = 0.2
"""Difference in the share kept from which two protocols disagree."""
NEAR_CHANCE = 0.1
"""A teacher whose interval reaches further above chance may be above it: there are too few items."""
OFTEN = 0.2
"""Share of generated texts from which a defect is mentioned."""
RATES = {
    "malformed": ("have no readable answer", "Without a readable answer, which counts as wrong"),
    "repetition": ("end in a loop", "Ending in a loop"),
    "cut_off": ("are cut off", "Cut off by the limit of new tokens"),
}
"""Rate -> the defect in short and in full."""


class Caution(NamedTuple):
    """One thing that a reader has to know before using a number."""

    about: str
    lead: str
    """Sentence that stands alone."""
    more: tuple[str, ...] = ()
    """Sentences on where, how much and why."""


def cautions(run: Run, comparison: Comparison) -> tuple[Caution, ...]:
    """Everything that limits what the numbers show, the most serious first."""
    return (
        *_settings(run, comparison),
        *_overlap(run),
        *_learnt_form(run, comparison.rows),
        *_form(run, comparison.rows),
        *_protocols(comparison.rows),
        *_written_text(comparison.rows),
        *_few_items(comparison.rows),
    )


def _settings(run: Run, comparison: Comparison) -> Iterator[Caution]:
    if refused := comparison.refused:
        count = "One score is" if len(refused) == 1 else f"{len(refused)} scores are"
        yield Caution("Settings differ", f"{count} not in the tables, because the settings differ.", refused)
    if unpaired := comparison.formless:
        lead = "Reworded questions with other items are compared by score alone, not item by item."
        yield Caution("No wording gap", lead, unpaired)
    versions = {
        role: {"dtype": own.provenance.inputs.get("dtype", "not recorded"), **own.provenance.environment}
        for role, own in run.evaluations.items()
    }
    differing: dict[str, str] = {}
    for name in dict.fromkeys(key for made_with in versions.values() for key in made_with):
        values = {role: str(made_with.get(name, "not recorded")) for role, made_with in versions.items()}
        if len(set(values.values())) > 1:
            differing[name.replace("_", " ")] = ", ".join(f"{value} for {role}" for role, value in values.items())
    if differing:
        lead = f"The models were not scored with the same {listed(differing)}."
        yield Caution("Different machines or versions", lead, tuple(f"{k}: {told}." for k, told in differing.items()))


class _Text(NamedTuple):
    """Text that the student comes from."""

    use: str
    called: str
    data: Mapping[str, Any]
    """What is known of it, as in Training.data."""

    @property
    def searched(self) -> str:
        """As much of it as was looked through."""
        searched = self.data.get("tokens_searched_for_overlap")
        return self.called if searched is None else f"the first {searched:,} tokens of {self.called}"


def _overlap(run: Run) -> Iterator[Caution]:
    """Whether text and evaluation items can share content: known for shoal's own, not for others'."""
    if run.training:
        yield from _overlap_of(run, _Text("training", "the training text", run.training.data))
    if run.plan and run.plan.text:
        yield from _overlap_of(run, _Text("calibration", "the text that the changes were fitted to", run.plan.text))


def _overlap_of(run: Run, text: _Text) -> Iterator[Caution]:
    about = f"Overlap of {text.use} and evaluation"
    overlap: Mapping[str, Any] = text.data.get("overlap") or {}
    if HELD_OUT in (text.data.get("sources") or {}):
        told = f"{HELD_OUT}, which is evaluation text, is part of {text.called}: its perplexity has no meaning here."
        yield Caution(about, told)
    found = [
        f"{counts['found']} of {counts['compared']} of {', '.join(task_words(task))}"
        for task, counts in overlap.items()
        if counts["found"]
    ]
    if found:
        lead = f"Evaluation items occur in {text.searched} (13 equal words in a row): {'; '.join(found)}."
        yield Caution(about, lead)
    if unknown := _not_searched(run, text, overlap):
        told = "; ".join(unknown)
        yield Caution(about, f"Not checked for overlap of {text.use} text and evaluation items: {told}.")


def disjointness(run: Run) -> str | None:
    """Why training and evaluation share no items, where that is known; None where it is not, which is a caution."""
    if run.training is None or any(_overlap(run)):
        return None
    text = _Text("training", "the training text", run.training.data)
    if overlap := text.data.get("overlap"):
        return f"No evaluation item of {len(overlap)} tasks occurs in {text.searched} (13 equal words in a row)."
    return (
        "Training and evaluation share no items: a hash of the content puts every fact, word and documentation topic "
        "into the training split or the evaluation split. Texts written by the teacher start from training documents."
    )


def _not_searched(run: Run, text: _Text, searched: Collection[str]) -> list[str]:
    """What nobody knows to be apart: nothing keeps apart sources and tasks that are not shoal's own, and only tasks
    ``searched`` were looked for."""
    tasks = {task.task: task for evaluation in run.evaluations.values() for task in evaluation.tasks}
    perplexity = [source.get("path") for source in (run.recipe or {}).get("eval", {}).get("perplexity_data", [])]
    held_out = bool(perplexity) and set(perplexity) == {HELD_OUT}
    own = {*BUNDLED, *BUNDLED_ROWS, HELD_OUT} - NOT_APART
    # several sources of one name are numbered
    foreign = [name for name in text.data.get("sources") or {} if name.partition(" (")[0] not in own]
    described, _ = described_tasks(task_folders(None))
    bundled = {name for name, (data, _) in described.items() if data.bundled}
    apart = {"perplexity", *bundled} if held_out else bundled
    if searched:  # after that the sources are known, but to tasks that came later, and to running text
        apart, foreign = {*searched} if foreign else {*searched, *apart}, []
    return foreign + [", ".join(score_words(task)) for name, task in tasks.items() if name not in apart]


def _learnt_form(run: Run, rows: Sequence[Row]) -> Iterator[Caution]:
    """A model that beats its teacher in what it was trained on has not become the better model."""
    better = [row for row in rows if row.column in ("in", "") and row.verdict("teacher", "distilled") == "better"]
    if not better:
        return
    sources = (run.training.data.get("sources") or {}) if run.training else {}
    bundled = all(row.column == "in" or (not row.column and row.ability in ABILITIES) for row in better)
    seen = any(name.startswith("ability_texts") for name in sources) and bundled
    count = "one score" if len(better) == 1 else f"{len(better)} scores"
    yield Caution(
        "Better than its teacher",
        f"The distilled model beats its teacher on {count}: it may have learnt the wording of the questions.",
        (
            f"Tasks: {named_or_counted(better)}.",
            f"{'Its' if seen else 'It is not known whether its'} training text has this wording, with other items.",
            "The model answers this wording better than the teacher; that does not show that it can do more.",
        ),
    )


def _form(run: Run, rows: Sequence[Row]) -> Iterator[Caution]:
    """Whether the ability was recovered, as far as reworded questions and public benchmarks show."""
    if "distilled" not in run.evaluations:
        return
    clear = [row for row in rows if row.has_signal and len(row.scores) > 1]
    if any(row.column for row in clear) and not any(row.column in ("reworded", "public") for row in clear):
        yield Caution(
            "No reworded questions and no public benchmark",
            "This run cannot show whether the ability was recovered or the wording of the questions was learnt.",
            ("Add tasks that ask the same items reworded, or a public benchmark.",),
        )
    better = [row for row in clear if row.column not in ("in", "") and row.verdict("teacher", "distilled") == "better"]
    if better:
        gained = [row for row in better if row.verdict("teacher", "control") == "better"]
        told = "A control (eval.control), the teacher after the same training, shows what this text teaches."
        if "control" in run.evaluations:
            gains = f"gained there too: {named_or_counted(gained)}" if gained else "does not clearly gain there"
            told = f"The control (the teacher after the same training) {gains}."
        yield Caution(
            "More than was lost",
            "The distilled model beats its teacher in wordings that its training text does not have: the text taught "
            "the ability itself, so these scores do not measure the loss by pruning.",
            (f"Tasks: {named_or_counted(better)}.", told),
        )
    if learnt := [row for row in clear if row.form and row.form.is_learnt("distilled")]:
        yield Caution(
            "Wording learnt",
            "The distilled model gained more in the trained wording than on the same questions reworded.",
            (f"Tasks: {named_or_counted(learnt)}.", "Rely on the scores when reworded."),
        )


def _few_items(rows: Sequence[Row]) -> Iterator[Caution]:
    silent = [row for row in rows if not row.has_signal]
    unknown = [row for row in silent if row.scores["teacher"].ci_high > row.scores["teacher"].chance + NEAR_CHANCE]
    told = f"The teacher is not {SIGNAL_SIGMAS:.0f} standard errors above chance on "
    ends = ("No conclusion uses these tasks; see “Teacher near chance”.",)
    if at_chance := [row for row in silent if row not in unknown]:
        yield Caution("At chance from the start", f"{told}{named_or_counted(at_chance)}.", ends)
    if unknown:
        lead = f"{told}{named_or_counted(unknown)}. With more items it might be."
        yield Caution("Not shown to be above chance", lead, ends)
    if few := [row for row in rows if row.any_score.n < FEW_ITEMS]:
        lead = f"Fewer than {FEW_ITEMS} items, so {FEW_ITEMS_MEAN}: {named_or_counted(few)}."
        yield Caution("Too few items", lead)
    if hidden := [told for pair in PAIRS if (told := _hidden(rows, *pair))]:
        yield Caution(
            "Too few items for small changes",
            "“No clear change” does not mean no change: these items can show only larger ones.",
            ("Smallest change of each task that these items would show in four of five cases:", *hidden),
        )


def _hidden(rows: Sequence[Row], before: str, after: str) -> str:
    """The smallest change that would have been found, for all that are not clear; empty if all are clear."""
    told = [f"{task_names([row])}: {least}" for row in rows if (least := _detectable(row, before, after)) is not None]
    more = [f"and {len(told) - MAX_NAMES} more tasks"] if len(told) > MAX_NAMES else []
    return f"From {before} to {after}: {'; '.join([*told[:MAX_NAMES], *more])}." if told else ""


def _detectable(row: Row, before: str, after: str) -> str | None:
    """The smallest change that an unclear comparison could have shown; None if it is clear or missing."""
    if row.verdict(before, after) != "unclear" or not row.has_signal:
        return None
    least = minimal_detectable_difference(row.scores[before], row.scores[after])
    if math.isinf(least) or (is_share(row.any_score) and least >= 1):
        return f"none (too few of {row.any_score.n:,} answers changed)"
    size = f"{100 * least:.1f} points" if is_share(row.any_score) else f"{least:.3f} {row.key[2].replace('_', ' ')}"
    return f"{size} ({row.any_score.n:,} items)"


def _protocols(rows: Sequence[Row]) -> Iterator[Caution]:
    told: list[str] = []
    for role in ("pruned", "distilled"):
        gaps = {found[0].ability: found for found in sorted(protocol_gaps(rows, role), key=lambda own: abs(own[2][0]))}
        for likely, written, (gap, *_) in gaps.values():  # the widest of each ability
            # above the teacher under both protocols, neither hides a loss
            if abs(gap) >= WIDE_GAP and min(row.retained[role].value or 0.0 for row in (likely, written)) < 1:
                pair = (likely, written) if gap > 0 else (written, likely)
                kept = [f"{_kept_words(row.retained[role].value or 0.0)} {task_names([row])}" for row in pair]
                told.append(f"The {role} model keeps {kept[0]}, but {kept[1]}.")
    if told:
        lead = "The share kept depends on the protocol: no single number describes the model."
        yield Caution("Protocols disagree", lead, tuple(told))
    asked: dict[str, set[str]] = {}
    for row in rows:
        if row.key[1] != "rolling" and row.higher_is_better:
            asked.setdefault(row.ability, set()).add(row.key[1])
    if one_way := [ability for ability, protocols in asked.items() if protocols <= set(LIKELIHOOD_PROTOCOLS)]:
        yield Caution(
            "No generated text",
            f"{listed(one_way)}: scored by likelihood only.",
            ("A damaged model can still rank options well and be unable to write a usable answer.",),
        )


def _kept_words(value: float) -> str:
    """A share kept inside a sentence: `47 % of`."""
    return "more than all of" if value > 1 else f"{100 * value:.0f} % of".replace("-", "−")


def _written_text(rows: Sequence[Row]) -> Iterator[Caution]:
    """How often texts could not be read, looped or were cut off: every defect once, with all its tasks."""
    told, roles, defects = [], set[str](), []
    for rate, (defect, sentence) in RATES.items():
        by_role: dict[str, list[str]] = {}
        for row in rows:
            for role, score in row.scores.items():
                if score.rates.get(rate, 0.0) >= OFTEN and row.has_signal:
                    by_role.setdefault(role, []).append(f"{100 * score.rates[rate]:.0f} % on {task_names([row])}")
        if by_role:
            roles |= by_role.keys()
            defects.append(defect)
            told.append(f"{sentence}: {'; '.join(f'{role} {listed(own)}' for role, own in by_role.items())}.")
    if told:
        models = f"{listed(role for role in ROLES if role in roles)} {'model' if len(roles) == 1 else 'models'}"
        lead = f"Many texts of the {models} {listed(defects, 'or')}."
        yield Caution("Generated text", lead, tuple(told))
