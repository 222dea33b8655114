"""Pages of the site's reference that are made from the code, so that nobody writes them twice."""

from __future__ import annotations

import contextlib
import csv
import inspect
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import shoal
from shoal.launch.arguments import VERBS, parse
from shoal.launch.help import names
from shoal.launch.help.explain import explanation, places
from shoal.recipe.asked import ROWS
from shoal.recipe.not_together import NOT_TOGETHER
from shoal.task_words import PROTOCOLS

FAMILIES = Path(__file__).parents[1] / "docs/reference/families.csv"


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Called by mkdocs once it has found the written pages."""
    for page in (cli, recipe, metrics_losses, tasks, python, families):
        name = f"docs/reference/{page.__name__.replace('_', '-')}.md"
        files.append(File.generated(config, name, content="\n".join(page())))


def cli() -> Iterator[str]:
    """The help of every command."""
    yield "# Commands\n\n`shoal COMMAND --help` prints the same.\n"
    for command in VERBS:
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            parse([command, "--help"])
        yield f"## shoal {command}\n\n```text\n{text.getvalue()}```\n"


def recipe() -> Iterator[str]:
    """A heading for every section of a recipe, under it a table of its keys."""
    yield "# Keys of a recipe\n\n`shoal explain KEY` prints the same.\n"
    for place in [None, *dict(places())]:
        for shown in explanation(place):
            if "keys" in shown:
                yield from _section(shown)
    yield "## Settings that exclude each other\n"
    yield from _table("setting | why, and what to set instead", (row.words.split(": ", 1) for row in NOT_TOGETHER))
    yield "\n## Settings that a recipe file needs permission for\n"
    rows = (
        (row.place, json.dumps(row.value), f"--allow {row.can}" if row.answer == "asked" else "error", row.why)
        for row in ROWS
    )
    yield from _table("setting | value (null: any) | permission | why, or what to set instead", rows)


def _section(shown: dict[str, Any]) -> Iterator[str]:
    place = shown["key"]
    yield f"## {place or 'recipe'}\n\n{shown['meaning']}\n"
    own = {key: explanation(f"{place}.{key}" if place else key)[0] for key in shown["keys"]}
    rows = ((key, one["meaning"], one.get("values", ""), one.get("default", "")) for key, one in own.items())
    yield from _table("key | meaning | values | default", rows)


def metrics_losses() -> Iterator[str]:
    """What `shoal list` prints of metrics and losses."""
    yield "# Metrics and losses\n\n`shoal list metrics` and `shoal list losses` print the same.\n\n## Metrics\n"
    yield from _table("metric | definition | scores; needs", map(_parts, names.metrics().items()))
    yield "\n## Losses\n\np is the teacher's distribution of the next token, q the student's.\n"
    yield from _table("loss | definition | keys", map(_parts, names.losses().items()))


def tasks() -> Iterator[str]:
    """What `shoal list` prints of tasks, a row for each data set, of suites and of bundled text."""
    yield "# Tasks, suites and bundled text\n\n`shoal list tasks`, `suites` and `data` print the same.\n\n## Tasks\n"
    yield "The name of a task is that of its data set, `_` and the protocol. lm-eval's tasks work too.\n"
    own: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for name, about, column in map(_parts, names.tasks().items()):
        base, _, protocol = name.rpartition("_")
        own.setdefault((about, column), []).append((base, protocol) if protocol in PROTOCOLS else (name, ""))
    bases = ((", ".join(dict.fromkeys(base for base, _ in each)), each, of) for of, each in own.items())
    rows = ((name, ", ".join(dict.fromkeys(end for _, end in each)), *of) for name, each, of in bases)
    yield from _table("data set | protocols | question | column", rows)
    for title, found in (("Suites", names.suites()), ("Bundled text", names.data())):
        yield f"\n## {title}\n"
        yield from _table("name | meaning", found.items())


def python() -> Iterator[str]:
    """The docstring of every public function and class."""
    yield "# Python\n\n`help(shoal.NAME)` prints the same.\n"
    for name in shoal.__all__:
        value = getattr(shoal, name)
        first, _, rest = (inspect.getdoc(value) or "").partition("\n\n")
        yield f"## shoal.{name}\n\n{first}\n\n```text\n{name}{inspect.signature(value)}\n\n{rest}\n```\n"


def families() -> Iterator[str]:
    """What tests/system/test_architectures.py found for every family."""
    yield "# Model families\n\n[How this is tested](supported.md#model-families).\n"
    with FAMILIES.open(encoding="utf-8") as file:
        rows = [(row[0], row[1], row[2], row[-1]) for row in csv.reader(file)]
    yield from _table(" | ".join(rows[0]), rows[1:])


def _parts(entry: tuple[str, str]) -> tuple[str, str, str]:
    """Name, meaning, and what a list prints after it in brackets."""
    name, text = entry
    about, _, more = text.rpartition(" [") if text.endswith("]") else (text, "", "")
    return name, about, more.removesuffix("]")


def _table(head: str, rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """A table whose first column is code."""
    yield f"| {head} |\n|{' --- |' * (head.count(' | ') + 1)}"
    for name, *others in rows:
        cells = (f"`{name}`", *(cell.replace("<", "&lt;") for cell in others))
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
