"""Reports that several tests read."""

from __future__ import annotations

from pathlib import Path

import pytest
from html_page import Page
from results import write_quickstart, write_run

from shoal.eval.report.report import write_report


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, str, Path]:
    folder = write_run(tmp_path_factory.mktemp("run"))
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path.read_text()), (folder / "report.md").read_text(), folder


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, str, Path]:
    """The report of a run with the numbers of README's table."""
    folder = write_quickstart(tmp_path_factory.mktemp("quickstart"))
    return Page(write_report(folder).read_text()), (folder / "report.md").read_text(), folder
