"""The documentation as a site: links and anchors lead somewhere, and what GitHub shows as a list or table is one."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="needs the extra docs")
pytest.importorskip("material", reason="needs the extra docs")
pytestmark = pytest.mark.prove
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = build(ROOT / "mkdocs.yml", folder)
    assert built.returncode == 0, built.stderr
    return folder


def build(settings: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", settings, "--site-dir", folder]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_document_is_a_page_that_the_navigation_names(site: Path) -> None:
    documents = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
    pages = {str(file.relative_to(ROOT).with_suffix(".html")).replace("README", "index") for file in documents}
    assert not {page for page in pages if not (site / page).is_file()}
    first = (site / "index.html").read_text(encoding="utf-8")
    assert not {page for page in pages if f'href="{page}"' not in first}


def test_generated_pages_and_notebooks_are_there(site: Path) -> None:
    keys, notebook, reference = (
        (site / f"docs/{name}.html").read_text(encoding="utf-8")
        for name in ("reference/recipe", "first_steps", "reference/index")
    )
    assert "distill.lora" in keys
    assert "measure_importance" in notebook
    assert 'href="families.html"' in reference


@pytest.mark.parametrize("link", ["docs/no_such_page.md", "docs/reference/glossary.md#no-such-heading"])
def test_a_link_that_leads_nowhere_ends_the_build(tmp_path: Path, link: str) -> None:
    pages = tmp_path / "pages"
    pages.mkdir()
    for name in ("docs", "configs", "CHANGELOG.md", "pages/generated.py"):
        (pages / Path(name).name).symlink_to(ROOT / name)
    (pages / "README.md").write_text(f"# shoal\n\n[there]({link})\n", encoding="utf-8")
    (tmp_path / "mkdocs.yml").write_text((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), encoding="utf-8")
    built = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert built.returncode != 0
    assert link.rpartition("#")[2] in built.stderr


class Prose(HTMLParser):
    """The text of an <article> outside headings, which may begin with a number, and code."""

    TAGS = ("article", "pre", "code", "h1", "h2", "h3")

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.TAGS:
            self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.TAGS:
            self.inside.pop()

    def handle_data(self, data: str) -> None:
        if self.inside == ["article"]:
            self.text += data


def test_no_mark_of_markdown_is_left_in_the_text(site: Path) -> None:
    """The site's Markdown wants a blank line before a list or a table, and four spaces before what goes on in one."""
    left = {}
    for page in site.rglob("*.html"):
        prose = Prose()
        prose.feed(page.read_text(encoding="utf-8"))
        if marks := re.findall(r"(?m)^ *(?:[-*|] |\d+\. |#+ ).*|```.*|\]\(.*|\*\*.*", prose.text):
            left[page.relative_to(site)] = marks
    assert not left
