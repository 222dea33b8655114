"""Pages of the site that are made from the code: every key of a recipe, and every module."""

from __future__ import annotations

import importlib
import json
import pkgutil
import textwrap
from collections.abc import Iterator
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import shoal
from shoal.launch.help.explain import explanation, places
from shoal.recipe.asked import ROWS
from shoal.recipe.not_together import NOT_TOGETHER


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Called by mkdocs once it has found the written pages."""
    for name, lines in {"docs/keys.md": keys(), "docs/modules.md": modules()}.items():
        files.append(File.generated(config, name, content="\n".join(lines)))


def keys() -> Iterator[str]:
    """A heading for every section of a recipe, under it a table of its keys."""
    yield "# Keys of a recipe\n\nWritten from the types; `shoal explain KEY` says the same.\n"
    for place in [None, *dict(places())]:
        for said in explanation(place):
            if "keys" in said:
                yield from _section(said)
    yield "## what does not go together\n\n| setting | why, and what to set instead |\n| --- | --- |"
    yield from (f"| `{place}` | {why} |" for place, _, why in (row.words.partition(": ") for row in NOT_TOGETHER))
    yield "\n## what a recipe file alone may not say\n"
    yield "| setting | can | why, or what to set instead |\n| --- | --- | --- |"
    for row in ROWS:
        value = "" if row.value is None else f": {json.dumps(row.value)}"
        can = f"--allow {row.can}" if row.answer == "asked" else f"{row.can}, refused"
        yield f"| `{row.place}{value}` | {can} | {row.why} |"


def _section(said: dict[str, Any]) -> Iterator[str]:
    place = said["key"]
    yield f"## {place or 'recipe'}\n\n{said['meaning']}\n"
    yield "| key | what it means | values | default |\n| --- | --- | --- | --- |"
    for key in said["keys"]:
        (own,) = explanation(f"{place}.{key}" if place else key)[:1]
        default = own.get("default", "")
        cells = (f"`{key}`", own["meaning"], own.get("values", ""), f"`{default}`" if default else "")
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"
    yield ""


def modules() -> Iterator[str]:
    """What the docstring of every package says."""
    yield "# Modules\n\nFrom the docstrings of the packages, the ground first.\n"
    names = [found.name for found in pkgutil.walk_packages(shoal.__path__, "shoal.") if found.ispkg]
    for name in ["shoal", *names]:
        first, _, rest = (importlib.import_module(name).__doc__ or "").partition("\n")
        yield f"## {name}\n\n{first}\n\n```\n{textwrap.dedent(rest).strip()}\n```\n"
