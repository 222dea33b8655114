"""`shoal list`: what a recipe can name. Nothing heavy is loaded but for metrics, whose classes say what they are."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any, get_args

from shoal.data.bundled import ABOUT
from shoal.progress import loading
from shoal.recipe.evaluate import CONFIGS_DIR, SuiteName, read_suite
from shoal.recipe.losses import LOGIT_TERMS, HiddenStates
from shoal.yaml_text import read_yaml

from .explain import table

Entry = dict[str, Any]
"""`name` and `about`, and what else a script may want to know."""


def recipes() -> list[Entry]:
    """The shipped recipes, which `--config NAME` finds from any folder."""
    rows = []
    for file in sorted(CONFIGS_DIR.glob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        about = text.partition("\n")[0].lstrip("# ").rstrip(":.")
        rows.append({"name": file.stem, "about": about, "model": read_yaml(text)["model"], "file": str(file)})
    return rows


def tasks() -> list[Entry]:
    """Shoal's own tasks. Every task that lm-eval ships can be named too."""
    from shoal.eval.tasks.names import HUB_TASKS_DIR, described_tasks, task_folders, tasks_in_files

    described, tags = described_tasks(task_folders(None))
    rows = [
        {
            "name": name,
            "about": data.about,
            "protocol": protocol,
            "ability": data.ability,
            "column": data.column or "",
            "bundled": data.bundled is not None,
            "groups": [tag for tag, members in tags.items() if name in members],
        }
        for name, (data, protocol) in described.items()
    ]
    return [*rows, *({"name": name, "about": "a task file of its own"} for name in tasks_in_files(HUB_TASKS_DIR))]


def metrics() -> list[Entry]:
    """What measure.metrics can name and, measured, prune.metric."""
    with loading():
        from shoal.compress.metrics.registry import METRICS

    return [
        {"name": name, "about": _first_paragraph(metric), "needs": metric.needs, "yields": metric.yields}
        for name, metric in METRICS.items()
    ]


def losses() -> list[Entry]:
    """The kinds of distill.losses, with their keys and defaults."""
    return [
        {
            "name": term().kind,
            "about": _first_paragraph(term),
            "keys": {key.name: key.default for key in fields(term) if key.name != "kind"},
        }
        for term in (*LOGIT_TERMS, HiddenStates)
    ]


def data() -> list[Entry]:
    """Bundled sources of text."""
    return [{"name": name, "about": about} for name, about in ABOUT.items()]


def suites() -> list[Entry]:
    """What eval.suite can name."""
    return [{"name": name, **asdict(read_suite(name))} for name in get_args(SuiteName)]


def cluster() -> list[Entry]:
    """Example files that start ranks on several nodes."""
    rows = []
    for file in sorted((CONFIGS_DIR / "cluster").iterdir()):
        about = next(line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("# "))
        rows.append({"name": file.name, "about": about.removeprefix("# ").rstrip(":."), "file": str(file)})
    return rows


LISTS: dict[str, Callable[[], list[Entry]]] = {
    function.__name__: function for function in (recipes, tasks, metrics, losses, data, suites, cluster)
}
"""Word after `shoal list` -> what gives the list."""
DETAILS = ("model", "yields", "needs", "keys", "column", "file")
"""What a reader is told of an entry beside its name."""


def told(asked: argparse.Namespace) -> str:
    """What `shoal list` prints."""
    if asked.what is None:
        return json.dumps([*LISTS]) if asked.json else "\n".join(f"shoal list {what}" for what in LISTS)
    return json.dumps(LISTS[asked.what](), indent=2, ensure_ascii=False) if asked.json else listing(asked.what)


def listing(kind: str) -> str:
    """One of LISTS for a reader."""
    rows = []
    for entry in LISTS[kind]():
        own = [", ".join(entry[key]) if key == "keys" else str(entry[key]) for key in DETAILS if entry.get(key)]
        rows.append((entry["name"], f"{entry['about']} [{'; '.join(own)}]" if own else entry["about"]))
    rest = ["", "every task that lm-eval ships can be named too"] if kind == "tasks" else []
    return "\n".join([*table(rows), *rest])


def _first_paragraph(of: type) -> str:
    return " ".join((inspect.getdoc(of) or "").partition("\n\n")[0].split())
