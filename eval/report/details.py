"""The report's sections on how it was done: the cut, training, costs, settings, versions, how to repeat it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from shoal.artifacts.artifact import Artifact, Json
from shoal.formatting import bytes_text, duration_text, layers_text, listed
from shoal.redaction import redacted

from .cautions import disjointness
from .document import Block, Code, Picture, Section, Table
from .findings import Run
from .wording import DASH, score_words

TERMS = (
    "Decoder layer: one of the equal blocks (attention and MLP) that a language model stacks; counted from 0.",
    "Teacher: the intact model. Pruned: the teacher without the cut layers, before any training. Distilled: the pruned "
    "model after it was trained to predict what the teacher predicts.",
    "Control: the uncut teacher after the same training as the cut model: what it learnt, the text teaches.",
    "Trained form: wording and carrier of questions that training text may have; the items are others. Twin form: the "
    "same items in wordings and carriers that no training text has. Form gap: the former score minus the latter.",
    "Importance: how much a layer changes what passes through it. Higher means: keep.",
    "Chance: the score that guessing reaches. Retention: the share of the teacher's score above chance that is kept.",
    "Nats per token say how badly text is predicted; perplexity is exp(nats). Lower is better.",
    "Paired difference: the change between two models over the same items, which takes out the luck of the draw.",
)


def cut_section(run: Run, pictures: Sequence[Picture]) -> Section:
    """Which layers were dropped, why, and the figures of what layers are worth."""
    blocks: list[Block] = []
    if run.plan is None:
        blocks.append("No plan has been made yet: `shoal prune` fills this section.")
    else:
        drop = run.plan.drop
        if drop:
            blocks.append(f"Cut: layers {layers_text(drop)}. Kept: layers {layers_text(run.plan.keep)}.")
        if run.plan.changes:
            blocks.append(f"Changed: {'; '.join(change.words for change in run.plan.changes)}.")
        blocks.append(f"How they were chosen: {run.plan.reason}")
    if run.importance is None:
        blocks.append("Importance was not measured in this run, so there is no figure of it.")
        return Section("Which layers were cut, and why", tuple(blocks))
    blocks += pictures
    if run.importance.layers:
        dropped = set(run.plan.drop) if run.plan else set()
        metrics = tuple(run.importance.layers)
        rows = tuple(
            (
                str(layer),
                *(f"{run.importance.layers[metric][layer]:.4f}" for metric in metrics),
                "cut" if layer in dropped else "kept",
            )
            for layer in range(run.importance.num_layers)
        )
        caption = f"Importance of every layer over {run.importance.num_tokens:,} tokens"
        columns = ("Layer", *(metric.replace("_", " ") for metric in metrics), "Plan")
        blocks.append(Table(caption, columns, rows, frozenset({0, len(metrics) + 1}), folded=True))
    return Section("Which layers were cut, and why", tuple(blocks))


def training_section(run: Run, pictures: Sequence[Picture]) -> Section:
    """Loss curves, text and cost of the distillation."""
    training = run.training
    if training is None:
        return Section("Training", (("The cut model was not distilled in this run."),))
    rate = training.num_tokens / training.seconds if training.seconds > 0 else 0.0
    blocks: list[Block] = [
        (
            f"{training.num_steps:,} optimizer steps over {training.num_tokens:,} tokens in "
            f"{duration_text(training.seconds)} ({rate:,.0f} tokens/s); peak memory "
            f"{bytes_text(training.peak_memory_bytes)} in the largest process."
        )
    ]
    blocks += pictures
    blocks += _data_blocks(training.data)
    if kept_apart := disjointness(run):
        blocks.append(kept_apart)
    return Section("Training", tuple(blocks))


def costs_section(run: Run) -> Section | None:
    """What the run took: time, tokens and memory of every stage that recorded them; None where none did."""
    rows = []
    if training := run.training:
        cells = (duration_text(training.seconds), f"{training.num_tokens:,}", bytes_text(training.peak_memory_bytes))
        rows.append(("Distilling", *cells))
    for role, scored in run.evaluations.items():
        kept = (
            f"; {scored.num_kept:,} of {scored.num_requests:,} answers were kept from before" if scored.num_kept else ""
        )
        rows.append((f"Scoring {role}", duration_text(scored.seconds) + kept, DASH, DASH))
    if not rows:
        return None
    caption = f"What the run took; {DASH} = not recorded"
    return Section("Costs", (Table(caption, ("Stage", "Time", "Tokens read", "Peak memory"), tuple(rows)),))


def terms_section() -> Section:
    """The words of the report, a sentence each."""
    return Section("Words used here", (TERMS,))


def settings_section(run: Run) -> Section:
    """The exact recipe, secrets hidden, and the versions it ran with."""
    blocks: list[Block] = [*filter(None, [precision_text(run.numerics)])]
    if run.recipe is None:
        blocks.append("run.json, which holds the recipe, is not in the run directory.")
    else:
        blocks.append(Code(_yaml(run.recipe), "yaml", "The recipe, with every default filled in"))
    if run.training and run.training.settings:
        blocks.append(
            Code(_yaml(run.training.settings), "yaml", "Training arguments and DeepSpeed configuration, as resolved")
        )
    if names := _identifiers(run):
        blocks.append(names)
    made = {name: artifact.provenance for name, artifact in _results(run).items()}
    told = {
        name: {"made": own.created, "fingerprint": own.fingerprint, **own.environment} for name, own in made.items()
    }
    blocks.append(Code(_yaml(told), "yaml", "Results this report was made from: when, on which machine and versions"))
    return Section("Exact settings and versions", tuple(blocks))


def precision_text(numerics: Mapping[str, Any]) -> str:
    """In which precision the run was made and why, and whether its sizes followed; empty where it is not recorded."""
    if not numerics:
        return ""
    scored, trained = numerics.get("dtype"), numerics.get("precision")
    told = [f"models are measured and evaluated in {scored}"] if scored else []
    if trained:
        told.append(f"training computes {'as DeepSpeed is configured' if trained == 'auto' else f'in {trained}'}")
    device = f", on {numerics['device']}" if numerics.get("device") else ""
    reasons = [str(numerics.get(key) or "").strip().rstrip(".") for key in ("reason", "size_reason")]
    why, sizes = (": " + reasons[0] if reasons[0] else ""), (f" Sizes: {reasons[1]}." if reasons[1] else "")
    return f"Numeric precision: {listed(told)}{device}{why}.{sizes}"


def _results(run: Run) -> dict[str, Artifact]:
    """Every result of the run, by its file."""
    results = {
        "importance.json": run.importance,
        "plan.json": run.plan,
        "distill.json": run.training,
        **{f"eval/{role}.json": evaluation for role, evaluation in run.evaluations.items()},
        "eval/speed.json": run.speed,
    }
    return {name: artifact for name, artifact in results.items() if artifact is not None}


def _data_blocks(data: dict[str, Json]) -> list[Block]:
    """Counts by source as a table; everything else that training recorded about its data as it was written."""
    sources: Any = data.get("sources") or {}
    blocks: list[Block] = []
    if sources:
        fields = list(dict.fromkeys(field for counts in sources.values() for field in counts))
        rows = tuple((name, *(_count(counts.get(field)) for field in fields)) for name, counts in sources.items())
        blocks.append(Table("Training text by source", ("Source", *(f.replace("_", " ") for f in fields)), rows))
    if others := {name: value for name, value in data.items() if name != "sources"}:
        blocks.append(Code(_yaml(others), "yaml", "Searches in the training text, and what else is recorded of it"))
    return blocks


def _yaml(content: Any) -> str:
    return yaml.safe_dump(redacted(content), sort_keys=False, allow_unicode=True, width=100)


def _identifiers(run: Run) -> Table | None:
    """What every task is called in the recipe, and what makes its prompts; None where none was evaluated."""
    tasks = {task.key: task for evaluation in run.evaluations.values() for task in evaluation.tasks}
    rows = tuple(
        (", ".join(score_words(task)), *task.key, task.version, str(task.num_fewshot)) for task in tasks.values()
    )
    columns = ("Task", "Name in the recipe", "Protocol", "Metric", "Version", "Examples")
    return Table("Tasks by their names", columns, rows, frozenset(range(5)), folded=True) if rows else None


def _count(value: Json) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return DASH if value is None else str(value)
