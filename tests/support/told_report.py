"""A report as a reader has it."""

from __future__ import annotations

from pathlib import Path

from shoal.eval.report.document import to_markdown
from shoal.eval.report.findings import compare, read_run
from shoal.eval.report.report import build_document


def told(folder: Path) -> str:
    """report.md of the folder, without drawing its figures."""
    run = read_run(folder)
    return to_markdown(build_document(run, compare(run), {}))
