"""The report of a run: one self-contained HTML page, the same in Markdown, and its figures, after any stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.artifacts.evaluation import Evaluation
from shoal.atomic_files import write_text
from shoal.figures.atlas import atlas_figure
from shoal.figures.layers import depth_figure, importance_figure
from shoal.figures.scores import MAX_TASKS, Ladder, before_after_figure, ladders, level_figure
from shoal.figures.training import loss_series, training_figure

from .cautions import cautions_section
from .details import (
    costs_section,
    cut_section,
    settings_section,
    terms_section,
    training_section,
)
from .document import Document, Picture, Section, picture, to_markdown
from .findings import Comparison, Run, compare, read_run, with_comparable_scores
from .flips import flips_section
from .headline import board, facts, headline
from .page import to_html
from .sections import (
    form_section,
    level_section,
    no_signal_section,
    protocol_section,
    scores_section,
)
from .speed import speed_section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    NamedFigure = tuple[str, Figure, str, str]
    """Name of the file, figure, title, and what it shows."""

FIGURES_DIR = "figures"
FIGURES = {"before_after", "levels", "importance", "depth", "runs", "atlas", "training"}


def write_report(run_dir: Path) -> Path:
    """The path of report.html, written with report.md and figures/ from whatever the run directory holds.

    Raises:
        UserError: there is nothing to report, an artifact cannot be read, or the disk is full.
    """
    run = read_run(run_dir)
    comparison = compare(run)
    pictures = draw_figures(with_comparable_scores(run, comparison))
    document = build_document(run, comparison, pictures)
    write_text(run_dir / "report.md", to_markdown(document))
    path = run_dir / "report.html"
    write_text(path, to_html(document))
    return path


def build_document(run: Run, comparison: Comparison, pictures: Mapping[str, Picture]) -> Document:
    """All sections that the run's results allow; what is absent is said to be absent."""

    def drawn(*names: str) -> list[Picture]:
        return [pictures[name] for name in names if name in pictures]

    folded = [replace(figure, folded=True) for figure in drawn("runs", "atlas")]
    sections: list[Section | None] = [
        cautions_section(run, comparison),
        form_section(comparison),
        scores_section(run, comparison, pictures.get("before_after")),
        level_section(with_comparable_scores(run, comparison), pictures.get("levels")),
        no_signal_section(comparison),
        protocol_section(run, comparison),
        cut_section(run, [*drawn("depth" if run.plan else "importance"), *folded]),
        training_section(run, drawn("training")),
        flips_section(comparison),
        speed_section(run),
        costs_section(run),
        terms_section(),
        settings_section(run),
    ]
    return Document(
        title=f"{run.model}: what a shallower model keeps",
        headline=headline(run, comparison),
        sections=tuple(section for section in sections if section is not None),
        board=board(run, comparison),
        facts=facts(run),
    )


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
