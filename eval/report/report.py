"""The report of a run: one self-contained HTML page, the same in Markdown, and its figures, after any stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.artifacts.artifact import Provenance
from shoal.artifacts.evaluation import Evaluation
from shoal.atomic_files import write_text
from shoal.figures.atlas import atlas_figure
from shoal.figures.layers import depth_figure, importance_figure
from shoal.figures.scores import MAX_TASKS, Ladder, before_after_figure, ladders, level_figure
from shoal.figures.training import loss_series, training_figure
from shoal.formatting import listed
from shoal.stats.paired import SIGNIFICANT

from .cautions import cautions, disjointness
from .costs import costs_table, importance_table, size_table, sources_table, speed_table
from .findings import SIGNAL_SIGMAS, Comparison, compare, with_comparable_scores
from .headline import board, facts, headline
from .page import Picture, picture, render
from .run import Run, read_run
from .tables import (
    difference_tables,
    flips,
    form_table,
    gap_table,
    identifier_table,
    level_tables,
    reach,
    score_table,
    silent_table,
    written_table,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    NamedFigure = tuple[str, Figure, str, str]
    """Name of the file, figure, title, and what it shows."""

FIGURES_DIR = "figures"
FIGURES = {"before_after", "levels", "importance", "depth", "runs", "atlas", "training"}
TESTS = {"mcnemar-exact": "the exact McNemar test for right-or-wrong items", "paired-bootstrap": "a paired bootstrap"}


def write_report(run_dir: Path) -> Path:
    """The path of report.html, written with report.md and figures/ from whatever the run directory holds.

    Raises:
        UserError: there is nothing to report, an artifact cannot be read, or the disk is full.
    """
    run = read_run(run_dir)
    comparison = compare(run)
    told = contents(run, comparison, draw_figures(with_comparable_scores(run, comparison)))
    write_text(run_dir / "report.md", render("report", "md", **told))
    path = run_dir / "report.html"
    write_text(path, render("report", "html", **told))
    return path


def contents(run: Run, comparison: Comparison, pictures: Mapping[str, Picture]) -> dict[str, Any]:
    """What the template of the report tells; what is absent is said there to be absent."""
    rows, comparable = comparison.rows, with_comparable_scores(run, comparison)
    families = ladders(list(comparable.evaluations.values()))
    tests = {row.differences[pair].test for row in rows for pair in row.differences}
    return {
        "run": run,
        "pictures": pictures,
        "headline": headline(run, comparison),
        "board": board(run, comparison),
        "facts": facts(run),
        "cautions": cautions(run, comparison),
        "forms": form_table(comparison),
        "scores": score_table(run, rows),
        "differences": difference_tables(rows),
        "tests": listed(TESTS[test] for test in sorted(tests)),
        "significant": f"{SIGNIFICANT:g}",
        "above": any(row.verdict("teacher", "distilled") == "better" for row in rows),
        "levels": level_tables(families),
        "reach": [reach(own) for own in families if next(iter(own.scores.values()))[0].higher_is_better],
        "silent": silent_table(comparison),
        "sigmas": f"{SIGNAL_SIGMAS:.0f}",
        "gaps": gap_table(rows),
        "written": written_table(rows),
        "importance": run.importance and importance_table(run.importance, run.plan.drop if run.plan else ()),
        "sources": run.training and sources_table(run.training),
        "apart": disjointness(run),
        "flips": flips(comparison),
        "size": size_table(run),
        "speed": run.speed and speed_table(run.speed),
        "costs": costs_table(run),
        "precision": _precision(run.numerics),
        "identifiers": identifier_table(run),
        "made": {name: _made(artifact.provenance) for name, artifact in run.results.items()},
    }


def _made(provenance: Provenance) -> dict[str, Any]:
    return {"made": provenance.created, "fingerprint": provenance.fingerprint, **provenance.environment}


def _precision(numerics: Mapping[str, Any]) -> str:
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


def draw_figures(run: Run) -> dict[str, Picture]:
    """The run's figures by name, saved as SVG and PNG under figures/ and ready to stand in a page."""
    drawn = chain(_score_figures(run), _layer_figures(run), _training_figures(run))
    pictures = {
        name: picture(run.folder, f"{FIGURES_DIR}/{name}", figure, title, text) for name, figure, title, text in drawn
    }
    for name in FIGURES - pictures.keys():  # of results that are no longer there; a card would show them
        for suffix in ("svg", "png"):
            (run.folder / FIGURES_DIR / f"{name}.{suffix}").unlink(missing_ok=True)
    return pictures


