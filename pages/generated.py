"""Pages of the site that are made from the code and from notebooks, so that nobody writes them twice."""

from __future__ import annotations

import csv
import inspect
import io
import json
import re
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import shoal
from shoal.eval.tasks.data_sets import read_data_sets
from shoal.eval.tasks.names import TASKS_DIR
from shoal.launch.arguments import VERBS, parse
from shoal.launch.help import names
from shoal.launch.help.explain import explanation, places
from shoal.recipe.asked import ROWS
from shoal.recipe.not_together import NOT_TOGETHER

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Called by mkdocs once it has found the written pages."""
    for page in (cli, recipe, metrics_losses, tasks, python, families):
        name = f"docs/reference/{page.__name__.replace('_', '-')}.md"
        files.append(File.generated(config, name, content="\n".join(page())))
    for file in (ROOT / "docs").glob("*.ipynb"):
        files.append(File.generated(config, f"docs/{file.stem}.md", content="\n\n".join(notebook(file))))


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """A page with the links that the site alone can follow: to notebooks as pages, and to pages made here."""
    text, is_list = markdown.replace(".ipynb)", ".md)"), page.file.src_uri == "docs/reference/README.md"
    return re.sub(r"`([\w-]+)\.html`", r"[\1](\1.md)", text) if is_list else text


def on_page_content(html: str, **_: Any) -> str:
    """Wide tables and code can be scrolled with the keyboard; tables of notebooks look like the others."""
    html = re.sub(r"<table[^>]*>", '<div class="wide" role="group" aria-label="Table" tabindex="0"><table>', html)
    return html.replace("</table>", "</table></div>").replace("<pre>", '<pre tabindex="0">')


def notebook(file: Path) -> Iterator[str]:
    """The cells of a notebook, and what they show."""
    for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        yield source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```"
        for output in cell.get("outputs", ()):
            shown = {kind: "".join(text) for kind, text in output.get("data", {}).items()}
            text = shown.get("text/plain") or "".join(output.get("text", ()))
            last = source.strip().rpartition("\n")[2].translate(str.maketrans("[]", "()"))
            image = f"![Figure drawn by {last}](data:image/png;base64,{shown.get('image/png', '').strip()})"
            yield image if "image/png" in shown else shown.get("text/html") or f"```text\n{text.strip()}\n```"


def cli() -> Iterator[str]:
    """The help of every command."""
    yield "# Commands\n\n`shoal COMMAND --help` prints the same.\n"
    for command in VERBS:
        with redirect_stdout(io.StringIO()) as text, suppress(SystemExit):
            parse([command, "--help"])
        yield f"## shoal {command}\n\n```text\n{text.getvalue()}```\n"


def recipe() -> Iterator[str]:
    """A heading for every section of a recipe, under it a table of its keys."""
    yield "# Keys of a recipe\n\n`shoal explain KEY` prints the same.\n"
    for section in (one for place in [None, *dict(places())] for one in explanation(place) if "keys" in one):
        place = section["key"]
        yield f"## {place or 'recipe'}\n\n{section['meaning']}\n"
        own = {key: explanation(f"{place}.{key}" if place else key)[0] for key in section["keys"]}
        rows = ((key, one["meaning"], one.get("values", ""), one.get("default", "")) for key, one in own.items())
        yield from (*_table("key | meaning | values | default", rows), "")
    yield "## Settings that exclude each other\n"
    yield from _table("setting | why, and what to set instead", (words.split(": ", 1) for words in NOT_TOGETHER))
    yield "\n## Settings that a recipe file needs permission for\n"
    rows = ((row.place, json.dumps(row.value), "" if row.answer == "refused" else row.can, row.why) for row in ROWS)
    yield from _table("setting | value (null: any) | --allow (empty: always an error) | why, or the remedy", rows)


def metrics_losses() -> Iterator[str]:
    """What `shoal list` prints of metrics and losses."""
    yield "# Metrics and losses\n\np is the teacher's distribution of the next token, q the student's.\n"
    for head, found in (("metric | definition", names.metrics()), ("loss | definition", names.losses())):
        yield from (f"\n## {head.partition(' ')[0].title()}\n", *_table(head, found.items()))


def tasks() -> Iterator[str]:
    """Data sets of tasks, and what `shoal list` prints of suites and bundled text."""
    yield "# Tasks, suites and bundled text\n\nA task is `DATASET_PROTOCOL`. lm-eval's tasks work too.\n\n## Tasks\n"
    own = (
        (name, ", ".join(one.protocols), one.about, one.column or "") for name, one in read_data_sets(TASKS_DIR).items()
    )
    yield from _table("data set | protocols | question | column", own)
    for head, found in (("suite | content", names.suites()), ("bundled text | content", names.data())):
        yield from (f"\n## {head.partition(' |')[0].capitalize()}\n", *_table(head, found.items()))


def python() -> Iterator[str]:
    """The docstring of every public function and class."""
    yield "# Python\n\n`help(shoal.NAME)` prints the same.\n"
    for name in shoal.__all__:
        value = getattr(shoal, name)
        first, _, rest = (inspect.getdoc(value) or "").partition("\n\n")
        takes = "(message)" if value is shoal.UserError else inspect.signature(value)
        call = textwrap.fill(f"{name}{takes}", 110, subsequent_indent="    ", break_long_words=False)
        yield f"## shoal.{name}\n\n{first}\n\n```text\n{call}\n\n{rest}\n```\n"


def families() -> Iterator[str]:
    """What tests/system/test_architectures.py found for every family."""
    yield "# Model families\n\n[How this is tested](supported.md#model-families).\n"
    with (ROOT / "docs/reference/families.csv").open(encoding="utf-8") as file:
        rows = [(row[0], row[1], row[2], row[-1]) for row in csv.reader(file)]
    yield from _table(" | ".join(rows[0]), rows[1:])


def _table(head: str, rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """A table whose first column is code."""
    yield f"| {head} |\n|{' --- |' * (head.count(' | ') + 1)}"
    for name, *others in rows:
        cells = (f"`{name}`", *(cell.replace("<", "&lt;") for cell in others))
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
