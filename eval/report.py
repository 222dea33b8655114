"""The report of a run: one self-contained HTML page, the same in Markdown, and its figures, after any stage."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.artifact import write_text
from shoal.atlas_figure import atlas_figure
from shoal.figures import before_after_figure, importance_figure, inline_svg, loss_series, save_figure, training_figure

from .details import (
    cut_section,
    missing_section,
    reproduce_section,
    settings_section,
    speed_section,
    terms_section,
    training_section,
)
from .document import Document, Facts, Picture, Section, to_markdown
from .findings import Comparison, Run, compare, read_run
from .headline import facts, headline
from .page import to_html
from .sections import flips_section, no_signal_section, protocol_section, scores_section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

FIGURES_DIR = "figures"


def write_report(run_dir: Path) -> Path:
    """The path of report.html, written with report.md and figures/ from whatever the run directory holds.

    Raises:
        UserError: there is nothing to report, an artifact cannot be read, or the disk is full.
    """
    run = read_run(run_dir)
    document = build_document(run, compare(run), draw_figures(run))
    write_text(run_dir / "report.md", to_markdown(document))
    path = run_dir / "report.html"
    write_text(path, to_html(document))
    log.info("report is at %s", path)
    return path


def build_document(run: Run, comparison: Comparison, pictures: dict[str, Picture]) -> Document:
    """All sections that the run's results allow; what is absent is said to be absent."""
    glance = facts(run)
    sections: list[Section | None] = [
        Section("At a glance", (Facts(glance),)) if glance else None,
        scores_section(run, comparison, pictures.get("before_after")),
        no_signal_section(comparison),
        protocol_section(run, comparison),
        cut_section(run, [pictures[name] for name in ("importance", "atlas") if name in pictures]),
        training_section(run, pictures.get("training")),
        speed_section(run),
        flips_section(run, comparison),
        terms_section(),
        settings_section(run),
        reproduce_section(run),
        missing_section(run),
    ]
    return Document(
        title=f"{run.model}: what a shallower model keeps",
        headline=headline(run, comparison),
        sections=tuple(section for section in sections if section is not None),
    )


def draw_figures(run: Run) -> dict[str, Picture]:
    """The run's figures by name, saved as SVG and PNG under figures/ and ready to stand in a page."""
    pictures = {}
    if run.evaluations:
        roles = list(run.evaluations.values())
        if any(evaluation.tasks for evaluation in roles):
            pictures["before_after"] = _drawn(
                run,
                "before_after",
                before_after_figure(roles),
                title="Scores before and after",
                description="Each mark is a score and its bar the 95 % interval, by ability and task; a dashed tick is "
                "chance. The numbers are in the table below.",
            )
    if run.importance and (run.importance.layers or run.importance.runs):
        pictures["importance"] = _drawn(
            run,
            "importance",
            importance_figure(run.importance, run.plan.drop if run.plan else ()),
            title="Importance of the layers",
            description="Bars: importance of each layer, the cut ones hatched and marked by a triangle. Heat map, "
            "where there is one: importance of every run of neighbouring layers, by its first layer and its length.",
        )
    if run.importance and run.importance.atlas:
        pictures["atlas"] = _drawn(
            run,
            "atlas",
            atlas_figure(run.importance, run.plan.drop if run.plan else ()),
            title="What every layer is worth, by ability and protocol",
            description="Each row is a layer, each column a metric or a task under one protocol; the panels below show "
            "what is left of every task without each layer, with 95 % intervals. Layers without which a task is "
            "significantly worse are framed.",
        )
    if run.training and loss_series(run.training):
        pictures["training"] = _drawn(
            run,
            "training",
            training_figure(run.training),
            title="Training curves",
            description="The loss and each of its terms by optimizer step, and the learning rate.",
        )
    return pictures


def _drawn(run: Run, name: str, figure: Figure, *, title: str, description: str) -> Picture:
    for suffix in ("svg", "png"):
        save_figure(figure, run.folder / FIGURES_DIR / f"{name}.{suffix}")
    svg = inline_svg(figure, name, title=title, description=description)
    return Picture(f"{FIGURES_DIR}/{name}.png", svg, title, description)