def _score_figures(run: Run) -> Iterator[NamedFigure]:
    roles = list(run.evaluations.values())
    families = ladders(roles)
    alone = [_without(families, evaluation) for evaluation in roles]
    single = alone if any(evaluation.tasks for evaluation in alone) else roles
    if count := len({(task.task, task.protocol, task.metric) for evaluation in single for task in evaluation.tasks}):
        which = "every task" if count <= MAX_TASKS else f"the first {MAX_TASKS} of {count} tasks"
        yield (
            "before_after",
            before_after_figure(single),
            "Scores before and after",
            f"Each mark is a score and its bar the 95 % interval, by ability, for {which}; a dashed tick is "
            f"chance. The numbers are in the table below{', families in the next figure' if families else ''}.",
        )
    if families:
        yield (
            "levels",
            level_figure(families),
            "Score against level",
            "Scores with 95 % intervals by level: steps of reasoning, pairs of a look-up, or what else the family "
            "counts. A dashed line is chance.",
        )


def _without(families: Sequence[Ladder], evaluation: Evaluation) -> Evaluation:
    """The evaluation without the tasks of these families."""
    levelled = {(score.task, score.protocol) for ladder in families for own in ladder.scores.values() for score in own}
    tasks = tuple(task for task in evaluation.tasks if (task.task, task.protocol) not in levelled)
    return replace(evaluation, tasks=tasks)


def _layer_figures(run: Run) -> Iterator[NamedFigure]:
    importance, drop = run.importance, run.plan.drop if run.plan else ()
    if run.plan:
        fits = importance and importance.num_layers == run.plan.num_layers
        fitting = importance if fits else None
        text = "Layers from the first, on top, to the last; those that were cut stand out of the stack, hatched."
        if fitting:
            text += (
                " Beside each layer its importance by column, every column on its own scale: longer means keep. "
                "Columns by which layers were chosen come first. An arrow ends a bar that reaches far beyond the "
                "others, a frame marks a layer without which the task is significantly worse."
            )
        yield "depth", depth_figure(run.plan, fitting), "The stack of layers and what was taken out of it", text
    if importance and (importance.layers or importance.runs):
        yield (
            "importance",
            importance_figure(importance),
            "Importance of the layers",
            "Bars: importance of each layer. Heat map, where there is one: importance of every run of neighbouring "
            "layers, by its first layer and its length.",
        )
    if run.plan and importance and importance.runs:
        yield (
            "runs",
            importance_figure(replace(importance, layers={}), drop),
            "Importance of runs of layers",
            "Importance of every run of neighbouring layers, by its first layer and its length; a frame marks the "
            "cut where it is one run.",
        )
    if importance and importance.atlas:
        yield (
            "atlas",
            atlas_figure(importance, drop),
            "What every layer is worth, by ability and protocol",
            "Each row is a layer, each column a metric or a task under one protocol; the panels below show what is "
            "left of every task without each layer, with 95 % intervals. Layers without which a task is "
            "significantly worse are framed.",
        )


def _training_figures(run: Run) -> Iterator[NamedFigure]:
    if run.training and loss_series(run.training):
        yield (
            "training",
            training_figure(run.training),
            "Training curves",
            "By optimizer step: the loss and each of its terms, held-out text and tasks where they were scored on "
            "the way, and the learning rate.",
        )
