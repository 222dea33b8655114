"""A report as a reader has it."""

from __future__ import annotations

from pathlib import Path

from shoal.eval.report.findings import compare
from shoal.eval.report.page import render
from shoal.eval.report.report import contents
from shoal.eval.report.run import read_run


def told(folder: Path) -> str:
    """report.md of the folder, without drawing its figures."""
    run = read_run(folder)
    return render("report", "md", **contents(run, compare(run), {}))
