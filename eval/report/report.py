"""The report of a run: one self-contained HTML page, the same in Markdown, and its figures, after any stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.artifacts.evaluation import Scores
from shoal.atomic_files import write_json, write_text
from shoal.figures.atlas import atlas_figure
from shoal.figures.layers import importance_figure
from shoal.figures.scores import MAX_TASKS, Ladder, before_after_figure, ladders, level_figure
from shoal.figures.training import loss_series, training_figure
from shoal.formatting import listed
from shoal.stats.paired import SIGNIFICANT

from . import tables
from .cautions import cautions, disjointness
from .costs import costs_table, importance_table, size_table, sources_table, speed_table
from .findings import FEW_CHANGED_MEAN, SIGNAL_SIGMAS, Comparison, compare, results, with_comparable_scores
from .headline import board, facts, headline
from .page import Picture, picture, render
from .run import Run, read_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES_DIR = "figures"
FIGURES = {"before_after", "levels", "importance", "atlas", "training"}
TESTS = {
    "mcnemar-exact": "the exact McNemar test for right-or-wrong items",
    "paired-t": "a paired t-test that allows for skew",
}


def write_report(run_dir: Path) -> Path:
    """The path of report.html, written with report.md, results.json and figures/ from whatever the run directory holds.

    Raises:
        UserError: there is nothing to report, an artifact cannot be read, or the disk is full.
    """
    run = read_run(run_dir)
    comparison = compare(run)
    told = contents(run, comparison, draw_figures(with_comparable_scores(run, comparison)))
    write_json(run_dir / "results.json", results(run, comparison, told["headline"]))
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
        "forms": tables.form_table(comparison),
        "scores": tables.score_table(run, rows),
        "differences": tables.difference_tables(rows),
        "tests": listed(TESTS[test] for test in sorted(tests)),
        "significant": f"{SIGNIFICANT:g}",
        "few_changed": FEW_CHANGED_MEAN if any(c.few_changed for row in rows for c in row.differences.values()) else "",
        "above": any(row.verdict("teacher", "distilled") == "better" for row in rows),
        "most_drawn": MAX_TASKS,
        "drawn_tasks": len({task.key for own in _outside(families, comparable) for task in own.tasks}),
        "levels": tables.level_tables(families),
        "reach": [tables.reach(own) for own in families if next(iter(own.scores.values()))[0].higher_is_better],
        "silent": tables.silent_table(comparison),
        "sigmas": f"{SIGNAL_SIGMAS:.0f}",
        "gaps": tables.gap_table(rows),
        "written": tables.rates_table(rows, "Generated texts, with 95 % intervals", of_options=False),
        "sure": tables.rates_table(rows, "Confidence in the chosen options", of_options=True),
        "importance": run.importance and importance_table(run.importance, run.plan.drop if run.plan else ()),
        "sources": run.training and sources_table(run.training),
        "apart": disjointness(run),
        "flips": tables.flips(comparison),
        "size": size_table(run),
        "speed": run.speed and speed_table(run.speed),
        "costs": costs_table(run),
        "identifiers": tables.identifier_table(run),
        "made": {
            name: {"made": made.created, "fingerprint": made.fingerprint, **made.environment}
            for name, made in ((name, artifact.provenance) for name, artifact in run.results.items())
        },
    }


def draw_figures(run: Run) -> dict[str, Picture]:
    """The run's figures by name, saved as SVG and PNG under figures/ and ready to stand in a page."""
    families = ladders(list(run.evaluations.values()))
    figures = {"levels": level_figure(families)} if families else {}
    if any(own.tasks for own in _outside(families, run)):
        figures["before_after"] = before_after_figure(_outside(families, run))
    figures |= _layer_figures(run)
    if run.training and loss_series(run.training):
        figures["training"] = training_figure(run.training)
    pictures = {name: picture(run.folder, f"{FIGURES_DIR}/{name}", figure) for name, figure in figures.items()}
    for name in FIGURES - pictures.keys():  # of results that are no longer there; a card would show them
        for suffix in ("svg", "png"):
            (run.folder / FIGURES_DIR / f"{name}.{suffix}").unlink(missing_ok=True)
    return pictures


def _outside(families: Sequence[Ladder], run: Run) -> list[Scores]:
    """The evaluations without the tasks of these families, which have a figure of their own; whole where none is."""
    levelled = {(score.task, score.protocol) for ladder in families for own in ladder.scores.values() for score in own}
    roles = list(run.evaluations.values())
    alone = [
        replace(own, tasks=tuple(task for task in own.tasks if (task.task, task.protocol) not in levelled))
        for own in roles
    ]
    return alone if any(own.tasks for own in alone) else roles


def _layer_figures(run: Run) -> dict[str, Figure]:
    importance, drop = run.importance, run.plan.drop if run.plan else ()
    figures: dict[str, Figure] = {}
    if importance and (importance.layers or importance.runs):
        figures["importance"] = importance_figure(importance, drop)
    if importance and importance.atlas:
        figures["atlas"] = atlas_figure(importance, drop)
    return figures
